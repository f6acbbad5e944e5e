// Cross-entropy between two softmaxes over one bank, and what its gradient needs, in one pass.
//
// For each row, p^S the softmax of z^S_j = s q.k^S_j + b_j and p^T that of z^T_j = t u.k^T_j + b_j:
//   loss = lse^S - sum_j p^T_j z^S_j = lse^S - s q.O^T - sum_j p^T_j b_j    O^S = sum_j p^S_j k^S_j, O^T = sum_j p^T_j k^S_j
//   dloss / dq = s (O^S - O^T),   dloss / ds = q.(O^S - O^T)
// so that both pooled rows are sums of the same panels. The teacher's entropy, log l - F / l, comes from its fall F = sum_j w_j log w_j
// over the weights w_j = e^(z^T_j - m), whose sum is l.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/distillation.h"
#include "similarity/softmax.inl"

namespace {

using kdfast::DistillationMerge;
using kdfast::DistillationParams;
using kdfast::DistillationTask;
using kdfast::kDistillationStatistics;

// What is kept of the student's rows, or of the teacher's.
struct Side {
  Rows rows;
  Sums pooled;
  RunningSoftmax softmax;

  template <class Product>
  void plan(Product product, int64_t row_count, int64_t width, int64_t pooled_width, Arena& arena) {
    rows.plan(product, row_count, width, arena);
    pooled.plan(row_count, pooled_width, arena);
    softmax.plan(row_count, arena);
  }

  // Row i is row `at` of the call, or only fills the last tile.
  template <class Product>
  bool begin_row(Product, const SimilarityParams& p, int64_t i, int64_t at, bool exists, bool start) const {
    const float scale = exists ? p.scale[at] : 0;
    softmax.begin(i, scale);
    __builtin_memset(pooled.at(i), 0, size_t(4 * pooled.stride));
    if (exists && start) softmax.start(i, p.start_logit[at]);
    if (exists) return Packing<Product>::pack_row(p.query, at, p.width, scale < 0, rows.at(i));
    __builtin_memset(rows.at(i), 0, size_t(4 * rows.stride));
    return true;
  }
};

struct DistillationWorkspace {
  int64_t rows, block;
  bool one_bank;
  Side student, teacher;
  Streamed keys, teacher_keys = {};
  Tile tile;
  ColumnTerms terms;
  float *fall, *bias;  // [rows][kLanes], of the teacher's weights

