// Gradients in the bank: with dz_ij = p_ij (slope_i + h_i.v_j),
//   dk_j = sum_i dz_ij s_i q_i,   db_j = sum_i dz_ij,   dv_j = sum_i p_ij h_i   (added to dk_j where the keys are the values).
//
// The roles are exchanged: keys (and values) are the rows, queries (and h) the columns of stream.inl, so a thread owns its keys' sums. Scores
// are added up in the same order as in the forward pass (Product::Swapped), so a limit drops the same pairs.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/wide.inl"

namespace {

using kdfast::SimilarityGradTask;
using kdfast::SimilarityUpstream;

struct GradWorkspace {
  int64_t rows, block;
  Rows keys, values;  // the same where the keys are the values
  Sums dkeys, dvalues;
  Streamed queries, upstream = {};
  Tile tile, h_tile;  // of q.k, and of h.v
  KnownSoftmax softmax;
  float* sum;  // per row: db by lanes

  template <class Product>
  GradWorkspace(Product product, const SimilarityParams& p, const SimilarityGradTask& t, int64_t row_count, Arena& arena) {
    const bool has_h = t.upstream.h.data != nullptr, over_keys = p.values.data == nullptr;
    rows = rows_at_once<Product>(p.width > p.pooled_width ? p.width : p.pooled_width, row_count);
    block = streamed_columns<Product>(p.rows, p.width);
    keys.plan(product, rows, spaced<Product>(p.width), arena);
    dkeys.plan(t.dkeys != nullptr ? rows : 0, spaced<Product>(p.width), arena);
    plan_streamed(product, queries, p.width, block, true, t.dkeys != nullptr, arena);
    tile.plan(product, rows, block, arena);
    softmax.plan(block, arena);
    sum = arena.take(t.dbias != nullptr ? rows * kLanes : 0);
    values = keys, dvalues = dkeys;
    if (!has_h) return;
    if (!over_keys) values.plan(product, rows, spaced<Product>(p.pooled_width), arena);
    if (!over_keys) dvalues.plan(t.dvalues != nullptr ? rows : 0, spaced<Product>(p.pooled_width), arena);
    plan_streamed(product, upstream, p.pooled_width, block, true, (over_keys ? t.dkeys : t.dvalues) != nullptr, arena);
    h_tile.plan(product, rows, block, arena);
  }
};

// Up to rows_at_once keys, `first` .. `first + count` of the batch entry, through its queries.
template <class Product>
struct KeyGradientPass {
  const SimilarityParams& p;
  const SimilarityGradTask& task;
  GradWorkspace& w;
  const int64_t first, count;

  bool has_h() const { return w.upstream.matrix.data != nullptr; }
  bool over_keys() const { return p.values.data == nullptr; }
  bool sums_values() const { return has_h() && (over_keys() ? task.dkeys : task.dvalues) != nullptr; }

  bool run() const {
    const int64_t padded_rows = round_up(count, Product::kRowMultiple);
    bool sound = true;
    for (int64_t i = 0; i < padded_rows; ++i) sound &= begin_key(i);
    sound &= stream_blocks(Product{}, w.block, padded_rows, 0, p.rows, *this, w.queries, w.upstream);
    for (int64_t i = 0; i < count; ++i) end_key(i);
    return sound;
  }

  bool begin_key(int64_t i) const {
    if (task.dbias != nullptr) __builtin_memset(w.sum + i * kLanes, 0, 4 * kLanes);
    bool sound = begin_row(w.keys, p.keys.from(task.batch * p.keys_batch_stride), p.width, i);
    if (task.dkeys != nullptr) __builtin_memset(w.dkeys.at(i), 0, size_t(4 * w.dkeys.stride));
    if (!has_h() || over_keys()) return sound;
    sound &= begin_row(w.values, p.values.from(task.batch * p.values_batch_stride), p.pooled_width, i);
    if (task.dvalues != nullptr) __builtin_memset(w.dvalues.at(i), 0, size_t(4 * w.dvalues.stride));
    return sound;
  }

  bool begin_row(const Rows& rows, const Matrix& matrix, int64_t width, int64_t i) const {
    if (i < count) return Packing<Product>::pack_row(matrix, first + i, width, false, rows.at(i));
    __builtin_memset(rows.at(i), 0, size_t(4 * rows.stride));
    return true;
  }

  void begin_block(const Block& block) const {
    w.softmax.pack(p, task.upstream.slope, task.upstream.lse, task.upstream.lse_low, task.batch, block);
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    score_rows(Product{}, w.keys.at(row), w.keys.stride, rows, w.queries.panels, block.padded, w.tile.scores(0), w.tile.stride);
    if (has_h())
      score_rows(Product{}, w.values.at(row), w.values.stride, rows, w.upstream.panels, block.padded, w.h_tile.scores(0), w.h_tile.stride);
    weigh(block, row, rows, next);
    // dK += W Q, dV += P H
    if (task.dkeys != nullptr) add_sums(w.tile, w.queries.panels, w.dkeys, block, row, rows);
    if (sums_values()) add_sums(w.h_tile, w.upstream.panels, w.dvalues, block, row, rows);
  }

