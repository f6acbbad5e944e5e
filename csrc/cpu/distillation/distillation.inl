// Cross-entropy between two softmaxes over one bank, or KL, and what its gradient needs, in one pass.
//
// For each row, p^S the softmax of z^S_j = s q.k^S_j + b_j and p^T that of z^T_j = t u.k^T_j + b_j, with maxima m, weights w_j = e^(z_j - m)
// and their sums l:
//   cross-entropy = log l^S - (sum_j w^T_j (z^S_j - m^S)) / l^T      KL = log l^S - log l^T - (sum_j w^T_j ((z^S_j - m^S) - (z^T_j - m^T))) / l^T
//   dloss / dq = s (O^S - O^T),   dloss / ds = q.(O^S - O^T)         O^S = sum_j p^S_j k^S_j, O^T = sum_j p^T_j k^S_j
//   t dloss / dt = -Cov_p(z^T, x), p = p^T, with x the student's logits, for KL less the teacher's: from sums of w^T x, w^T y and w^T x y,
// y = z^T - m^T
// Both pooled rows are sums of the same panels. From them the loss would be lse^S - s q.O^T, with rounding errors as large as those of the
// logits; those of the sums above are as large as the differences in them.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "distillation/distillation.h"
#include "engine/rows.inl"
#include "similarity/wide.inl"

namespace {

using kdfast::DistillationMerge;
using kdfast::DistillationParams;
using kdfast::DistillationTask;
using kdfast::kDistillationStatistics;

// ---- rows of both sides -----------------------------------------------------------------------------------------------

// Weights and their sums, all relative to the maxima. depth and covariance: sums of w^T y and, less both means, of w^T x y, where the
// teacher's slopes are wanted.
struct DistilledRow {
  double maximum, teacher_maximum, sum, teacher_sum, excess, depth, covariance;

  double share() const { return sum == 0 ? 0 : 1 / sum; }
  double teacher_share() const { return teacher_sum == 0 ? 0 : 1 / teacher_sum; }
  double teacher_slope() const { return -teacher_share() * covariance; }
};

// A row of the student's scores, and what the teacher's weights of it add to excess, depth and spread.
struct Excess {
  const float* scores;
  RowLevel level;
  Vec sum, depth, spread;
};

// As weigh_row of the teacher's scores, and its excess; with `kKl` less the teacher's exponents. A weight of 0 may have exponents of -inf.
// With `kSlopes` its depth and spread too.
template <class Product, bool kKl, bool kSlopes>
inline Vec weigh_teacher_scores(const float* scores, float* weights, int64_t padded, RowLevel level, Excess& excess) {
  const Vec least = splat(-88.1f), lowest = splat(-0x1p100f);
  const RowLevel student = excess.level;
  Vec sum0 = {}, sum1 = {}, excess0 = {}, excess1 = {}, depth = {}, spread = {};
  for (int64_t j = 0; j < padded; j += kPanel) {
    Vec t[kVecs], p[kVecs], z[kVecs];
    level.exponents_of(scores + j, t);
    exp_nonpositive(t, p);
    student.exponents_of(excess.scores + j, z);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      z[v] = larger(lowest, z[v]);
      t[v] = larger(least, t[v]);
      if constexpr (kKl) z[v] -= t[v];
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; v += 2) {
      sum0 += p[v];
      sum1 += p[v + 1];
      excess0 = multiply_add(p[v], z[v], excess0);
      excess1 = multiply_add(p[v + 1], z[v + 1], excess1);
      if constexpr (kSlopes) {
        const Vec y0 = p[v] * t[v], y1 = p[v + 1] * t[v + 1];
        depth += y0 + y1;
        spread = multiply_add(y0, z[v], multiply_add(y1, z[v + 1], spread));
      }
      Packing<Product>::store_weights(weights, j + v * kLanes, p[v], p[v + 1]);
    }
  }
  excess.sum = excess0 + excess1, excess.depth = depth, excess.spread = spread;
  return sum0 + sum1;
}

// The running softmaxes of both sides, and E.
struct BothSoftmaxes {
  RunningSoftmax student, teacher;
  // [rows][kLanes], as grow has them: sum of the teacher's weights times the exponents of the student's, less their own for KL
  float *excess, *rest;
  // The same of depth and spread, where the teacher's slopes are wanted; else null.
  float *depth, *depth_rest, *spread, *spread_rest;

