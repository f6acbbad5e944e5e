// The positives of the anchors, a sparse matter: exact distances, and their part of the gradient.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "matching/symmetric.inl"
#include "triplet/dense_levels.inl"

namespace {

using kdfast::PullHinges;

struct DenseRows {
  const float *x, *y;
  int64_t width;

  explicit DenseRows(const DenseParams& p)
      : x(static_cast<const float*>(p.pairs.x.data)), y(static_cast<const float*>(p.pairs.y.data)), width(p.pairs.width) {}

  // Of row `row` to its positives number k .. k + count, count <= kLanes, from the rows themselves: equal rows are at distance exactly 0.
  Vec distances(const DenseParams& p, int64_t row, int64_t k, int64_t count) const {
    alignas(64) float lanes[kLanes * kLanes];
    const float* const a = x + row * width;
    for (int64_t c = round_up(count, kTogether); c < kLanes; ++c) store(lanes + c * kLanes, Vec{});
    for (int64_t c = 0; c < count; c += kTogether) {
      const float* b[kTogether];
      for (int64_t i = 0; i < kTogether; ++i) b[i] = y + p.column(row, k + smaller(c + i, count - 1)) * width;
      of_product(p.metric) ? sums<true>(a, b, lanes + c * kLanes) : sums<false>(a, b, lanes + c * kLanes);
    }
    const Vec total = across<Sum>(lanes);
    if (of_product(p.metric)) return splat(p.metric == Metric::kCosine ? 1.0f : 0.0f) - total;
    const Vec square = lesser(splat(kLargestFinite), total);
    Vec inverse;
    return p.metric == Metric::kEuclidean ? root(square, &inverse) : square;
  }

 private:
  static constexpr int64_t kTogether = 4;  // columns that share the loads of the row; a divisor of kLanes

  // By lanes: a.b or ||a - b||^2 of each b.
  template <bool kProduct>
  void sums(const float* a, const float* const* b, float* to) const {
    Vec sum[kTogether] = {};
    const auto add = [&](const auto& elements) {
      const Vec u = elements(a);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kTogether; ++i) {
        const Vec v = elements(b[i]), difference = u - v;
        sum[i] = kProduct ? multiply_add(u, v, sum[i]) : multiply_add(difference, difference, sum[i]);
      }
    };
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) add([d](const float* row) { return load(row + d); });
    if (d < width) add([d, this](const float* row) { return load_partial(row + d, width - d); });
    for (int64_t i = 0; i < kTogether; ++i) store(to + i * kLanes, sum[i]);
  }
};

// Of row `row` and its positives number k .. k + count.
inline void measure_positives(const DenseParams& p, const DenseRows& rows, int64_t row, int64_t k, int64_t count) {
  if (count <= 0) return;
  alignas(64) float d[kLanes];
  store(d, rows.distances(p, row, k, count));
  float* const to = p.distance + p.slot(row, k);
  for (int64_t c = 0; c < smaller(count, p.count(row) - k); ++c) to[c << p.group_shift] = d[c];
  if (p.mirrored) return;
  float farthest = p.farthest[row];
  for (int64_t c = 0; c < count; ++c) farthest = d[c] > farthest || d[c] != d[c] ? d[c] : farthest;  // NaN is farthest
  p.farthest[row] = farthest;
}

// Of all positives of a row, which are in its slots.
inline float farthest_positive(const DenseParams& p, int64_t row) {
  const int64_t count = p.count(row);
  if (count == 0) return -kInfinity;
  const float* const distance = p.distance + p.slot(row, 0);
  Vec most = splat(-kInfinity), lost = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    Vec d = load_row(distance, k, count);
    for (int64_t c = count - k; c < kLanes; ++c) d[c] = -kInfinity;
    most = larger(d, most);
    lost += d == d ? Vec{} : d;
  }
  return total(lost) == 0 ? largest(most) : __builtin_nanf("");
}

// Marks the tiles of a row and a block.
inline void mark_tiles(const DenseParams& p, uint8_t* tiles, int64_t row, const Block& block) {
  uint8_t* const of_row = tiles + row / kSlotRows * tile_columns(p);
  for (int64_t t = block.first / kTileColumns; t * kTileColumns < block.first + block.columns; ++t) of_row[t] = 1;
}

// to += factor x
inline void add_row(float* to, float factor, const float* x, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes)
    store_row(to, d, width, multiply_add(splat(factor), load_row(x, d, width), load_row(to, d, width)));
}

// Rows that are added to one, a few at a time, so that it is seldom read and written.
struct AddedRows {
  static constexpr int kTogether = 8;

  float* to;
  int64_t width;
  int waiting;
  float factors[kTogether];
  const float* rows[kTogether];

  void add(float factor, const float* row) {
    factors[waiting] = factor, rows[waiting] = row;
    if (++waiting == kTogether) add_together();
  }
  void add_together() {
    int64_t d = 0;
    for (; waiting == kTogether && d + kLanes <= width; d += kLanes) {
      Vec sum = load(to + d);
#pragma GCC unroll 8
      for (int i = 0; i < kTogether; ++i) sum = multiply_add(splat(factors[i]), load(rows[i] + d), sum);
      store(to + d, sum);
    }
    for (int i = 0; i < waiting && d < width; ++i) add_row(to + d, factors[i], rows[i] + d, width - d);
    waiting = 0;
  }
};

