// Gradient in the queries: sum_j dz_ij k_j with dz_ij = p_ij (slope_i + h_i.v_j), where the forward pass has not left it.
//
// Queries (and h) are the rows, keys (and values) the columns of stream.inl. Where the keys are the values, one packed block serves both
// products of scores, q.k and h.k, and the sum.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/wide.inl"

namespace {

using kdfast::SimilarityGradRowsTask;

struct GradRowsWorkspace {
  int64_t rows, block;
  Rows queries, upstream;
  Sums sums;
  Streamed keys, values = {};
  Tile tile, h_tile;  // of q.k, and of h.v
  ColumnTerms terms;
  float *multiplier, *high, *low;  // per row
  float *mass, *total, *rests;     // per row, by lanes; rests: of both, as grow has them

  template <class Product>
  GradRowsWorkspace(Product product, const SimilarityParams& p, const SimilarityGradRowsTask& t, int64_t row_count, int64_t columns,
                    Arena& arena) {
    const bool has_h = t.upstream.h.data != nullptr, other_values = p.values.data != nullptr;
    rows = rows_at_once<Product>(p.width > p.pooled_width ? p.width : p.pooled_width, row_count);
    block = streamed_columns<Product>(columns, p.width);
    queries.plan(product, rows, spaced<Product>(p.width), arena);
    sums.plan(rows, spaced<Product>(p.width), arena);
    plan_streamed(product, keys, p.width, block, true, true, arena);
    tile.plan(product, rows, block, arena);
    terms.plan(block, arena);
    multiplier = arena.take(rows), high = arena.take(rows), low = arena.take(rows);
    mass = arena.take(rows * kLanes), total = arena.take(rows * kLanes), rests = arena.take(2 * rows * kLanes);
    if (!has_h) return;
    upstream.plan(product, rows, spaced<Product>(p.pooled_width), arena);
    if (other_values) plan_streamed(product, values, p.pooled_width, block, true, false, arena);
    h_tile.plan(product, rows, block, arena);
  }
};

// Up to rows_at_once rows, `first` .. `first + count` of the call, through the task's columns.
template <class Product>
struct RowGradientPass {
  const SimilarityParams& p;
  const SimilarityGradRowsTask& task;
  GradRowsWorkspace& w;
  const int64_t first, count;

  bool has_h() const { return task.upstream.h.data != nullptr; }

  bool run() const {
    const int64_t padded_rows = round_up(count, Product::kRowMultiple);
    bool sound = true;
    for (int64_t i = 0; i < padded_rows; ++i) sound &= begin_row(i);
    sound &= stream_blocks(Product{}, w.block, padded_rows, task.column_begin, task.column_end, *this, w.keys, w.values);
    for (int64_t i = 0; i < count; ++i) end_row(i);
    return sound;
  }

  // Rows that only fill the last tile are zero, and have p = 0.
  bool begin_row(int64_t i) const {
    __builtin_memset(w.sums.at(i), 0, size_t(4 * w.sums.stride));
    __builtin_memset(w.mass + i * kLanes, 0, 4 * kLanes);
    __builtin_memset(w.total + i * kLanes, 0, 4 * kLanes);
    __builtin_memset(rests(i), 0, 2 * 4 * kLanes);
    if (i >= count) {
      w.multiplier[i] = 0, w.high[i] = kInfinity, w.low[i] = 0;
      __builtin_memset(w.queries.at(i), 0, size_t(4 * w.queries.stride));
      if (has_h()) __builtin_memset(w.upstream.at(i), 0, size_t(4 * w.upstream.stride));
      return true;
    }
    const SimilarityUpstream& u = task.upstream;
    const float scale = p.scale[first + i];
    w.multiplier[i] = __builtin_fabsf(scale);
    w.high[i] = above_nothing(u.lse[first + i]), w.low[i] = u.lse_low != nullptr ? u.lse_low[first + i] : 0;
    bool sound = Packing<Product>::pack_row(p.query, first + i, p.width, scale < 0, w.queries.at(i));  // as in the forward pass
    if (has_h()) sound &= Packing<Product>::pack_row(u.h, first + i, p.pooled_width, false, w.upstream.at(i));
    return sound;
  }

