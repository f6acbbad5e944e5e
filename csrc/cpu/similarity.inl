// Streaming softmax over a bank: log sum_j exp(z_ij) and sum_j p_ij k_j in one pass, for one instruction set.
//
// Queries are the rows, keys (and values, where these are others) the columns of stream.inl; the weights are an online softmax.
//
// Included by isa_*.cpp after the target pragma.
#pragma once

#include "stream.inl"

namespace {

using kdfast::SimilarityMerge;
using kdfast::SimilarityTask;

// The scratch of one thread.
struct SoftmaxWorkspace {
  int64_t rows, block;
  Rows queries;
  Sums pooled;
  Streamed keys, values = {};
  Tile tile;
  BlockLabels labels;
  float *maximum, *multiplier, *correction, *sum;  // per row: the running softmax
  float* bias;                                     // per column of a block

  template <class Product>
  SoftmaxWorkspace(Product product, const SimilarityParams& p, int64_t row_count, int64_t columns, Arena& arena) {
    const bool other_values = p.pooled && p.values.data != nullptr;
    rows = rows_at_once<Product>(p.width > p.pooled_width ? p.width : p.pooled_width, row_count);
    block = block_columns<Product>(columns);
    queries.plan(product, rows, p.width, arena);
    pooled.plan(p.pooled ? rows : 0, p.pooled_width, arena);
    keys.panels.plan(product, p.width, block, true, p.pooled && !other_values, arena);
    if (other_values) values.panels.plan(product, p.pooled_width, block, false, true, arena);
    tile.plan(product, rows, block, arena);
    labels.plan(block, arena);
    maximum = arena.take(rows), multiplier = arena.take(rows), correction = arena.take(rows);
    sum = arena.take(rows * kLanes);
    bias = arena.take(block);
  }
};

// ---- online softmax -------------------------------------------------------------------------------------------------

// Bias in base 2 and labels for the block's columns; columns that do not exist get bias -inf.
inline void pack_column_terms(const SoftmaxWorkspace& w, const SimilarityParams& p, int64_t batch, const Block& block) {
  for (int64_t j = 0; j < block.padded; ++j) w.bias[j] = j < block.columns ? 0.0f : -kInfinity;
  if (p.bias != nullptr)
    for (int64_t j = 0; j < block.columns; ++j) w.bias[j] = kLog2e * p.bias[batch * p.bias_batch_stride + block.first + j];
  if (p.key_labels != nullptr)
    w.labels.pack(p.key_labels + batch * p.key_labels_batch_stride + block.first, block);
}

// Replace row `at`'s scores q.k (the sign of its scale already in q) by base-2 logits, -inf at the excluded columns.
inline void mask_row(const SoftmaxWorkspace& w, const SimilarityParams& p, int64_t at, const Block& block, float* scores) {
  const bool limited = p.limit != nullptr;
  const SameTerm magnitude{splat(__builtin_fabsf(p.scale[at]))}, limit{splat(limited ? p.limit[at] : kInfinity)};
  mask_scores(w.labels, scores, block.padded, magnitude, limited, limit, ColumnTerm{w.bias}, p.query_labels != nullptr ? p.query_labels + at : nullptr);
  for (int64_t e = 0; e < p.key_indices; ++e) {
    const int64_t index = p.key_index[at * p.key_indices + e] - block.first;
    if (index >= 0 && index < block.padded) scores[index] = -kInfinity;
  }
}

inline float largest_score(const float* scores, int64_t padded) {
  Vec best0 = splat(-kInfinity), best1 = best0;
  for (int64_t j = 0; j < padded; j += 2 * kLanes) {
    best0 = larger(load(scores + j), best0);
    best1 = larger(load(scores + j + kLanes), best1);
  }
  return largest(larger(best0, best1));
}

// Weights 2^(logit - shift) of base-2 logits, factor * score; returns their sums by lane. `weights` null: only these.
template <class Product>
inline Vec weigh_row(const float* scores, float* weights, int64_t padded, float factor, float shift) {
  const Vec f = splat(factor), s = splat(-shift);
  Vec sum0 = {}, sum1 = {};
  for (int64_t j = 0; j < padded; j += 2 * kLanes) {
    const Vec p0 = exp2_nonpositive(multiply_add(load(scores + j), f, s));
    const Vec p1 = exp2_nonpositive(multiply_add(load(scores + j + kLanes), f, s));
    sum0 += p0;
    sum1 += p1;
    if (weights != nullptr) Packing<Product>::store_weights(weights, j, p0, p1);
  }
  return sum0 + sum1;
}

// ---- one rectangle ----------------------------------------------------------------------------------------------------

// sum_j e^z = sum 2^maximum; in double, where a maximum of thousands costs no digit.
inline float log_sum(float maximum, float sum) { return float(0x1.62e42fefa39efp-1 * double(maximum) + __builtin_log(double(sum))); }

// Up to rows_at_once rows, `first` .. `first + count` of the call, through the task's columns.
template <class Product>
struct SimilarityPass {
  const SimilarityParams& p;
  const SimilarityTask& task;
  SoftmaxWorkspace& w;
  const int64_t first, count;

