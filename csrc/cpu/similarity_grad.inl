// Gradient of lse in the bank: dk_j = sum_i g_i s_i p_ij q_i and db_j = sum_i g_i p_ij with p_ij = exp(z_ij - lse_i).
//
// The roles are exchanged: keys are the rows and queries the columns of stream.inl, so a thread owns its keys' sums. Scores
// are added up in the same order as in the forward pass (Product::Swapped), so a limit drops the same pairs.
//
// Included by isa_*.cpp after the target pragma.
#pragma once

#include "stream.inl"

namespace {

using kdfast::SimilarityGradTask;

struct GradWorkspace {
  int64_t rows, block;
  Rows keys;
  Sums dkeys;
  Streamed queries;
  Tile tile;
  BlockLabels labels;
  float* sum;                                                     // per row: db by lanes
  float *scale, *multiplier, *shift, *limit, *upstream, *factor;  // per column

  template <class Product>
  GradWorkspace(Product product, const SimilarityParams& p, int64_t row_count, int64_t columns, bool bias, Arena& arena) {
    rows = rows_at_once<Product>(p.width, row_count);
    block = block_columns<Product>(columns);
    keys.plan(product, rows, p.width, arena);
    dkeys.plan(p.pooled ? rows : 0, p.width, arena);
    queries.panels.plan(product, p.width, block, true, p.pooled, arena);
    tile.plan(product, rows, block, arena);
    labels.plan(block, arena);
    sum = arena.take(bias ? rows * kLanes : 0);
    scale = arena.take(block), multiplier = arena.take(block), shift = arena.take(block);
    limit = arena.take(block), upstream = arena.take(block), factor = arena.take(block);
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

  // What each query brings: p = 2^(multiplier score - shift) with shift = log2e lse, g p and g s p. The digits that shift has not go
  // into g. A query that admits nothing, or does not exist, has shift inf, so that p is 0.
  void begin_block(const Block& block) const {
    for (int64_t i = 0; i < block.padded; ++i) {
      const int64_t at = task.batch * p.rows + block.first + i;
      const bool exists = i < block.columns;
      const double exact = 0x1.71547652b82fep0 * double(exists ? task.lse[at] : -kInfinity);
      const float shift = float(exact), rest = float(exact - double(shift));
      const float scale = exists ? p.scale[at] : 0, upstream = exists ? task.g[at] : 0;
      w.scale[i] = scale;
      w.multiplier[i] = kLog2e * scale;
      w.shift[i] = shift == -kInfinity ? kInfinity : shift;
      w.upstream[i] = rest == rest ? upstream * (1 - 0x1.62e43p-1f * rest) : upstream;
      w.factor[i] = w.upstream[i] * scale;
      w.limit[i] = exists && p.limit != nullptr ? p.limit[at] : kInfinity;
    }
    if (p.query_labels != nullptr)
      w.labels.pack(p.query_labels + task.batch * p.rows + block.first, block);
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    score_rows(Product{}, w.keys.at(row), w.keys.stride, rows, w.queries.panels, block.padded, w.tile.scores(0), w.tile.stride);
    weigh(block, row, rows, next);
    if (!p.pooled) return;
    // dK += W Q
    sum_rows(Product{}, w.tile.weights(0), w.tile.stride, rows, block.columns, w.queries.panels, AddTile{w.dkeys.at(row), w.dkeys.stride});
  }

  void weigh(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    const bool masked = p.bias != nullptr || p.key_labels != nullptr || p.key_index != nullptr || p.limit != nullptr;
    const int64_t end = smaller(row + rows, count);
    if (masked) mask_rows(block, row, end);
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

  // Replace scores by base-2 logits, -inf where excluded.
  void mask_rows(const Block& block, int64_t row, int64_t end) const {
    for (int64_t i = row; i < end; ++i) {
      const float bias = p.bias != nullptr ? kLog2e * p.bias[task.batch * p.bias_batch_stride + first + i] : 0;
      const int64_t* const label =
          p.key_labels != nullptr ? p.key_labels + task.batch * p.key_labels_batch_stride + first + i : nullptr;
      mask_scores(w.labels, w.tile.scores(i - row), block.padded, ColumnTerm{w.scale}, p.limit != nullptr, ColumnTerm{w.limit},
                  SameTerm{splat(bias)}, label);
    }
    if (p.key_indices == 0) return;
    const int64_t* index = p.key_index + (task.batch * p.rows + block.first) * p.key_indices;
    for (int64_t column = 0; column < block.columns; ++column) {
      for (int64_t e = 0; e < p.key_indices; ++e, ++index) {
        const int64_t i = *index - first;
        if (i >= row && i < end) w.tile.scores(i - row)[column] = -kInfinity;
      }
    }
  }

  // Weights g s p of key i's scores, or with `kLogits` of base-2 logits; its db grows by the sum of g p.
  template <bool kLogits>
  void weigh_row(const float* scores, float* weights, int64_t padded, int64_t i) const {
    const auto probability = [&](int64_t j) {
      const Vec shift = load(w.shift + j), x = load(scores + j);
      return exp2_nonpositive(kLogits ? x - shift : multiply_add(x, load(w.multiplier + j), -shift));
    };
    Vec sum = {};
    for (int64_t j = 0; j < padded; j += 2 * kLanes) {
      const Vec p0 = probability(j), p1 = probability(j + kLanes);
      if (task.dbias != nullptr) sum += multiply_add(p0, load(w.upstream + j), p1 * load(w.upstream + j + kLanes));
      if (p.pooled) Packing<Product>::store_weights(weights, j, p0 * load(w.factor + j), p1 * load(w.factor + j + kLanes));
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