  void begin_block(const Block& block) const { w.terms.pack(p, task.batch, block); }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    score_rows(Product{}, w.queries.at(row), w.queries.stride, rows, w.keys.panels, block.padded, w.tile.scores(0), w.tile.stride);
    if (has_h()) {
      const Panels& values = w.values.matrix.data != nullptr ? w.values.panels : w.keys.panels;
      score_rows(Product{}, w.upstream.at(row), w.upstream.stride, rows, values, block.padded, w.h_tile.scores(0), w.h_tile.stride);
    }
    for (int64_t i = row; i < row + rows; ++i) {
      next.fetch(i);
      const bool exists = i < count;
      const float factor = exists ? w.terms.exclude(p, first + i, block, w.tile.scores(i - row), w.multiplier[i]) : 0;
      const float slope = exists ? task.upstream.slope[first + i] : 0;
      has_h() ? weigh_row<true>(i, row, block.padded, factor, slope) : weigh_row<false>(i, row, block.padded, factor, slope);
    }
    // dZ K
    sum_rows(Product{}, w.tile.weights(0), w.tile.stride, rows, block.columns, w.keys.panels, AddTile{w.sums.at(row), w.sums.stride});
  }

  // Weights p (slope + h.v) of the logits factor * score.
  template <bool kWithH>
  void weigh_row(int64_t i, int64_t row, int64_t padded, float factor, float slope) const {
    const float *const scores = w.tile.scores(i - row), *const h_scores = kWithH ? w.h_tile.scores(i - row) : nullptr;
    float* const weights = w.tile.weights(i - row);
    const RowLevel level{factor, w.high[i], w.low[i]};
    const Vec constant = splat(slope);
    Vec mass = {}, sum = {};
    for (int64_t j0 = 0; j0 < padded; j0 += kPanel) {
      Vec p[kVecs];
      level.exponents_of(scores + j0, p);
      exp_nonpositive(p, p);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; v += 2) {
        const int64_t j = j0 + v * kLanes;
        const Vec z0 = p[v] * (kWithH ? constant + load(h_scores + j) : constant);
        const Vec z1 = p[v + 1] * (kWithH ? constant + load(h_scores + j + kLanes) : constant);
        mass += p[v] + p[v + 1];
        sum += z0 + z1;
        Packing<Product>::store_weights(weights, j, z0, z1);
      }
    }
    grow(w.mass + i * kLanes, rests(i), splat(1), mass);
    grow(w.total + i * kLanes, rests(i) + kLanes, splat(1), sum);
  }

  float* rests(int64_t i) const { return w.rests + 2 * i * kLanes; }

  void end_row(int64_t i) const {
    const int64_t out = first + i - (task.batch * p.rows + task.row_begin);
    task.mass[out] = total(load(w.mass + i * kLanes)) + total(load(rests(i)));
    task.total[out] = total(load(w.total + i * kLanes)) + total(load(rests(i) + kLanes));
    __builtin_memcpy(task.rows + out * p.width, w.sums.at(i), size_t(4 * p.width));
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows and `columns` columns, with or without h as `like`.
int64_t similarity_grad_rows_workspace(const SimilarityParams& p, const SimilarityGradRowsTask& like, int64_t rows, int64_t columns) {
  return streaming_words(p, [&](auto product) {
    Arena arena{nullptr};
    GradRowsWorkspace(product, p, like, rows, columns, arena);
    return arena.words;
  });
}

void similarity_grad_rows(const SimilarityParams& p, const SimilarityGradRowsTask& task, float* workspace) {
  with_streaming_product(p, [&](auto product) {
    using Product = decltype(product);
    Arena arena{workspace};
    GradRowsWorkspace w(product, p, task, task.row_end - task.row_begin, task.column_end - task.column_begin, arena);
    w.keys.matrix = p.keys.from(task.batch * p.keys_batch_stride);
    if (task.upstream.h.data != nullptr && p.values.data != nullptr) w.values.matrix = p.values.from(task.batch * p.values_batch_stride);
    [[maybe_unused]] typename Product::Session session;
    bool sound = true;
    for (int64_t row = task.row_begin; row < task.row_end; row += w.rows)
      sound &= RowGradientPass<Product>{p, task, w, task.batch * p.rows + row, smaller(w.rows, task.row_end - row)}.run();
    return sound;
  });
}

}  // namespace
