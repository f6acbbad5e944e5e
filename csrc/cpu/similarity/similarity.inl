// Streaming softmax over a bank: log sum_j exp(z_ij) and sum_j p_ij k_j in one pass, for one instruction set.
//
// Queries are the rows, keys (and values, where these are others) the columns of stream.inl; the weights are an online softmax.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/packed_panels.inl"
#include "similarity/wide.inl"

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
  RunningSoftmax softmax;
  ColumnTerms terms;

  template <class Product>
  SoftmaxWorkspace(Product product, const SimilarityParams& p, int64_t row_count, int64_t columns, Arena& arena) {
    const bool other_values = p.pooled && p.values.data != nullptr;
    rows = rows_at_once<Product>(p.width > p.pooled_width ? p.width : p.pooled_width, row_count);
    block = streamed_columns<Product>(columns, p.width);
    queries.plan(product, rows, spaced<Product>(p.width), arena);
    pooled.plan(p.pooled ? rows : 0, spaced<Product>(p.pooled_width), arena);
    plan_streamed(product, keys, p.width, block, true, p.pooled && !other_values, arena);
    if (other_values) plan_streamed(product, values, p.pooled_width, block, false, true, arena);
    tile.plan(product, rows, block, arena);
    softmax.plan(rows, arena);
    terms.plan(block, arena);
  }
};

// ---- one rectangle ----------------------------------------------------------------------------------------------------

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

  void begin_block(const Block& block) const { w.terms.pack(p, task.batch, block); }

  // Query, scale and start of row i; rows that only fill the last tile are zero.
  bool begin_row(int64_t i) const {
    if (p.pooled) __builtin_memset(w.pooled.at(i), 0, size_t(4 * w.pooled.stride));
    if (i >= count) {
      w.softmax.begin(i, 0);
      __builtin_memset(w.queries.at(i), 0, size_t(4 * w.queries.stride));
      return true;
    }
    const float scale = p.scale[first + i];
    w.softmax.begin(i, scale);
    // with the sign of the scale, so that the largest score is always the largest logit
    const bool sound = Packing<Product>::pack_row(p.query, first + i, p.width, scale < 0, w.queries.at(i));
    const float weight = task.start ? w.softmax.start(i, p.start_logit[first + i]) : 0;
    if (weight == 0 || !p.pooled || p.start_value.data == nullptr) return sound;
    with_elements(p.start_value.from((first + i) * p.pooled_width), [&](const auto* value) {
      for (int64_t d = 0; d < p.pooled_width; d += kLanes) store(w.pooled.at(i) + d, splat(weight) * load_row(value, d, p.pooled_width));
    });
    return sound;
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    const Tile scores = p.scores != nullptr ? Tile{p.scores + (first + row) * p.scores_stride + block.first, p.scores_stride, 0} : w.tile;
    score_rows(Product{}, w.queries.at(row), w.queries.stride, rows, w.keys.panels, block.padded, scores.scores(0), scores.stride);
    weigh_rows(w.softmax, w.terms, scores, p, first, count, block, row, rows, next, [&](int64_t i, const float* of_row, RowLevel level) {
      return weigh_row<Product>(of_row, p.pooled ? w.tile.weights(i - row) : nullptr, block.padded, level);
    });
    if (!p.pooled) return;
    // O = diag(correction) O + P V
    const Panels& pooled = w.values.matrix.data != nullptr ? w.values.panels : w.keys.panels;
    sum_rows(Product{}, w.tile.weights(0), w.tile.stride, rows, block.columns, pooled,
             ScaleAddTile{w.pooled.at(row), w.pooled.stride, w.softmax.correction + row});
  }

  void end_row(int64_t i) const {
    const int64_t out = first + i - (task.batch * p.rows + task.row_begin);
    const float sum = total(load(w.softmax.sum + i * kLanes)) + total(load(w.softmax.rest + i * kLanes));
    if (task.finish) {
      store_log_sum(log_sum(w.softmax.top(i), sum), task.lse + out, task.lse_low + out);
    } else {
      task.lse[out] = w.softmax.maximum[i], task.lse_low[out] = w.softmax.low[i], task.sum[out] = sum;
    }
    if (!p.pooled) return;
    const float weight = task.finish ? 1 / sum : 1;
    for (int64_t d = 0; d < p.pooled_width; ++d) task.pooled[out * p.pooled_width + d] = sum == 0 ? 0 : weight * w.pooled.at(i)[d];
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows and `columns` columns.
int64_t similarity_workspace(const SimilarityParams& p, int64_t rows, int64_t columns) {
  return streaming_words(p, [&](auto product) {
    Arena arena{nullptr};
    SoftmaxWorkspace(product, p, rows, columns, arena);
    return arena.words;
  });
}

void similarity(const SimilarityParams& p, const SimilarityTask& task, float* workspace) {
  with_streaming_product(p, [&](auto product) {
    using Product = decltype(product);
    Arena arena{workspace};
    SoftmaxWorkspace w(product, p, task.row_end - task.row_begin, task.column_end - task.column_begin, arena);
    w.keys.matrix = p.keys.from(task.batch * p.keys_batch_stride);
    w.keys.packed = packed_panels(product, {w.keys.matrix, p.columns, p.width, 0, const_cast<int32_t*>(p.panels)});
    if (p.pooled && p.values.data != nullptr) w.values.matrix = p.values.from(task.batch * p.values_batch_stride);
    [[maybe_unused]] typename Product::Session session;
    bool sound = true;
    for (int64_t row = task.row_begin; row < task.row_end; row += w.rows)
      sound &= SimilarityPass<Product>{p, task, w, task.batch * p.rows + row, smaller(w.rows, task.row_end - row)}.run();
    return sound;
  });
}

// m = max_c m_c, l = sum_c e^(m_c - m) l_c, O = sum_c e^(m_c - m) O_c / l, the parts c always in the same order.
void similarity_merge(const SimilarityMerge& t) {
  const auto maximum_of = [&](int64_t at) { return double(t.maximum[at]) + (t.low != nullptr ? double(t.low[at]) : 0); };
  for (int64_t i = 0; i < t.rows; ++i) {
    double maximum = -double(kInfinity);
    for (int64_t c = 0; c < t.parts; ++c) {
      const double m = maximum_of(c * t.part_stride + i);
      maximum = m > maximum ? m : maximum;
    }
    const double shift = maximum == -double(kInfinity) ? 0 : maximum;
    float sum = 0;
    float* const out = t.pooled + i * t.width;
    for (int64_t c = 0; c < t.parts; ++c) {
      const int64_t at = c * t.part_stride + i;
      const float weight = float(__builtin_exp(maximum_of(at) - shift));
      sum += weight * t.sum[at];
      if (t.partial != nullptr)
        for (int64_t d = 0; d < t.width; ++d) out[d] = (c == 0 ? 0 : out[d]) + weight * t.partial[at * t.width + d];
    }
    store_log_sum(log_sum(maximum, sum), t.lse + i, t.lse_low + i);
    if (t.partial != nullptr)
      for (int64_t d = 0; d < t.width; ++d) out[d] = sum == 0 ? 0 : out[d] / sum;
  }
}

}  // namespace