  bool run() const {
    const int64_t padded_rows = round_up(count, Product::kRowMultiple);
    bool sound = true;
    for (int64_t i = 0; i < padded_rows; ++i) sound &= begin_row(i);
    sound &= stream_blocks(Product{}, w.block, padded_rows, task.column_begin, task.column_end, *this, w.keys, w.values);
    for (int64_t i = 0; i < count; ++i) end_row(i);
    return sound;
  }

  bool masked(const Block& block) const {
    return p.bias != nullptr || p.key_labels != nullptr || p.key_index != nullptr || p.limit != nullptr || block.columns != block.padded;
  }

  void begin_block(const Block& block) const {
    if (masked(block)) pack_column_terms(w, p, task.batch, block);
  }

  // Query, scale and start of row i; rows that only fill the last tile are zero.
  bool begin_row(int64_t i) const {
    w.maximum[i] = -kInfinity;
    w.multiplier[i] = 0;
    __builtin_memset(w.sum + i * kLanes, 0, 4 * kLanes);
    if (p.pooled) __builtin_memset(w.pooled.at(i), 0, size_t(4 * w.pooled.stride));
    if (i >= count) {
      __builtin_memset(w.queries.at(i), 0, size_t(4 * w.queries.stride));
      return true;
    }
    const float scale = p.scale[first + i];
    w.multiplier[i] = kLog2e * __builtin_fabsf(scale);
    // with the sign of the scale, so that the largest score is always the largest logit
    const bool sound = Packing<Product>::pack_row(p.query, first + i, p.width, scale < 0, w.queries.at(i));
    if (!task.start || p.start_logit[first + i] == -kInfinity) return sound;
    w.maximum[i] = kLog2e * p.start_logit[first + i];
    w.sum[i * kLanes] = 1;
    if (!p.pooled || p.start_value.data == nullptr) return sound;
    with_elements(p.start_value.from((first + i) * p.pooled_width), [&](const auto* value) {
      for (int64_t d = 0; d < p.pooled_width; d += kLanes) store(w.pooled.at(i) + d, load_row(value, d, p.pooled_width));
    });
    return sound;
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    score_rows(Product{}, w.queries.at(row), w.queries.stride, rows, w.keys.panels, block.padded, w.tile.scores(0), w.tile.stride);
    weigh(block, row, rows, next);
    if (!p.pooled) return;
    // O = diag(correction) O + P V
    const Panels& pooled = w.values.matrix.data != nullptr ? w.values.panels : w.keys.panels;
    sum_rows(Product{}, w.tile.weights(0), w.tile.stride, rows, block.columns, pooled,
             ScaleAddTile{w.pooled.at(row), w.pooled.stride, w.correction + row});
  }

