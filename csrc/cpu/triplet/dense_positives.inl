// The positives of the anchors, a sparse matter: exact distances, and their part of the gradient.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/symmetric.inl"
#include "triplet/dense_levels.inl"

namespace {

using kdfast::PullHinges;

struct DenseRows {
  const float *x, *y;
  int64_t width;

  explicit DenseRows(const DenseParams& p)
      : x(static_cast<const float*>(p.pairs.x.data)), y(static_cast<const float*>(p.pairs.y.data)), width(p.pairs.width) {}

  // Of row `row` to `count` <= kLanes columns from `column` on, from the rows themselves: equal rows are at distance exactly 0.
  Vec distances(Metric metric, int64_t row, int64_t column, int64_t count) const {
    alignas(64) float lanes[kLanes * kLanes] = {};
    const float* const a = x + row * width;
    for (int64_t c = 0; c < count; ++c) {
      const float* const b = y + (column + c) * width;
      Vec sum = {};
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec u = load_row(a, d, width), v = load_row(b, d, width), difference = u - v;
        sum = of_product(metric) ? multiply_add(u, v, sum) : multiply_add(difference, difference, sum);
      }
      store(lanes + c * kLanes, sum);
    }
    const Vec sums = across<Sum>(lanes);
    if (of_product(metric)) return splat(metric == Metric::kCosine ? 1.0f : 0.0f) - sums;
    const Vec square = lesser(splat(kLargestFinite), sums);
    Vec inverse;
    return metric == Metric::kEuclidean ? root(square, &inverse) : square;
  }
};

// Marks the tiles of a row and a block.
inline void mark_tiles(const DenseParams& p, uint8_t* tiles, int64_t row, const Block& block) {
  uint8_t* const of_row = tiles + row / kSlotRows * tile_columns(p);
  for (int64_t t = block.first / kTileColumns; t * kTileColumns < block.first + block.columns; ++t) of_row[t] = 1;
}

// What a gradient in a distance d is multiplied with to be the weight of x - y (or of -y).
inline float weight_factor(Metric metric, float d) {
  if (metric == Metric::kEuclidean) return d == 0 ? 0 : 1 / d;
  return metric == Metric::kSquaredEuclidean ? 2 : 1;
}

// to += factor x
inline void add_row(float* to, float factor, const float* x, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes)
    store_row(to, d, width, multiply_add(splat(factor), load_row(x, d, width), load_row(to, d, width)));
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Squared lengths of rows begin .. end of a [rows, width] matrix.
void dense_squares(const float* x, int64_t width, int64_t begin, int64_t end, float* square) {
  for (int64_t i = begin; i < end; ++i) square[i] = row_square(x + i * width, width);
}

// Distances of the positives of rows begin .. end.
void dense_positives(const DenseParams& p, int64_t begin, int64_t end) {
  const DenseRows rows(p);
  for (int64_t i = begin; i < end; ++i) {
    float farthest = -kInfinity;
    for (int64_t j = p.first[i]; j < p.last[i]; j += kLanes) {
      const int64_t count = smaller(kLanes, p.last[i] - j);
      const Vec d = rows.distances(p.metric, i, j, count);
      for (int64_t c = 0; c < count; ++c) {
        if (j + c == p.own[i]) continue;
        const int64_t k = p.number(i, j + c);
        if (k < p.count(i)) p.distance[p.slot(i, k)] = d[c];
        farthest = d[c] <= farthest ? farthest : d[c];  // NaN is farthest
      }
    }
    p.farthest[i] = farthest;
  }
}

// Hinges d_ap - level of rows begin .. end, and their part of the gradient.
void pull_hinges(const DenseParams& p, const PullHinges& h, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    double sum = 0;
    h.active[i] = 0;
    for (int64_t k = 0; k < p.count(i); ++k) {
      const float hinge = p.distance[p.slot(i, k)] - h.level[i];
      if (!(hinge <= 0)) sum += double(hinge);  // a NaN is added
      h.active[i] += hinge > 0;
    }
    h.sum[i] = float(sum);
  }
}
void pull_hinges_pull(const DenseParams& p, const float* level, const float* g, float* pull, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t k = 0; k < p.count(i); ++k) {
      const float d = p.distance[p.slot(i, k)];
      pull[p.slot(i, k)] = d > level[i] ? g[i] * weight_factor(p.metric, d) : 0;
    }
  }
}

// Adds to sums_i = sum_j W_ij y_j of rows begin .. end what makes them gradients: -(sum_j W_ij) x_i, and the positives' pull.
void dense_finish_rows(const DenseParams& p, const float* pull, const double* weight, float* sums, int64_t begin, int64_t end) {
  const DenseRows rows(p);
  for (int64_t i = begin; i < end; ++i) {
    float* const to = sums + i * rows.width;
    double own = -weight[i];
    for (int64_t k = 0; k < (p.in_batch ? p.all_positives(i) : p.count(i)); ++k) {
      const int64_t j = p.column(i, k), mutual = p.in_batch ? p.number(j, i) : 0;  // in batch i is a positive of j too
      float u = k < p.count(i) ? pull[p.slot(i, k)] : 0;
      if (p.in_batch && mutual < p.count(j)) u += pull[p.slot(j, mutual)];
      own += double(u);
      if (u != 0) add_row(to, -u, rows.y + j * rows.width, rows.width);
    }
    if (!of_product(p.metric)) add_row(to, float(own), rows.x + i * rows.width, rows.width);
  }
}

// The same for the references begin .. end, sums_j = sum_i W_ij x_i. Their weights are used up.
void dense_finish_columns(const DenseParams& p, const float* pull, double* weight, float* sums, int64_t begin, int64_t end) {
  const DenseRows rows(p);
  for (int64_t j = begin; j < end; ++j) weight[j] = -weight[j];
  for (int64_t i = 0; i < p.pairs.rows; ++i) {
    if (p.last[i] <= begin || p.first[i] >= end) continue;
    for (int64_t k = 0; k < p.count(i); ++k) {
      const int64_t j = p.column(i, k);
      const float u = pull[p.slot(i, k)];
      if (j < begin || j >= end || u == 0) continue;
      weight[j] += double(u);
      add_row(sums + j * rows.width, -u, rows.x + i * rows.width, rows.width);
    }
  }
  if (of_product(p.metric)) return;
  for (int64_t j = begin; j < end; ++j) add_row(sums + j * rows.width, float(weight[j]), rows.y + j * rows.width, rows.width);
}

}  // namespace
