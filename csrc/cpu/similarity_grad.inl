// Gradient of lse in the bank: dk_j = sum_i g_i s_i p_ij q_i and db_j = sum_i g_i p_ij with p_ij = exp(z_ij - lse_i).
//
// The roles are exchanged: keys are the rows and queries the columns of stream.inl, so a thread owns its keys' sums. Scores
// are added up in the same order as in the forward pass (Product::Swapped), so a limit drops the same pairs.
//
// Included by isa_*.cpp after the target pragma.
#pragma once

#include "softmax.inl"

namespace {

using kdfast::SimilarityGradTask;

struct GradWorkspace {
  int64_t rows, block;
  Rows keys;
  Sums dkeys;
  Streamed queries;
  Tile tile;
  KnownSoftmax softmax;
  float* sum;  // per row: db by lanes

  template <class Product>
  GradWorkspace(Product product, const SimilarityParams& p, int64_t row_count, int64_t columns, bool bias, Arena& arena) {
    rows = rows_at_once<Product>(p.width, row_count);
    block = block_columns<Product>(columns);
    keys.plan(product, rows, p.width, arena);
    dkeys.plan(p.pooled ? rows : 0, p.width, arena);
    queries.panels.plan(product, p.width, block, true, p.pooled, arena);
    tile.plan(product, rows, block, arena);
    softmax.plan(block, arena);
    sum = arena.take(bias ? rows * kLanes : 0);
  }
};

// Up to rows_at_once keys, `first` .. `first + count` of the batch entry, through its queries.
template <class Product>
struct KeyGradientPass {
  const SimilarityParams& p;
  const SimilarityGradTask& task;
  GradWorkspace& w;
  const int64_t first, count;

  bool run() const {
    const int64_t padded_rows = round_up(count, Product::kRowMultiple);
    bool sound = true;
    for (int64_t i = 0; i < padded_rows; ++i) sound &= begin_key(i);
    sound &= stream_blocks(Product{}, w.block, padded_rows, 0, p.rows, *this, w.queries);
    for (int64_t i = 0; i < count; ++i) end_key(i);
    return sound;
  }

  bool begin_key(int64_t i) const {
    if (p.pooled) __builtin_memset(w.dkeys.at(i), 0, size_t(4 * w.dkeys.stride));
    if (task.dbias != nullptr) __builtin_memset(w.sum + i * kLanes, 0, 4 * kLanes);
    if (i < count) return Packing<Product>::pack_row(p.keys.from(task.batch * p.keys_batch_stride), first + i, p.width, false, w.keys.at(i));
    __builtin_memset(w.keys.at(i), 0, size_t(4 * w.keys.stride));
    return true;
  }

  void begin_block(const Block& block) const { w.softmax.pack(p, task.g, task.lse, task.lse_low, task.batch, block); }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    score_rows(Product{}, w.keys.at(row), w.keys.stride, rows, w.queries.panels, block.padded, w.tile.scores(0), w.tile.stride);
    weigh(block, row, rows, next);
    if (!p.pooled) return;
    // dK += W Q
    sum_rows(Product{}, w.tile.weights(0), w.tile.stride, rows, block.columns, w.queries.panels, AddTile{w.dkeys.at(row), w.dkeys.stride});
  }

  void weigh(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    const bool masked = KnownSoftmax::mask(p);
    const int64_t end = smaller(row + rows, count);
    if (masked) w.softmax.mask_rows(p, task.batch, first, block, row, end, w.tile);
    for (int64_t i = row; i < row + rows; ++i) {
      next.fetch(i);
      float* const scores = w.tile.scores(i - row);
      if (i >= end) {  // only fills the last tile
        if (p.pooled) __builtin_memset(w.tile.weights(i - row), 0, size_t(4 * Product::words(block.padded)));
        continue;
      }
      // Against a query that does not exist a key that holds inf scored NaN.
      __builtin_memset(scores + block.columns, 0, size_t(4 * (block.padded - block.columns)));
      if (masked) {
        weigh_row<true>(scores, w.tile.weights(i - row), block.padded, i);
      } else {
        weigh_row<false>(scores, w.tile.weights(i - row), block.padded, i);
      }
    }
  }

  // Weights g s p of key i's scores, or with `kLogits` of base-2 logits; its db grows by the sum of g p.
  template <bool kLogits>
  void weigh_row(const float* scores, float* weights, int64_t padded, int64_t i) const {
    const KnownSoftmax softmax = w.softmax;
    Vec sum = {};
    for (int64_t j = 0; j < padded; j += 2 * kLanes) {
      const Vec p0 = softmax.probability<kLogits>(scores, j), p1 = softmax.probability<kLogits>(scores, j + kLanes);
      if (task.dbias != nullptr) sum += multiply_add(p0, load(softmax.upstream + j), p1 * load(softmax.upstream + j + kLanes));
      if (p.pooled) Packing<Product>::store_weights(weights, j, p0 * load(softmax.factor + j), p1 * load(softmax.factor + j + kLanes));
    }
    if (task.dbias != nullptr) store(w.sum + i * kLanes, load(w.sum + i * kLanes) + sum);
  }

  void end_key(int64_t i) const {
    const int64_t at = task.batch * p.columns + first + i;
    if (task.dbias != nullptr) task.dbias[at] = total(load(w.sum + i * kLanes));
    if (p.pooled) __builtin_memcpy(task.dkeys + at * p.width, w.dkeys.at(i), size_t(4 * p.width));
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `keys` keys.
int64_t similarity_grad_workspace(const SimilarityParams& p, int64_t keys, bool bias) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    GradWorkspace(product, p, keys, p.rows, bias, arena);
    return arena.words;
  });
}

void similarity_grad(const SimilarityParams& p, const SimilarityGradTask& task, float* workspace) {
  with_sound_product(p.precision, [&](auto product) {
    using Product = typename decltype(product)::Swapped;
    Arena arena{workspace};
    GradWorkspace w(Product{}, p, task.key_end - task.key_begin, p.rows, task.dbias != nullptr, arena);
    w.queries.matrix = p.query.from(task.batch * p.rows * p.width);
    [[maybe_unused]] typename Product::Session session;
    bool sound = true;
    for (int64_t key = task.key_begin; key < task.key_end; key += w.rows)
      sound &= KeyGradientPass<Product>{p, task, w, key, smaller(w.rows, task.key_end - key)}.run();
    return sound;
  });
}

}  // namespace