  template <class Product>
  DistillationWorkspace(Product product, const DistillationParams& p, int64_t row_count, int64_t columns, Arena& arena) {
    const int64_t width = p.student.width, teacher_width = p.teacher.width;
    rows = rows_at_once<Product>((3 * width + teacher_width) / 2, row_count);  // beside q and its sum: u and another sum
    block = block_columns<Product>(columns, p.student.width);
    one_bank = p.teacher.keys.data == p.student.keys.data && p.teacher.keys.type == p.student.keys.type && width == teacher_width;
    student.plan(product, rows, width, width, arena);
    teacher.plan(product, rows, teacher_width, width, arena);
    keys.panels.plan(product, width, block, true, true, arena);
    keys.matrix = p.student.keys;
    if (!one_bank) {
      teacher_keys.panels.plan(product, teacher_width, block, true, false, arena);
      teacher_keys.matrix = p.teacher.keys;
    }
    tile.plan(product, rows, block, arena);
    terms.plan(block, arena);
    fall = arena.take(rows * kLanes), bias = arena.take(rows * kLanes);
  }
};

// ---- what a row ends with ---------------------------------------------------------------------------------------------

// Weights, their sums and pooled rows, all relative to the maxima.
struct DistilledRow {
  double maximum, teacher_maximum;
  float sum, teacher_sum;
  float fall, bias;  // sums of the teacher's weights times their exponents, and times the biases
  const float *pooled, *teacher_pooled;
};

inline void finish_row(const DistillationParams& p, int64_t i, const DistilledRow& r) {
  const SimilarityParams& s = p.student;
  const double lse = log_sum(r.maximum, r.sum), teacher_lse = log_sum(r.teacher_maximum, r.teacher_sum);
  const float weight = r.sum == 0 ? 0 : 1 / r.sum, teacher_weight = r.teacher_sum == 0 ? 0 : 1 / r.teacher_sum;
  float inner = 0;
  with_elements(s.query.from(i * s.width), [&](const auto* query) {
    Vec sum = {};
    for (int64_t d = 0; d < s.width; d += kLanes) {
      const Vec expected = splat(teacher_weight) * load(r.teacher_pooled + d);
      const Vec difference = multiply_add(splat(weight), load(r.pooled + d), -expected);
      sum = multiply_add(load_row(query, d, s.width), expected, sum);
      __builtin_memcpy(p.difference + i * s.width + d, &difference, size_t(4 * smaller(kLanes, s.width - d)));
    }
    inner = total(sum);
  });
  double score = double(s.scale[i]) * double(inner) + double(teacher_weight) * double(r.bias);
  if (s.start_logit != nullptr && p.teacher.start_logit[i] != -kInfinity)
    score += __builtin_exp(double(p.teacher.start_logit[i]) - teacher_lse) * double(s.start_logit[i]);
  p.loss[i] = float(lse - score);
  p.entropy[i] = r.teacher_sum == 0 ? 0 : float(__builtin_log(double(r.teacher_sum)) - double(teacher_weight) * double(r.fall));
  float* const out = p.log_sums + i;
  store_log_sum(lse, out, out + s.rows);
  store_log_sum(teacher_lse, out + 2 * s.rows, out + 3 * s.rows);
}

// ---- one rectangle ----------------------------------------------------------------------------------------------------

// Weights as they are stored: of products in bf16 rounded.
template <class Product>
inline void as_stored([[maybe_unused]] Vec& first, [[maybe_unused]] Vec& second) {
#ifdef KDFAST_BF16_INSTRUCTIONS
  if constexpr (__is_same(Product, BFloat16Product)) {
    const __m512i pairs = Packing<Product>::round_pairs(first, second);
    first = Packing<Product>::widen(_mm512_castsi512_si256(pairs));
    second = Packing<Product>::widen(_mm512_extracti64x4_epi64(pairs, 1));
  }
#endif
}

// As weigh_row, and adds what the weights contribute to the row's fall and, where biases are given, to its bias. The loss is a difference of
// logits under them: rounded weights that do not add up to their sum would leave a part of the logits themselves.
template <class Product>
inline Vec weigh_teacher_row(const float* scores, float* weights, int64_t padded, RowLevel level, const float* biases, Vec& fall, Vec& bias) {
  const Vec least = splat(-88.1f);
  Vec sum0 = {}, sum1 = {}, fall0 = {}, fall1 = {};
  for (int64_t j = 0; j < padded; j += 2 * kLanes) {
    const Vec t0 = level.exponent_of(load(scores + j)), t1 = level.exponent_of(load(scores + j + kLanes));
    Vec p0 = exp_nonpositive(t0), p1 = exp_nonpositive(t1);
    as_stored<Product>(p0, p1);
    sum0 += p0;
    sum1 += p1;
    fall0 = multiply_add(p0, larger(least, t0), fall0);  // a weight of 0 has exponent -inf
    fall1 = multiply_add(p1, larger(least, t1), fall1);
    if (biases != nullptr) {
      const Vec lowest = splat(-0x1p100f);
      bias = multiply_add(p0, larger(lowest, load(biases + j)), bias);
      bias = multiply_add(p1, larger(lowest, load(biases + j + kLanes)), bias);
    }
    Packing<Product>::store_weights(weights, j, p0, p1);
  }
  fall = fall0 + fall1;
  return sum0 + sum1;
}

// Up to rows_at_once rows, `first` .. `first + count` of the call, through the task's columns.
template <class Product>
struct DistillationPass {
  const DistillationParams& p;
  const DistillationTask& task;
  DistillationWorkspace& w;
  const int64_t first, count;

