// Assignments from exponentials that are stored where the codes will be: one exponential an entry, however many iterations.
//
// K_ij = 2^(k s_ij - shift), one shift for all. With column factors w rows' sums are r_i = sum_j K_ij w_j, the next factors of n x m codes
// w_j = n / (m sum_i K_ij / r_i), and the codes K_ij w_j / r_i. It serves where these sums stay within 2^30 of 1: what underflows is less than
// 2^-50 of its row then, and exponents of entries that count are no larger, and rounded no worse, than scores that lie so far apart.
#pragma once

#include "sinkhorn/sinkhorn_rows.inl"

namespace {

using kdfast::kBalancedCodes;
using kdfast::SinkhornAssign;

// K_rj of rows r < kRows of scores, stored and added to the columns.
template <int kRows, class Real, class T>
inline void store_exponentials(const T* from, int64_t stride, int64_t m, Real factor, Real shift, Real* to, Real* columns) {
  const VecOf<Real> k = splat(factor), minus = splat(-shift);
  each_vector<Real, 1>(m, [&](int64_t j, int, int64_t count) {
    VecOf<Real> column = load(columns + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(from + (r + kRows) * stride + j, 0, 2);
      __builtin_prefetch(to + (r + kRows) * m + j, 1, 2);
      const VecOf<Real> x = exp2(multiply_add(load_count<Real>(from + r * stride + j, count), k, minus));
      store_count(to + r * m + j, x, count);
      column += x;
    }
    store(columns + j, column);
  });
}

// factor_r = 1 / sum_j K_rj w_j, and whether all are balanced. Of the rows after these, half are brought into L2 here, half when these are used:
// into L1 took a fifth longer.
template <int kRows, class Real>
inline bool row_factors(const Real* e, int64_t m, const Real* w, Real* factor) {
  VecOf<Real> sum[kRows][2];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = VecOf<Real>{};
  each_vector<Real, 2>(m, [&](int64_t j, int lane, int64_t count) {
    const VecOf<Real> weight = load(w + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      if (r < kRows / 2) __builtin_prefetch(e + (r + kRows) * m + j, 0, 2);
      sum[r][lane] = multiply_add(load_count<Real>(e + r * m + j, count), weight, sum[r][lane]);
    }
  });
  bool balanced = true;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Real total = sum_lanes(sum[r][0] + sum[r][1]);
    balanced &= total >= Real(1 / kBalancedCodes) && total <= Real(kBalancedCodes);
    factor[r] = 1 / total;
  }
  return balanced;
}

// K_rj factor_r, added to the columns or, with kLast, times w_j in its place.
template <int kRows, bool kLast, class Real>
inline void use_exponentials(Real* e, int64_t m, const Real* factors, const Real* w, Real* columns) {
  VecOf<Real> factor[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) factor[r] = splat(factors[r]);
  each_vector<Real, 1>(m, [&](int64_t j, int, int64_t count) {
    const VecOf<Real> weight = kLast ? load(w + j) : VecOf<Real>{};
    VecOf<Real> column = kLast ? VecOf<Real>{} : load(columns + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Real* const at = e + r * m + j;
      if (r >= kRows / 2) __builtin_prefetch(at + kRows * m, 0, 2);
      const VecOf<Real> x = load_count<Real>(at, count);
      if constexpr (kLast) {
        store_count(at, x * weight * factor[r], count);
      } else {
        column = multiply_add(x, factor[r], column);
      }
    }
    if constexpr (!kLast) store(columns + j, column);
  });
}

template <class Real, class T>
void store_rows(const SinkhornAssign<Real>& p, Real* chunk, int64_t padded) {
  const T* const scores = static_cast<const T*>(p.scores);
  const Real k = Real(p.factor);
  for (int64_t j = p.columns; j < padded; ++j) chunk[j] = Real(-__builtin_inf());
  const Real shift = -least_exponent(CostRows<Real, T>{scores, p.stride, chunk, -k, p.columns});
  for (int64_t j = p.columns; j < padded; ++j) chunk[j] = 0;
  each_rows(p.end - p.begin, [&](int64_t r, auto together) {
    constexpr int kRows = decltype(together)::value;
    const int64_t i = p.begin + r;
    store_exponentials<kRows>(scores + i * p.stride, p.stride, p.columns, k, shift, p.codes + i * p.columns, chunk);
    if ((r + kRows) % kChunk == 0) add_chunk(p.sums, chunk, padded);
  });
}

// Whether every row was balanced.
template <bool kLast, class Real>
bool use_rows(const SinkhornAssign<Real>& p, Real* chunk, int64_t padded) {
  bool balanced = true;
  each_rows(p.end - p.begin, [&](int64_t r, auto together) {
    constexpr int kRows = decltype(together)::value;
    Real* const e = p.codes + (p.begin + r) * p.columns;
    Real factor[kRows];
    balanced &= row_factors<kRows>(e, p.columns, p.v, factor);
    use_exponentials<kRows, kLast>(e, p.columns, factor, p.v, chunk);
    if (!kLast && (r + kRows) % kChunk == 0) add_chunk(p.sums, chunk, padded);
  });
  return balanced;
}

// A pass that stores exponentials (without v) or uses those stored. Where a row is not balanced the first sum is NaN. The last pass need not
// look: its rows' sums are at least an m-th of those before, and at most n times as much.
template <class Real, class T>
void assign_stored(const SinkhornAssign<Real>& p, Real* chunk) {
  const int64_t padded = round_up(p.columns, kWidth<Real>);
  if (p.sums == nullptr) {
    use_rows<true>(p, chunk, padded);
    return;
  }
  for (int64_t j = 0; j < padded; ++j) p.sums[j] = chunk[j] = 0;
  bool balanced = true;
  if (p.v == nullptr) {
    store_rows<Real, T>(p, chunk, padded);
  } else {
    balanced = use_rows<false>(p, chunk, padded);
  }
  add_chunk(p.sums, chunk, padded);
  if (!balanced) p.sums[0] = Real(__builtin_nan(""));
}

}  // namespace
