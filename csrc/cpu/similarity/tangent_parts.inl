// What passes along a direction share: the logits' rates, and weights collected transposed for several groups of rows at once.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/pairs.inl"

namespace {

// Panels of all groups of rows whose transposed weights make one product.
struct GroupPanels {
  Panels first;
  float* others;  // `rows` alone
  int64_t group, words;

  template <class Product>
  void plan(Product product, int64_t width, int64_t rows, int64_t group_rows, Arena& arena) {
    group = group_rows;
    first.plan(product, width, group, false, true, arena);
    words = first.block_words * first.padded_width;
    others = arena.take(((rows + group - 1) / group - 1) * words);
  }
  Panels at(int64_t row) const {
    Panels panels = first;
    if (row >= group) panels.rows = others + (row / group - 1) * words;
    return panels;
  }
  template <class Product>
  void pack(Product, const Matrix& matrix, int64_t begin, int64_t count) const {
    for (int64_t row = 0; row < count; row += group) {
      const int64_t rows = smaller(group, count - row);
      Packing<Product>::pack_block(at(row), matrix, begin + row, rows, round_up(rows, 2 * kLanes));
    }
  }
};

// Weights of a group of rows, by columns.
struct TransposedWeights {
  float* words;
  int64_t stride, count;

  template <class Product>
  void plan(Product, int64_t columns, int64_t group, Arena& arena) {
    stride = Product::words(group) + kLanes;
    count = columns * stride;
    words = arena.take(count);
  }
  float* at(int64_t column) const { return words + column * stride; }
  // Rows that only fill the last tile are never written.
  void clear() const { __builtin_memset(words, 0, size_t(4 * count)); }
};

// Z = s Q kappa^T + E K^T of `rows` rows, packed from `queries` and `direction` on; kappa not given: 0. `multiplier`: |s| of each row.
template <class Product>
inline void rate_rows(Product product, const float* queries, int64_t queries_stride, const float* direction, int64_t direction_stride,
                      int64_t rows, const float* multiplier, const Streamed& keys, const Streamed& keys_direction, int64_t padded,
                      const Tile& rates) {
  float* const to = rates.scores(0);
  if (keys_direction.matrix.data == nullptr)
    return score_rows(product, direction, direction_stride, rows, keys.panels, padded, to, rates.stride);
  score_rows(product, queries, queries_stride, rows, keys_direction.panels, padded, to, rates.stride);
  const int64_t steps = Product::steps(keys.panels.width);
  for (int64_t j = 0; j < padded; j += kPanel) {
    for (int64_t k = 0; k < steps; k += Product::kStepChunk) {
      const float *const a = direction + k, *const b = keys.panels.columns + j * keys.panels.row_words + k * kPanel;
      const int64_t n = smaller(steps - k, Product::kStepChunk);
      if (k == 0) {
        multiply_panel(product, a, direction_stride, rows, b, n, kVecs, ScaleAddTile{to + j, rates.stride, multiplier});
      } else {
        multiply_panel(product, a, direction_stride, rows, b, n, kVecs, AddTile{to + j, rates.stride});
      }
    }
  }
}

// Transposed weights of `rows` rows times these rows, whose panels are given, added to the sums of a block's columns.
template <class Product>
inline void sum_for_keys(Product product, const Block& block, const TransposedWeights& weights, int64_t rows, const Panels& panels,
                         const Sums& sums) {
  const int64_t columns = round_up(block.columns, Product::kRowMultiple);
  for (int64_t j = 0; j < columns; j += kPairChunk<Product>) {
    const int64_t some = smaller(kPairChunk<Product>, columns - j);
    sum_rows(product, weights.at(j), weights.stride, some, rows, panels, AddTile{sums.at(j), sums.stride});
  }
}

}  // namespace
