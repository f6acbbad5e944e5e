// Products of a few rows with a matrix that is read where it lies, once: scores are inner products of rows, sums are rows times weights.
// For so few rows packing takes longer than the products, which wait for memory.
#pragma once

#include "engine/stream.inl"

namespace {

struct RowProduct : RegisterTiles<1> {
  using Swapped = RowProduct;
  static constexpr int kRowMultiple = 1;
};

template <>
struct Packing<RowProduct> : Packing<Float32Product> {
  // Rows of floats in whole vectors stay where they are. Others are widened to that, and followed by rows of zeros up to kLanes of them,
  // unless so few are left that each is multiplied by itself.
  static constexpr int64_t kAlone = 4;
  static bool pack_block(Panels& p, const Matrix& matrix, int64_t first, int64_t columns, int64_t) {
    p.in_place_rows = columns % kLanes <= kAlone ? columns : round_up(columns, kLanes);
    if (matrix.type == ElementType::kFloat32 && p.width == p.padded_width && p.in_place_rows == columns) {
      p.in_place = static_cast<const float*>(matrix.from(first * p.width).data);
      return true;
    }
    p.in_place = p.rows;
    for (int64_t j = 0; j < columns; ++j) pack_row(matrix, first + j, p.width, false, p.rows + j * p.padded_width);
    __builtin_memset(p.rows + columns * p.padded_width, 0, size_t(4 * (p.in_place_rows - columns) * p.padded_width));
    return true;
  }
};

// Inner products of `a` with kLanes rows of B, added up in as many accumulators at once.
inline Vec inner_products(const float* a, const float* b, int64_t width) {
  Vec acc[kLanes] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec x = load(a + d);
#pragma GCC unroll 16
    for (int k = 0; k < kLanes; ++k) acc[k] = multiply_add(x, load(b + k * width + d), acc[k]);
  }
  alignas(64) float rows[kLanes * kLanes], turned[kLanes * kLanes];
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; ++k) store(rows + k * kLanes, acc[k]);
  transpose(rows, kLanes, turned, kLanes);
  Vec even = load(turned), odd = load(turned + kLanes);
#pragma GCC unroll 8
  for (int k = 2; k < kLanes; k += 2) even += load(turned + k * kLanes), odd += load(turned + (k + 1) * kLanes);
  return even + odd;
}

// The same with `count` rows, fewer than kLanes, and the same bits.
inline Vec inner_products_alone(const float* a, const float* b, int64_t width, int64_t count) {
  alignas(64) float products[kLanes] = {}, lanes[kLanes];
  for (int64_t k = 0; k < count; ++k) {
    Vec acc = {};
    for (int64_t d = 0; d < width; d += kLanes) acc = multiply_add(load(a + d), load(b + k * width + d), acc);
    store(lanes, acc);
    float even = lanes[0], odd = lanes[1];
    for (int i = 2; i < kLanes; i += 2) even += lanes[i], odd += lanes[i + 1];
    products[k] = even + odd;
  }
  return load(products);
}

inline void score_rows(RowProduct, const float* a, int64_t a_stride, int64_t rows, const Panels& c, int64_t padded, float* scores,
                       int64_t score_stride) {
  for (int64_t j = 0; j < padded; j += kLanes) {
    const float* const b = c.in_place + j * c.padded_width;
    const int64_t left = c.in_place_rows - j;
    for (int64_t i = 0; i < rows; ++i) {
      const float* const row = a + i * a_stride;
      const Vec products = left >= kLanes ? inner_products(row, b, c.padded_width)
                           : left > 0     ? inner_products_alone(row, b, c.padded_width, left)
                                          : Vec{};
      store(scores + i * score_stride + j, products);
    }
  }
}

// kVectors vectors of sum_j weights_j B_j.
template <int kVectors, class Epilogue>
inline void weighted_sum(const float* weights, int64_t columns, const float* b, int64_t stride, const Epilogue& epilogue) {
  Vec acc[kVectors] = {};
  for (int64_t j = 0; j < columns; ++j, b += stride) {
    const Vec w = splat(weights[j]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[v] = multiply_add(w, load(b + v * kLanes), acc[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) epilogue(0, v, acc[v]);
}

template <class Epilogue>
inline void sum_rows(RowProduct, const float* weights, int64_t weight_stride, int64_t rows, int64_t columns, const Panels& c, Epilogue sums) {
  constexpr int kVectors = 8;  // chains enough to hide the latency of a multiply-add
  const int64_t wide = c.padded_width / (kVectors * kLanes) * (kVectors * kLanes);
  for (int64_t i = 0; i < rows; ++i, weights += weight_stride) {
    const Epilogue row = sums.from_row(i);
    for (int64_t d = 0; d < wide; d += kVectors * kLanes)
      weighted_sum<kVectors>(weights, columns, c.in_place + d, c.padded_width, row.from_column(d));
    for (int64_t d = wide; d < c.padded_width; d += kLanes)
      weighted_sum<1>(weights, columns, c.in_place + d, c.padded_width, row.from_column(d));
  }
}

}  // namespace