  bool run() const {
    const int64_t padded_rows = round_up(count, Product::kRowMultiple);
    const bool start = task.start && p.student.start_logit != nullptr;
    bool sound = true;
    for (int64_t i = 0; i < padded_rows; ++i) {
      sound &= w.student.begin_row(Product{}, p.student, i, first + i, i < count, start);
      sound &= w.teacher.begin_row(Product{}, p.teacher, i, first + i, i < count, start);
      __builtin_memset(w.fall + i * kLanes, 0, 4 * kLanes);
      __builtin_memset(w.bias + i * kLanes, 0, 4 * kLanes);
    }
    sound &= stream_blocks(Product{}, w.block, padded_rows, task.column_begin, task.column_end, *this, w.keys, w.teacher_keys);
    for (int64_t i = 0; i < count; ++i) end_row(i);
    return sound;
  }

  // All rows for the teacher, then (chunk by chunk) all for the student: each time only one side's rows and panels need room in L2.
  void begin_block(const Block& block) const {
    w.terms.pack(p.student, 0, block);
    const int64_t padded_rows = round_up(count, Product::kRowMultiple);
    const Panels& keys = w.one_bank ? w.keys.panels : w.teacher_keys.panels;
    const Prefetch next = after_block(w.teacher_keys, block, w.block, task.column_end, padded_rows);
    for (int64_t row = 0; row < padded_rows; row += Product::kRowChunk) {
      const int64_t left = padded_rows - row, rows = smaller(left, Product::kRowChunk);
      score(w.teacher, keys, block, row, rows);
      weigh_rows(w.teacher.softmax, w.terms, w.tile, p.teacher, first, count, block, row, rows, next,
                 [&](int64_t i, const float* scores, RowLevel level) { return weigh_teacher(i, row, block, scores, level); });
      sum(w.teacher, block, row, rows);
    }
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    score(w.student, w.keys.panels, block, row, rows);
    weigh_rows(w.student.softmax, w.terms, w.tile, p.student, first, count, block, row, rows, next,
               [&](int64_t i, const float* scores, RowLevel level) { return weigh_row<Product>(scores, w.tile.weights(i - row), block.padded, level); });
    sum(w.student, block, row, rows);
  }

  void score(const Side& side, const Panels& keys, const Block& block, int64_t row, int64_t rows) const {
    score_rows(Product{}, side.rows.at(row), side.rows.stride, rows, keys, block.padded, w.tile.scores(0), w.tile.stride);
  }

  // O = diag(correction) O + P K
  void sum(const Side& side, const Block& block, int64_t row, int64_t rows) const {
    sum_rows(Product{}, w.tile.weights(0), w.tile.stride, rows, block.columns, w.keys.panels,
             ScaleAddTile{side.pooled.at(row), side.pooled.stride, side.softmax.correction + row});
  }

  // F' = c (F + log c l) + sum of weight log weight with the correction c = e^(m - m').
  Vec weigh_teacher(int64_t i, int64_t row, const Block& block, const float* scores, RowLevel level) const {
    const bool biased = p.teacher.bias != nullptr && i < count;
    Vec fall, bias = {};
    const Vec sum = weigh_teacher_row<Product>(scores, w.tile.weights(i - row), block.padded, level, biased ? w.terms.bias : nullptr, fall, bias);
    const Vec correction = splat(w.teacher.softmax.correction[i]), step = larger(splat(-88.1f), splat(w.teacher.softmax.step[i]));
    float *const f = w.fall + i * kLanes, *const b = w.bias + i * kLanes;
    store(f, multiply_add(correction, multiply_add(step, load(w.teacher.softmax.sum + i * kLanes), load(f)), fall));
    if (biased) store(b, multiply_add(correction, load(b), bias));
    return sum;
  }