  // For each row, with z the block's logits in base 2: m' = max(m, max z), weights 2^(z - m'), correction 2^(m - m'),
  // l' = correction l + sum of weights. kLanes rows together: their chains of max, shift and weight overlap.
  // A row with nothing admitted yet keeps m = -inf and is shifted by 0, so that nothing becomes inf - inf.
  void weigh(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    const int64_t padded = block.padded;
    const bool mask_rows = masked(block);
    for (int64_t begin = row; begin < row + rows; begin += kLanes) {
      const int64_t end = smaller(begin + kLanes, row + rows);
      float best[kLanes] = {}, factor[kLanes] = {}, shift[kLanes];
      for (int64_t i = begin; i < end; ++i) {
        float* const s = w.tile.scores(i - row);
        const bool mask = mask_rows && i < count;
        if (mask) mask_row(w, p, first + i, block, s);
        factor[i - begin] = mask ? 1 : w.multiplier[i];
        best[i - begin] = largest_score(s, padded);
        next.fetch(i);
      }
      const Vec before = load(w.maximum + begin), after = larger(load(factor) * load(best), before);
      const Vec finite = after == splat(-kInfinity) ? Vec{} : after;
      store(shift, finite);
      store(w.maximum + begin, after);
      store(w.correction + begin, exp2_nonpositive(before - finite));
      for (int64_t i = begin; i < end; ++i) {
        float* const weights = p.pooled ? w.tile.weights(i - row) : nullptr;
        const Vec sum = weigh_row<Product>(w.tile.scores(i - row), weights, padded, factor[i - begin], shift[i - begin]);
        float* const l = w.sum + i * kLanes;
        store(l, multiply_add(load(l), splat(w.correction[i]), sum));
      }
    }
  }

  void end_row(int64_t i) const {
    const int64_t out = first + i - (task.batch * p.rows + task.row_begin);
    const float sum = total(load(w.sum + i * kLanes));
    task.lse[out] = task.finish ? log_sum(w.maximum[i], sum) : w.maximum[i];
    if (!task.finish) task.sum[out] = sum;
    if (!p.pooled) return;
    const float weight = task.finish ? 1 / sum : 1;
    for (int64_t d = 0; d < p.pooled_width; ++d) task.pooled[out * p.pooled_width + d] = sum == 0 ? 0 : weight * w.pooled.at(i)[d];
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows and `columns` columns.
int64_t similarity_workspace(const SimilarityParams& p, int64_t rows, int64_t columns) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    SoftmaxWorkspace(product, p, rows, columns, arena);
    return arena.words;
  });
}

void similarity(const SimilarityParams& p, const SimilarityTask& task, float* workspace) {
  with_sound_product(p.precision, [&](auto product) {
    using Product = decltype(product);
    Arena arena{workspace};
    SoftmaxWorkspace w(product, p, task.row_end - task.row_begin, task.column_end - task.column_begin, arena);
    w.keys.matrix = p.keys.from(task.batch * p.keys_batch_stride);
    if (p.pooled && p.values.data != nullptr) w.values.matrix = p.values.from(task.batch * p.values_batch_stride);
    [[maybe_unused]] typename Product::Session session;
    bool sound = true;
    for (int64_t row = task.row_begin; row < task.row_end; row += w.rows)
      sound &= SimilarityPass<Product>{p, task, w, task.batch * p.rows + row, smaller(w.rows, task.row_end - row)}.run();
    return sound;
  });
}

// m = max_c m_c, l = sum_c 2^(m_c - m) l_c, O = sum_c 2^(m_c - m) O_c / l, the parts c always in the same order.
void similarity_merge(const SimilarityMerge& t) {
  for (int64_t i = 0; i < t.rows; ++i) {
    float maximum = -kInfinity;
    for (int64_t c = 0; c < t.parts; ++c) {
      const float m = t.maximum[c * t.part_stride + i];
      maximum = m > maximum ? m : maximum;
    }
    const float shift = maximum == -kInfinity ? 0 : maximum;
    float sum = 0;
    float* const out = t.pooled + i * t.width;
    for (int64_t c = 0; c < t.parts; ++c) {
      const int64_t at = c * t.part_stride + i;
      const float weight = float(__builtin_exp2(double(t.maximum[at]) - double(shift)));
      sum += weight * t.sum[at];
      if (t.partial != nullptr)
        for (int64_t d = 0; d < t.width; ++d) out[d] = (c == 0 ? 0 : out[d]) + weight * t.partial[at * t.width + d];
    }
    t.lse[i] = log_sum(maximum, sum);
    if (t.partial != nullptr)
      for (int64_t d = 0; d < t.width; ++d) out[d] = sum == 0 ? 0 : out[d] / sum;
  }
}

}  // namespace
