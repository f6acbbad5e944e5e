// What a step of the unrolled gradient asks of rows of exponentials: their sums with two vectors.
#pragma once

#include "sinkhorn/sinkhorn_rows.inl"

namespace {

// Sums of rows of exponentials.
template <class Real>
struct RowSums {
  Real with_y[kTogether], with_weight[kTogether], steep_y[kTogether], steep_weight[kTogether];  // sum_j e_j y_j, e_j weight_j, and times log2 e_j
};

// e_rj = 2^(u_r + x_j) bounded, rows vector by vector as in WeightedRows, and their sums from `first` on; with kSteep those with exponents too.
template <int kRows, bool kSteep, class Real, class T>
inline void weigh_pair(const CostRows<Real, T>& rows, const Real* u, const Real* y, const Real* weight, Real* e, int64_t first, RowSums<Real>* sums) {
  using V = VecOf<Real>;
  const V least = splat(Real(kLeastExponent));
  V lanes[(kSteep ? 4 : 2) * kRows] = {}, shift[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) shift[r] = splat(u[r]);
  each_vector<Real, 1>(rows.m, [&](int64_t j, int, int64_t count) {
    const V first = load(y + j), second = load(weight + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(rows.c + (r + kRows) * rows.stride + j);  // of the rows after these
      const V t = at_most_largest<Real>(rows.at(r, j, count, shift[r])), x = exp2(t);
      store(e + kRows * j + r * kWidth<Real>, x);
      lanes[r] = multiply_add(x, first, lanes[r]);
      lanes[kRows + r] = multiply_add(x, second, lanes[kRows + r]);
      if constexpr (kSteep) {
        const V xt = x * larger(least, t);
        lanes[2 * kRows + r] = multiply_add(xt, first, lanes[2 * kRows + r]);
        lanes[3 * kRows + r] = multiply_add(xt, second, lanes[3 * kRows + r]);
      }
    }
  });
  Real totals[16];
  sum_lanes_of(lanes, (kSteep ? 4 : 2) * kRows, totals);
  for (int64_t r = 0; r < kRows; ++r) {
    sums->with_y[first + r] = totals[r], sums->with_weight[first + r] = totals[kRows + r];
    sums->steep_y[first + r] = kSteep ? totals[2 * kRows + r] : Real(0), sums->steep_weight[first + r] = kSteep ? totals[3 * kRows + r] : Real(0);
  }
}

}  // namespace