  void plan(int64_t rows, bool slopes, Arena& arena) {
    student.plan(rows, arena), teacher.plan(rows, arena);
    excess = arena.take(rows * kLanes), rest = arena.take(rows * kLanes);
    depth = depth_rest = spread = spread_rest = nullptr;
    if (!slopes) return;
    depth = arena.take(rows * kLanes), depth_rest = arena.take(rows * kLanes);
    spread = arena.take(rows * kLanes), spread_rest = arena.take(rows * kLanes);
  }

  // Row i is row `at` of the call, or only fills the last tile.
  void begin_row(const DistillationParams& p, int64_t i, int64_t at, bool exists, bool start) const {
    student.begin(i, exists ? p.student.scale[at] : 0);
    teacher.begin(i, exists ? p.teacher.scale[at] : 0);
    float* const all[] = {excess, rest, depth, depth_rest, spread, spread_rest};
    for (float* const sums : all)
      if (sums != nullptr) __builtin_memset(sums + i * kLanes, 0, 4 * kLanes);
    if (!exists || !start) return;
    const float weight = student.start(i, p.student.start_logit[at]), teacher_weight = teacher.start(i, p.teacher.start_logit[at]);
    if (weight == 0 && teacher_weight != 0) excess[i * kLanes] = -kInfinity;
  }

  // Row i's teacher weights, whose sums by lane are returned: E' = c (E + h l) + what the block adds, c = e^(m - m') of the teacher's maxima
  // and h what its differences change by. So with depth, and spread, where y changes by k:
  //   Y' = c (Y + k l)      S' = c (S + h Y + k (E + h l))
  template <class Product, bool kKl, bool kSlopes>
  Vec weigh_teacher_row(int64_t i, const float* scores, float* weights, int64_t padded, RowLevel level, Excess added) const {
    const Vec sum = weigh_teacher_scores<Product, kKl, kSlopes>(scores, weights, padded, level, added);
    const Vec correction = splat(teacher.correction[i]), before = load(teacher.sum + i * kLanes);
    const Vec teacher_step = larger(splat(-0x1p100f), splat(teacher.step[i]));
    Vec step = larger(splat(-0x1p100f), splat(student.step[i]));
    if constexpr (kKl) step -= teacher_step;
    const auto become = [&](float* sums, float* rest, Vec moved, Vec more) {
      store(sums + i * kLanes, correction == Vec{} ? Vec{} : moved);  // E may be -inf
      grow(sums + i * kLanes, rest + i * kLanes, correction, more);
    };
    const Vec moved = multiply_add(step, before, load(excess + i * kLanes));
    if constexpr (kSlopes) {
      const Vec deep = load(depth + i * kLanes);
      become(spread, spread_rest, multiply_add(step, deep, multiply_add(teacher_step, moved, load(spread + i * kLanes))), added.spread);
      become(depth, depth_rest, multiply_add(teacher_step, before, deep), added.depth);
    }
    become(excess, rest, moved, added.sum);
    return sum;
  }

  // The same for what the call is.
  template <class Product>
  Vec weigh_teacher_row(const DistillationParams& p, int64_t i, const float* scores, float* weights, int64_t padded, RowLevel level,
                        const Excess& added) const {
    if (p.teacher_slopes != nullptr)
      return p.kl ? weigh_teacher_row<Product, true, true>(i, scores, weights, padded, level, added)
                  : weigh_teacher_row<Product, false, true>(i, scores, weights, padded, level, added);
    return p.kl ? weigh_teacher_row<Product, true, false>(i, scores, weights, padded, level, added)
                : weigh_teacher_row<Product, false, false>(i, scores, weights, padded, level, added);
  }

  DistilledRow row(int64_t i) const {
    const auto whole = [i](const float* lanes, const float* rest) {
      double sum = 0;
      for (int k = 0; k < kLanes && lanes != nullptr; ++k) sum += double(lanes[i * kLanes + k]) + double(rest[i * kLanes + k]);
      return sum;
    };
    DistilledRow found{student.top(i),      teacher.top(i),           whole(student.sum, student.rest), whole(teacher.sum, teacher.rest),
                       whole(excess, rest), whole(depth, depth_rest), whole(spread, spread_rest)};
    found.covariance -= found.teacher_share() * found.depth * found.excess;
    return found;
  }
};

