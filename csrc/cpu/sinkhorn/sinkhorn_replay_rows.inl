// What a step of the unrolled gradient asks of rows of exponentials: their sums with two vectors, from costs or, once stored, by products alone; stored
// rows go to the sums of their columns, with two weights, a group later, as the solver's do.
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
  const V most = splat(Real(kLargestExponent)), least = splat(Real(kLeastExponent));
  V lanes[(kSteep ? 4 : 2) * kRows] = {}, shift[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) shift[r] = splat(u[r]);
  each_vector<Real, 1>(rows.m, [&](int64_t j, int, int64_t count) {
    const V first = load(y + j), second = load(weight + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(rows.c + (r + kRows) * rows.stride + j);  // of the rows after these
      const V given = rows.at(r, j, count, shift[r]), t = given > most ? most : given, x = exp2(t);
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

// Two sums of each of kRows stored rows, with y and with s, by lanes, while as many rows of `old` go to two sums of their columns.
template <int kRows, class Real>
inline __attribute__((always_inline)) void weigh_twice(const Real* e, const Real* y, const Real* s, int64_t m, const WeightedRows<Real>& old,
                                                       const WeightedRows<Real>& again, VecOf<Real>* with_y, VecOf<Real>* with_s) {
  using V = VecOf<Real>;
  constexpr int64_t kW = kWidth<Real>;
  V sum_y[kRows], sum_s[kRows], weight[kRows], other[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum_y[r] = sum_s[r] = V{}, weight[r] = splat(old.weight[r]), other[r] = splat(again.weight[r]);
  for (int64_t j = 0; j < m; j += kW) {
    const V first = load(y + j), second = load(s + j);
    V column = load(old.columns + j), carried = load(again.columns + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V before = load(old.e + kRows * j + r * kW), now = load(e + kRows * j + r * kW);
      column = multiply_add(before, weight[r], column);
      carried = multiply_add(before, other[r], carried);
      sum_y[r] = multiply_add(now, first, sum_y[r]);
      sum_s[r] = multiply_add(now, second, sum_s[r]);
    }
    store(old.columns + j, column);
    store(again.columns + j, carried);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) with_y[r] = sum_y[r], with_s[r] = sum_s[r];
}

// Rows begin ... end of stored exponentials K [rows, width], taken together as weigh_pair stored them, the step's E_ij being moved_i K_ij times a factor
// of the column that y and s [width] have in them. Gives h_i = sum_j E_ij y_j; x_i = damp (to_f_i - a_i h_i) / sum_j E_ij s_j; and adds x_i moved_i K_ij
// to `columns`, back_i moved_i K_ij to `carried`.
template <class Real>
struct StoredStep {
  const Real* e;
  int64_t width, m, begin, end;
  const Real *y, *s, *moved, *a, *to_f, *back;
  Real damp;
  Real *h, *x, *columns, *carried;
};

template <class Real>
void step_stored(const StoredStep<Real>& k) {
  constexpr int64_t kGroup = 16;
  Real weights[2][kGroup] = {}, others[2][kGroup] = {}, with_y[kGroup], with_s[kGroup];
  VecOf<Real> lanes_y[kGroup] = {}, lanes_s[kGroup] = {};
  const Real* before = k.e + k.begin * k.width;  // with weights 0
  int64_t waiting = 0;
  bool odd = false;
  for (int64_t i = k.begin, rows = 0; i < k.end; i += rows, odd = !odd) {
    rows = smaller(kGroup, k.end - i);
    const Real* const e = k.e + i * k.width;
    WeightedRows<Real> old{before, k.width, weights[!odd], k.columns}, again{before, k.width, others[!odd], k.carried};
    if (waiting != rows) {  // taken together otherwise, or none
      add_rows(old, waiting, k.m), add_rows(again, waiting, k.m);
      for (int64_t r = 0; r < kGroup; ++r) weights[!odd][r] = others[!odd][r] = 0;
      old.e = again.e = e;
    }
    each_rows(rows, [&](int64_t r, auto together) {
      weigh_twice<decltype(together)::value>(e + r * k.width, k.y, k.s, k.m, old.from(r), again.from(r), lanes_y + r, lanes_s + r);
    });
    sum_lanes_of(lanes_y, rows, with_y);
    sum_lanes_of(lanes_s, rows, with_s);
    for (int64_t r = 0; r < rows; ++r) {
      const Real moved = k.moved[i + r], h = moved * with_y[r], sum = moved * with_s[r];
      const Real x = sum == 0 ? Real(0) : k.damp * (k.to_f[i + r] - k.a[i + r] * h) / (sum < Real(1e-30) ? Real(1e-30) : sum);
      k.h[i + r] = h, k.x[i + r] = x;
      weights[odd][r] = x * moved, others[odd][r] = k.back[i + r] * moved;
    }
    before = e, waiting = rows;
  }
  add_rows(WeightedRows<Real>{before, k.width, weights[!odd], k.columns}, waiting, k.m);
  add_rows(WeightedRows<Real>{before, k.width, others[!odd], k.carried}, waiting, k.m);
}

}  // namespace