  void end_row(int64_t i) const {
    const auto whole = [i](const float* lanes) { return total(load(lanes + i * kLanes)); };
    const RunningSoftmax &student = w.student.softmax, &teacher = w.teacher.softmax;
    const DistilledRow row{student.top(i), teacher.top(i), whole(student.sum), whole(teacher.sum),
                           whole(w.fall),  whole(w.bias),  w.student.pooled.at(i), w.teacher.pooled.at(i)};
    if (task.finish) return finish_row(p, first + i, row);
    const int64_t out = first + i - task.row_begin;
    const float statistics[kDistillationStatistics] = {student.maximum[i], student.low[i], row.sum, teacher.maximum[i],
                                                       teacher.low[i],     row.teacher_sum, row.fall, row.bias};
    __builtin_memcpy(task.statistics + out * kDistillationStatistics, statistics, sizeof(statistics));
    float* const pooled = task.pooled + 2 * out * task.pooled_stride;
    __builtin_memcpy(pooled, row.pooled, size_t(4 * w.student.pooled.stride));
    __builtin_memcpy(pooled + task.pooled_stride, row.teacher_pooled, size_t(4 * w.teacher.pooled.stride));
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows and `columns` columns.
int64_t distillation_workspace(const DistillationParams& p, int64_t rows, int64_t columns) {
  return similarity_words(p.student.precision, [&](auto product) {
    Arena arena{nullptr};
    DistillationWorkspace(product, p, rows, columns, arena);
    return arena.words;
  });
}

void distillation(const DistillationParams& p, const DistillationTask& task, float* workspace) {
  with_similarity_product(p.student.precision, [&](auto product) {
    using Product = decltype(product);
    Arena arena{workspace};
    DistillationWorkspace w(product, p, task.row_end - task.row_begin, task.column_end - task.column_begin, arena);
    [[maybe_unused]] typename Product::Session session;
    bool sound = true;
    for (int64_t row = task.row_begin; row < task.row_end; row += w.rows)
      sound &= DistillationPass<Product>{p, task, w, row, smaller(w.rows, task.row_end - row)}.run();
    return sound;
  });
}

// Parts are brought to the larger maximum as blocks are in the pass, and added to part 0 in order.
void distillation_merge(const DistillationParams& p, const DistillationMerge& t) {
  const auto rescale = [](double from, double to) { return from == -double(kInfinity) ? 0.0f : float(__builtin_exp(from - to)); };
  const auto top = [](const float* maximum) { return double(maximum[0]) + double(maximum[1]); };
  for (int64_t i = t.begin; i < t.end; ++i) {
    float* const s = t.statistics + i * kDistillationStatistics;
    float* const pooled = t.pooled + 2 * i * t.pooled_stride;
    for (int64_t c = 1; c < t.parts; ++c) {
      const float* const other = s + c * t.part_stride * kDistillationStatistics;
      const float* const other_pooled = pooled + 2 * c * t.part_stride * t.pooled_stride;
      for (int64_t side = 0; side < 2; ++side) {
        float *const maximum = s + 3 * side, *const sum = maximum + 2;
        const float *const other_maximum = other + 3 * side, other_sum = other_maximum[2];
        const double own = top(maximum), others = top(other_maximum), to = own > others ? own : others;
        const float mine = rescale(own, to), theirs = rescale(others, to);
        if (side == 1) {
          const auto fallen = [to](float fall, double from, float weights) { return weights == 0 ? 0 : fall + float(from - to) * weights; };
          s[6] = mine * fallen(s[6], own, *sum) + theirs * fallen(other[6], others, other_sum);
          s[7] = mine * s[7] + theirs * other[7];
        }
        if (others > own) maximum[0] = other_maximum[0], maximum[1] = other_maximum[1];
        *sum = mine * *sum + theirs * other_sum;
        float* const o = pooled + side * t.pooled_stride;
        const float* const other_o = other_pooled + side * t.pooled_stride;
        for (int64_t d = 0; d < p.student.width; ++d) o[d] = mine * o[d] + theirs * other_o[d];
      }
    }
    finish_row(p, i, {top(s), top(s + 3), s[2], s[5], s[6], s[7], pooled, pooled + t.pooled_stride});
  }
}

}  // namespace