// Row i's loss and log_sums.
inline void finish_loss(const DistillationParams& p, int64_t i, const DistilledRow& r) {
  const SimilarityParams& s = p.student;
  const double level = __builtin_log(r.sum), teacher_level = __builtin_log(r.teacher_sum);
  p.loss[i] = float(level - (p.kl && r.teacher_sum != 0 ? teacher_level : 0) - r.teacher_share() * r.excess);
  if (p.teacher_slopes != nullptr) p.teacher_slopes[i] = float(r.teacher_slope());
  float* const out = p.log_sums + i;
  const double lse = r.maximum + level, teacher_lse = r.teacher_maximum + teacher_level;
  store_log_sum(lse, out, out + s.rows);
  store_log_sum(teacher_lse, out + 2 * s.rows, out + 3 * s.rows);
  const auto start_weight = [i](const SimilarityParams& side, double lse) {
    return side.start_logit == nullptr || lse == -double(kInfinity) ? 0 : __builtin_exp(double(side.start_logit[i]) - lse);
  };
  out[4 * s.rows] = float(start_weight(s, lse) - start_weight(p.teacher, teacher_lse));
}

// And its difference, of pooled rows that are relative to the maxima as the sums are.
inline void finish_row(const DistillationParams& p, int64_t i, const DistilledRow& r, const float* pooled, const float* teacher_pooled) {
  const SimilarityParams& s = p.student;
  const Vec share = splat(float(r.share())), teacher_share = splat(float(r.teacher_share()));
  for (int64_t d = 0; d < s.width; d += kLanes) {
    const Vec difference = scaled(load(pooled + d), share) - scaled(load(teacher_pooled + d), teacher_share);  // 0 for equal sides
    __builtin_memcpy(p.difference + i * s.width + d, &difference, size_t(4 * smaller(kLanes, s.width - d)));
  }
  finish_loss(p, i, r);
}

// ---- one rectangle ----------------------------------------------------------------------------------------------------

// What is kept of the student's rows, or of the teacher's.
struct Side {
  Rows rows;
  Sums pooled;

  template <class Product>
  void plan(Product product, int64_t row_count, int64_t width, int64_t pooled_width, Arena& arena) {
    rows.plan(product, row_count, spaced<Product>(width), arena);
    pooled.plan(row_count, spaced<Product>(pooled_width), arena);
  }

  // Row i is row `at` of the call, or only fills the last tile.
  template <class Product>
  bool begin_row(Product, const SimilarityParams& p, int64_t i, int64_t at, bool exists) const {
    __builtin_memset(pooled.at(i), 0, size_t(4 * pooled.stride));
    if (exists) return Packing<Product>::pack_row(p.query, at, p.width, p.scale[at] < 0, rows.at(i));
    __builtin_memset(rows.at(i), 0, size_t(4 * rows.stride));
    return true;
  }
};

// Rows whose scores on the student's side are kept until the teacher's come: enough that one side's panels stay in L2 meanwhile.
template <class Product>
constexpr int64_t kKeptRows = Product::kRowChunk < 96 ? 96 : Product::kRowChunk;

// Whether the student's keys are the teacher's too.
inline bool one_bank(const DistillationParams& p) {
  const Matrix &keys = p.student.keys, &theirs = p.teacher.keys;
  return theirs.data == keys.data && theirs.type == keys.type && p.teacher.width == p.student.width;
}

struct DistillationWorkspace {
  int64_t rows, block;
  Side student, teacher;
  BothSoftmaxes softmaxes;
  Streamed keys, teacher_keys = {};
  Tile student_scores, tile;  // weights of both sides are made in `tile`
  RowLevel* levels;           // of student_scores
  ColumnTerms terms;