  void add_sums(const Tile& weights, const Panels& columns, const Sums& sums, const Block& block, int64_t row, int64_t rows) const {
    sum_rows(Product{}, weights.weights(0), weights.stride, rows, block.columns, columns, AddTile{sums.at(row), sums.stride});
  }

  void weigh(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    const bool masked = has_terms(p);
    const int64_t end = smaller(row + rows, count);
    if (masked) w.softmax.mask_rows(p, task.batch, first, block, row, end, w.tile);
    for (int64_t i = row; i < row + rows; ++i) {
      next.fetch(i);
      if (i >= end) {  // only fills the last tile
        const size_t bytes = size_t(4 * Product::words(block.padded));
        if (task.dkeys != nullptr) __builtin_memset(w.tile.weights(i - row), 0, bytes);
        if (sums_values()) __builtin_memset(w.h_tile.weights(i - row), 0, bytes);
        continue;
      }
      // Against a query that does not exist a key that holds inf scored NaN.
      const size_t beyond = size_t(4 * (block.padded - block.columns));
      __builtin_memset(w.tile.scores(i - row) + block.columns, 0, beyond);
      if (has_h()) __builtin_memset(w.h_tile.scores(i - row) + block.columns, 0, beyond);
      if (has_h()) {
        masked ? weigh_row<true, true>(i, row, block.padded) : weigh_row<false, true>(i, row, block.padded);
      } else {
        masked ? weigh_row<true, false>(i, row, block.padded) : weigh_row<false, false>(i, row, block.padded);
      }
    }
  }

  // Weights s dz of key i's scores, or with `kLogits` of logits, and, with h, weights p; its db grows by the sum of dz.
  template <bool kLogits, bool kWithH>
  void weigh_row(int64_t i, int64_t row, int64_t padded) const {
    const KnownSoftmax softmax = w.softmax;
    const float *const scores = w.tile.scores(i - row), *const h_scores = kWithH ? w.h_tile.scores(i - row) : nullptr;
    float *const weights = w.tile.weights(i - row), *const p_weights = kWithH && sums_values() ? w.h_tile.weights(i - row) : nullptr;
    Vec sum = {};
    for (int64_t j0 = 0; j0 < padded; j0 += kPanel) {
      Vec p[kVecs];
      softmax.probabilities<kLogits>(scores, j0, p);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; v += 2) {
        const int64_t j = j0 + v * kLanes;
        const Vec p0 = p[v], p1 = p[v + 1];
        if constexpr (kWithH) {
          const Vec z0 = p0 * (load(softmax.upstream + j) + load(h_scores + j));
          const Vec z1 = p1 * (load(softmax.upstream + j + kLanes) + load(h_scores + j + kLanes));
          sum += z0 + z1;
          if (p_weights != nullptr) Packing<Product>::store_weights(p_weights, j, p0, p1);
          if (task.dkeys != nullptr)
            Packing<Product>::store_weights(weights, j, z0 * load(softmax.scale + j), z1 * load(softmax.scale + j + kLanes));
        } else {
          if (task.dbias != nullptr) sum += multiply_add(p0, load(softmax.upstream + j), p1 * load(softmax.upstream + j + kLanes));
          if (task.dkeys != nullptr)
            Packing<Product>::store_weights(weights, j, p0 * load(softmax.factor + j), p1 * load(softmax.factor + j + kLanes));
        }
      }
    }
    if (task.dbias != nullptr) store(w.sum + i * kLanes, load(w.sum + i * kLanes) + sum);
  }

  void end_key(int64_t i) const {
    const int64_t at = task.batch * p.columns + first + i;
    if (task.dbias != nullptr) task.dbias[at] = total(load(w.sum + i * kLanes));
    if (task.dkeys != nullptr) __builtin_memcpy(task.dkeys + at * p.width, w.dkeys.at(i), size_t(4 * p.width));
    if (task.dvalues != nullptr) __builtin_memcpy(task.dvalues + at * p.pooled_width, w.dvalues.at(i), size_t(4 * p.pooled_width));
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `keys` keys that want what `like` wants.
int64_t similarity_grad_workspace(const SimilarityParams& p, const SimilarityGradTask& like, int64_t keys) {
  return streaming_words(p, [&](auto product) {
    Arena arena{nullptr};
    GradWorkspace(product, p, like, keys, arena);
    return arena.words;
  });
}

void similarity_grad(const SimilarityParams& p, const SimilarityGradTask& task, float* workspace) {
  with_streaming_product(p, [&](auto product) {
    using Product = typename decltype(product)::Swapped;
    Arena arena{workspace};
    GradWorkspace w(Product{}, p, task, task.key_end - task.key_begin, arena);
    w.queries.matrix = p.query.from(task.batch * p.rows * p.width);
    if (task.upstream.h.data != nullptr) w.upstream.matrix = task.upstream.h.from(task.batch * p.rows * p.pooled_width);
    [[maybe_unused]] typename Product::Session session;
    bool sound = true;
    for (int64_t key = task.key_begin; key < task.key_end; key += w.rows)
      sound &= KeyGradientPass<Product>{p, task, w, key, smaller(w.rows, task.key_end - key)}.run();
    return sound;
  });
}

}  // namespace
