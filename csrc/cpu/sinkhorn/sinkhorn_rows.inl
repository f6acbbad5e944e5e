// Rows of exponentials: weighing one against its columns, adding several to the column sums.
#pragma once

#include "sinkhorn/sinkhorn_cost.inl"

namespace {

constexpr int64_t kCostAhead = 4096;  // bytes of the cost requested before they are read, at least: the processor's own prefetching stops at pages
constexpr double kBitsPerNat = 0x1.71547652b82fep+0;
constexpr double kTrusted = 0x1p100;  // sums outside [1/this, this] are redone

template <class Real>
inline bool trusted(Real sum) {
  return sum >= Real(1 / kTrusted) && sum <= Real(kTrusted);
}

// x_j = exponent_j - k c_j, one vector; -infinity past the last column, where exponents are.
template <class Real, class T>
inline VecOf<Real> exponent_at(const T* c, const Real* exponent, Real k, int64_t j, int64_t count) {
  return multiply_add(load_count<Real>(c + j, count), splat(-k), load(exponent + j));
}

// e_j = 2^(u + x_j); returns sum_j b_j e_j, by lanes: adding lanes up takes long, and is done for several rows at once.
template <class Real, class T>
inline VecOf<Real> weigh_row(const T* c, const Real* exponent, const Real* b, Real k, Real u, int64_t m, Real* e) {
  VecOf<Real> sum[4] = {};
  const VecOf<Real> shift = splat(u);
  const int64_t ahead = m * int64_t(sizeof(T)) > kCostAhead ? m * int64_t(sizeof(T)) : kCostAhead;  // a row: it may be read for its maximum first
  each_vector<Real>(m, [&](int64_t j, int lane, int64_t count) {
    __builtin_prefetch(reinterpret_cast<const char*>(c + j) + ahead);
    const VecOf<Real> x = exp2(exponent_at(c, exponent, k, j, count) + shift);
    store(e + j, x);
    sum[lane] = multiply_add(x, load(b + j), sum[lane]);
  });
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The same with u = -max_j x_j, or 0 where there is nothing to sum.
template <class Real, class T>
inline VecOf<Real> weigh_row_from_largest(const T* c, const Real* exponent, const Real* b, Real k, int64_t m, Real* e, Real* u) {
  const Real none = Real(-__builtin_inf());
  VecOf<Real> most[4] = {splat(none), splat(none), splat(none), splat(none)};
  each_vector<Real>(m, [&](int64_t j, int lane, int64_t count) { most[lane] = larger(most[lane], exponent_at(c, exponent, k, j, count)); });
  const VecOf<Real> all = larger(larger(most[0], most[1]), larger(most[2], most[3]));
  Real largest = none;
  for (int64_t lane = 0; lane < kWidth<Real>; ++lane) largest = all[lane] > largest ? all[lane] : largest;
  *u = largest == none ? Real(0) : -largest;
  return weigh_row(c, exponent, b, k, *u, m, e);
}

// sum_j b_j e_j c_j, where 0 times an infinite cost (a forbidden pair) is 0.
template <class Real, class T>
inline Real weigh_cost(const T* c, const Real* b, const Real* e, int64_t m) {
  VecOf<Real> sum[4] = {};
  each_vector<Real>(m, [&](int64_t j, int lane, int64_t count) {
    const VecOf<Real> x = load(e + j) * load(b + j);
    sum[lane] += x == 0 ? x : x * load_count<Real>(c + j, count);
  });
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// sum_j e_rj v_j for kRows rows, by lanes.
template <int kRows, class Real>
inline void weigh_stored(const Real* e, int64_t stride, const Real* v, int64_t m, VecOf<Real>* sums) {
  VecOf<Real> sum[kRows][4] = {};
  each_vector<Real>(round_up(m, kWidth<Real>), [&](int64_t j, int lane, int64_t) {
    const VecOf<Real> scale = load(v + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(e + (r + kRows) * stride + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum[r][lane] = multiply_add(load(e + r * stride + j), scale, sum[r][lane]);
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = (sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]);
}

// columns_j += sum_r weight_r e_rj for kRows rows.
template <int kRows, class Real>
inline void add_stored(const Real* e, int64_t stride, const Real* weight, int64_t m, Real* columns) {
  VecOf<Real> w[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) w[r] = splat(weight[r]);
  each_vector<Real>(round_up(m, kWidth<Real>), [&](int64_t j, int, int64_t) {
    VecOf<Real> sum = load(columns + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sum = multiply_add(load(e + r * stride + j), w[r], sum);
    store(columns + j, sum);
  });
}

template <class Real>
inline void weigh_all(const Real* e, int64_t stride, int64_t rows, const Real* v, int64_t m, VecOf<Real>* sums) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) weigh_stored<4>(e + r * stride, stride, v, m, sums + r);
  for (; r < rows; ++r) weigh_stored<1>(e + r * stride, stride, v, m, sums + r);
}

template <class Real>
inline void add_all(const Real* e, int64_t stride, int64_t rows, const Real* weight, int64_t m, Real* columns) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) add_stored<4>(e + r * stride, stride, weight + r, m, columns);
  for (; r < rows; ++r) add_stored<1>(e + r * stride, stride, weight + r, m, columns);
}

}  // namespace