  template <class Product>
  DistillationWorkspace(Product product, const DistillationParams& p, int64_t row_count, int64_t columns, Arena& arena) {
    const int64_t width = p.student.width, teacher_width = p.teacher.width;
    rows = rows_at_once<Product>((3 * width + teacher_width) / 2, row_count);  // beside q and its sum: u and another sum
    block = streamed_columns<Product>(columns, p.student.width);
    student.plan(product, rows, width, width, arena);
    teacher.plan(product, rows, teacher_width, width, arena);
    softmaxes.plan(rows, p.teacher_slopes != nullptr, arena);
    plan_streamed(product, keys, width, block, true, true, arena);
    keys.matrix = p.student.keys;
    if (!one_bank(p)) {
      plan_streamed(product, teacher_keys, teacher_width, block, true, false, arena);
      teacher_keys.matrix = p.teacher.keys;
    }
    const int64_t kept = smaller(kKeptRows<Product>, rows);
    tile.plan(product, rows, block, arena);
    student_scores = {nullptr, block + kLanes, 0};
    student_scores.base = arena.take(kept * student_scores.stride);
    levels = reinterpret_cast<RowLevel*>(arena.take(kept * int64_t(sizeof(RowLevel) / 4)));
    terms.plan(block, arena);
  }
};