// The pull of row `row` and its positives number begin .. end on each other, added to `to`; returns its sum.
inline double add_pulls(const DenseParams& p, const float* pull, const DenseRows& rows, int64_t row, int64_t begin, int64_t end, AddedRows* to) {
  const int64_t taken = p.count(row);
  double sum = 0;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t j = p.column(row, k), mutual = p.in_batch ? p.number(j, row) : 0;  // in batch the row is a positive of j too
    float u = k < taken ? pull[p.slot(row, k)] : 0;
    if (p.in_batch && mutual < p.count(j)) u += pull[p.slot(j, mutual)];
    sum += double(u);
    if (u != 0) to->add(-u, rows.y + j * rows.width);
  }
  return sum;
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Squared lengths of rows begin .. end of a [rows, width] matrix, summed in double: what a row's loses is lost alike by all its distances from products, but not
// by those of its positives.
void dense_squares(const float* x, int64_t width, int64_t begin, int64_t end, float* square) {
  for (int64_t i = begin; i < end; ++i) {
    WideVec sum = {};
    for (int64_t d = 0; d < width; d += kLanes) {
      const WideVec v = __builtin_convertvector(load_row(x + i * width, d, width), WideVec);
      sum += v * v;
    }
    double all = 0;
    for (int lane = 0; lane < kLanes; ++lane) all += sum[lane];
    square[i] = float(all);
  }
}

// Distances of the positives of rows begin .. end. A few columns stay in L1 for a group of rows, which are mostly of one class.
void dense_positives(const DenseParams& p, int64_t begin, int64_t end) {
  const DenseRows rows(p);
  for (int64_t first = begin; first < end; first += kSlotRows) {
    const int64_t last = smaller(first + kSlotRows, end);
    int64_t most = 0;
    for (int64_t i = first; i < last; ++i) {
      p.farthest[i] = -kInfinity;
      most = p.all_positives(i) > most ? p.all_positives(i) : most;
    }
    for (int64_t k = 0; k < most; k += kLanes)
      for (int64_t i = first; i < last; ++i)
        if (!p.mirrored || k + kLanes > i - p.first[i]) measure_positives(p, rows, i, k, smaller(kLanes, p.all_positives(i) - k));
  }
}

// Where positives are mirrored: those that come before a row are measured as its distance from them, and copied for rows begin .. end, a few columns
// for a group of rows at a time.
void dense_mirror(const DenseParams& p, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kSlotRows) {
    const int64_t last = smaller(first + kSlotRows, end);
    for (int64_t j = p.first[first]; j < last; j += kSlotRows) {
      for (int64_t i = first; i < last; ++i) {
        float* const to = p.distance + p.slot(i, 0) - p.first[i];
        for (int64_t c = j > p.first[i] ? j : p.first[i]; c < smaller(j + kSlotRows, i); ++c) to[c] = p.distance[p.slot(c, i - p.first[i] - 1)];
      }
    }
    for (int64_t i = first; i < last; ++i) p.farthest[i] = farthest_positive(p, i);
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
      pull[p.slot(i, k)] = d > level[i] ? g[i] * weight_factors(p.metric, splat(d))[0] : 0;
    }
  }
}

// Adds to sums_i = sum_j W_ij y_j of rows begin .. end what makes them gradients: -(sum_j W_ij) x_i, and the positives' pull (null: it is
// in the sums), of a few columns for a group of rows at a time, as above.
void dense_finish_rows(const DenseParams& p, const float* pull, const double* weight, float* sums, int64_t begin, int64_t end) {
  const DenseRows rows(p);
  for (int64_t first = begin; first < end; first += kSlotRows) {
    const int64_t count = smaller(kSlotRows, end - first);
    AddedRows to[kSlotRows];
    double own[kSlotRows];
    int64_t positives[kSlotRows], most = 0;
    for (int64_t i = 0; i < count; ++i) {
      to[i] = {sums + (first + i) * rows.width, rows.width};
      own[i] = -weight[first + i];
      positives[i] = pull == nullptr ? 0 : p.in_batch ? p.all_positives(first + i) : p.count(first + i);
      most = positives[i] > most ? positives[i] : most;
    }
    for (int64_t k = 0; k < most; k += kSlotRows)
      for (int64_t i = 0; i < count; ++i) own[i] += add_pulls(p, pull, rows, first + i, k, smaller(k + kSlotRows, positives[i]), &to[i]);
    for (int64_t i = 0; i < count; ++i) {
      if (!of_product(p.metric)) to[i].add(float(own[i]), rows.x + (first + i) * rows.width);
      to[i].add_together();
    }
  }
}

// The same for the references begin .. end, sums_j = sum_i W_ij x_i. Their weights are used up.
void dense_finish_columns(const DenseParams& p, const float* pull, double* weight, float* sums, int64_t begin, int64_t end) {
  const DenseRows rows(p);
  for (int64_t j = begin; j < end; ++j) weight[j] = -weight[j];
  for (int64_t i = 0; pull != nullptr && i < p.pairs.rows; ++i) {
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