template <class Product>
struct DistillationPass;
template <class Product>
constexpr int64_t kChunkRows<Product, DistillationPass<Product>> = kKeptRows<Product>;

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
      sound &= w.student.begin_row(Product{}, p.student, i, first + i, i < count);
      sound &= w.teacher.begin_row(Product{}, p.teacher, i, first + i, i < count);
      w.softmaxes.begin_row(p, i, first + i, i < count, start);
    }
    sound &= stream_blocks(Product{}, w.block, padded_rows, task.column_begin, task.column_end, *this, w.keys, w.teacher_keys);
    for (int64_t i = 0; i < count; ++i) end_row(i);
    return sound;
  }

  void begin_block(const Block& block) const { w.terms.pack(p.student, 0, block); }

  // The teacher's weights meet the student's scores, which are therefore kept.
  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    const Streamed& teacher = w.teacher_keys;
    const Prefetch next_teacher = after_block(Product{}, teacher, teacher.panels, block, w.block, task.column_end, round_up(count, Product::kRowMultiple));
    for (int64_t at = 0; at < rows; at += Product::kRowChunk)
      weigh_student(block, row + at, smaller(rows - at, Product::kRowChunk), kept_from(at), next);
    for (int64_t at = 0; at < rows; at += Product::kRowChunk)
      weigh_teacher(block, row + at, smaller(rows - at, Product::kRowChunk), kept_from(at), next_teacher);
  }

  struct Kept {  // of the student, from a row on
    Tile scores;
    RowLevel* levels;
  };
  Kept kept_from(int64_t at) const {
    const Tile& scores = w.student_scores;
    return {{scores.scores(at), scores.stride, 0}, w.levels + at};
  }

  void weigh_student(const Block& block, int64_t row, int64_t rows, const Kept& kept, const Prefetch& next) const {
    score(w.student, w.keys.panels, kept.scores, block, row, rows);
    weigh_rows(w.softmaxes.student, w.terms, kept.scores, p.student, first, count, block, row, rows, next,
               [&](int64_t i, const float* scores, RowLevel level) {
                 kept.levels[i - row] = level;
                 return weigh_row<Product>(scores, w.tile.weights(i - row), block.padded, level);
               });
    sum(w.student, w.softmaxes.student, block, row, rows);
  }

  void weigh_teacher(const Block& block, int64_t row, int64_t rows, const Kept& kept, const Prefetch& next) const {
    score(w.teacher, one_bank(p) ? w.keys.panels : w.teacher_keys.panels, w.tile, block, row, rows);
    weigh_rows(w.softmaxes.teacher, w.terms, w.tile, p.teacher, first, count, block, row, rows, next,
               [&](int64_t i, const float* scores, RowLevel level) {
                 const Excess excess{kept.scores.scores(i - row), kept.levels[i - row], {}};
                 return w.softmaxes.template weigh_teacher_row<Product>(p, i, scores, w.tile.weights(i - row), block.padded, level, excess);
               });
    sum(w.teacher, w.softmaxes.teacher, block, row, rows);
  }

  void score(const Side& side, const Panels& keys, const Tile& tile, const Block& block, int64_t row, int64_t rows) const {
    score_rows(Product{}, side.rows.at(row), side.rows.stride, rows, keys, block.padded, tile.scores(0), tile.stride);
  }

  // O = diag(correction) O + P K
  void sum(const Side& side, const RunningSoftmax& softmax, const Block& block, int64_t row, int64_t rows) const {
    sum_rows(Product{}, w.tile.weights(0), w.tile.stride, rows, block.columns, w.keys.panels,
             ScaleAddTile{side.pooled.at(row), side.pooled.stride, softmax.correction + row});
  }

  void end_row(int64_t i) const {
    const DistilledRow row = w.softmaxes.row(i);
    const float *const student_sums = w.student.pooled.at(i), *const teacher_sums = w.teacher.pooled.at(i);
    if (task.finish) return finish_row(p, first + i, row, student_sums, teacher_sums);
    const RunningSoftmax &student = w.softmaxes.student, &teacher = w.softmaxes.teacher;
    const int64_t out = first + i - task.row_begin;
    const float statistics[kDistillationStatistics] = {
        student.maximum[i],     student.low[i],    float(row.sum),   teacher.maximum[i], teacher.low[i],
        float(row.teacher_sum), float(row.excess), float(row.depth), float(row.covariance)};
    __builtin_memcpy(task.statistics + out * kDistillationStatistics, statistics, sizeof(statistics));
    float* const pooled = task.pooled + 2 * out * task.pooled_stride;
    __builtin_memcpy(pooled, student_sums, size_t(4 * p.student.width));
    __builtin_memcpy(pooled + task.pooled_stride, teacher_sums, size_t(4 * p.student.width));
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows and `columns` columns.
int64_t distillation_workspace(const DistillationParams& p, int64_t rows, int64_t columns) {
  return streaming_words(wider_side(p), [&](auto product) {
    Arena arena{nullptr};
    DistillationWorkspace(product, p, rows, columns, arena);
    return arena.words;
  });
}

void distillation(const DistillationParams& p, const DistillationTask& task, float* workspace) {
  with_streaming_product(wider_side(p), [&](auto product) {
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
      double own[2], others[2], to[2];
      for (int64_t side = 0; side < 2; ++side) {
        own[side] = top(s + 3 * side), others[side] = top(other + 3 * side);
        to[side] = own[side] > others[side] ? own[side] : others[side];
      }
      // Excess and depth, moved as in weigh_teacher_row, and the covariance, which a move leaves as it is. A part has it, and not the sum of
      // w^T x y, in which a float would lose its digits.
      double sums[3] = {}, mass = 0, excess_mean = 0, depth_mean = 0;
      const auto add = [&](const float* part, const double* from) {
        const double teacher_step = from[1] - to[1], step = from[0] - to[0] - (p.kl ? teacher_step : 0);
        const double correction = rescale(from[1], to[1]), all = part[5], weight = correction * all;
        if (weight == 0) return;
        const double excess = part[6] / all + step, depth = part[7] / all + teacher_step, share = weight / (mass + weight);
        sums[0] += weight * excess, sums[1] += weight * depth;
        sums[2] += correction * double(part[8]) + mass * share * (excess - excess_mean) * (depth - depth_mean);
        mass += weight, excess_mean = excess, depth_mean = depth;
      };
      add(s, own), add(other, others);
      for (int k = 0; k < 3; ++k) s[6 + k] = float(sums[k]);
      for (int64_t side = 0; side < 2; ++side) {
        float* const maximum = s + 3 * side;
        const float* const other_maximum = other + 3 * side;
        const float mine = rescale(own[side], to[side]), theirs = rescale(others[side], to[side]);
        if (others[side] > own[side]) maximum[0] = other_maximum[0], maximum[1] = other_maximum[1];
        maximum[2] = mine * maximum[2] + theirs * other_maximum[2];
        float* const o = pooled + side * t.pooled_stride;
        const float* const other_o = other_pooled + side * t.pooled_stride;
        for (int64_t d = 0; d < p.student.width; ++d) o[d] = mine * o[d] + theirs * other_o[d];
      }
    }
    finish_row(p, i, {top(s), top(s + 3), s[2], s[5], s[6], s[7], s[8]}, pooled, pooled + t.pooled_stride);
  }
}

}  // namespace
