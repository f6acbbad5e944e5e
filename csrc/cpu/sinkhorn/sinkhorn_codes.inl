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

constexpr int kStoredRows = 8, kStoredFar = 16;  // in one loop, however few registers there are: a row takes no more than one
constexpr int64_t kStoredFarBytes = 8 << 20;     // what a cache holds beside the scores; more is stored past it

// f(r, RowCount of how many rows from r on are taken together) over 0 ... rows.
template <int kMost, class F>
inline void each_rows_of(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + kMost <= rows; r += kMost) f(r, RowCount<kMost>{});
  each_rows(rows - r, [&](int64_t rest, auto together) { f(r + rest, together); });
}

// each_vector from the last to the first.
template <class Real, class F>
inline __attribute__((always_inline)) void each_vector_back(int64_t m, const F& f) {
  constexpr int64_t kW = kWidth<Real>;
  int64_t j = m / kW * kW;
  if (j < m) f(j, m - j);
  for (j -= kW; j >= 0; j -= kW) f(j, kW);
}

// K_rj of kRows rows of scores `apart` from one another, to rows as far apart, added to the columns. Rows from `next` on are brought into L2.
// kFar: past the caches, for which lines must begin at the same columns of all these rows.
template <int kRows, bool kFar, class Real, class T>
inline void store_exponentials(const T* from, const T* next, int64_t apart, int64_t m, Real factor, Real shift, Real* to, int64_t to_apart, Real* columns) {
  const VecOf<Real> k = splat(factor), minus = splat(-shift);
  const auto vector = [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    VecOf<Real> column = load(columns + j);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(next + r * apart + j, 0, 2);
      if constexpr (!kFar) __builtin_prefetch(to + (r + kRows) * to_apart + j, 1, 2);
      const VecOf<Real> x = exp2(multiply_add(load_count<Real>(from + r * apart + j, count), k, minus));
      if (kFar && count == kWidth<Real>) {
        store_far(to + r * to_apart + j, x);
      } else {
        store_count(to + r * to_apart + j, x, count);
      }
      column += x;
    }
    store_count(columns + j, column, count);
  };
  const int64_t head = kFar ? smaller(m, elements_to_line(to)) : 0;
  if (head > 0) vector(0, head);
  each_vector<Real, 1>(m - head, [&](int64_t j, int, int64_t count) __attribute__((always_inline)) { vector(head + j, count); });
}

// The rows after those in use, brought into L2 line by line: in order of address, half of them while rows are summed, half while they are used.
// (Into L1 took a fifth longer.)
struct RowsAhead {
  const char* at;

  template <int kRows, class V>
  inline __attribute__((always_inline)) void fetch() {
    constexpr int kLines = kRows * int(sizeof(V)) / 128;
#pragma GCC unroll 8
    for (int line = 0; line < kLines; ++line, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// factor_r = 1 / sum_j K_rj w_j, and whether all are balanced.
template <int kRows, class Real>
inline bool row_factors(const Real* e, RowsAhead& ahead, int64_t m, const Real* w, Real* factor) {
  constexpr int kChains = kRows == kStoredRows ? 1 : 2;  // of multiply-adds that wait for one another, for each row
  VecOf<Real> sum[kRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = VecOf<Real>{};
  each_vector<Real, kChains>(m, [&](int64_t j, int lane, int64_t count) __attribute__((always_inline)) {
    const VecOf<Real> weight = load(w + j);
    ahead.fetch<kRows, VecOf<Real>>();
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r][lane] = multiply_add(load_count<Real>(e + r * m + j, count), weight, sum[r][lane]);
  });
  bool balanced = true;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Real total = sum_lanes(sum[r][0] + sum[r][1]);
    balanced &= total >= Real(1 / kBalancedCodes) && total <= Real(kBalancedCodes);
    factor[r] = 1 / total;
  }
  return balanced;
}

// K_rj factor_r, added to the columns or, with kLast, times w_j in its place. The last columns come first, which are still in L1.
template <int kRows, bool kLast, class Real>
inline void use_exponentials(Real* e, RowsAhead& ahead, int64_t m, const Real* factors, const Real* w, Real* columns) {
  VecOf<Real> factor[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) factor[r] = splat(factors[r]);
  each_vector_back<Real>(m, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    const VecOf<Real> weight = kLast ? load(w + j) : VecOf<Real>{};
    VecOf<Real> column = kLast ? VecOf<Real>{} : load(columns + j);
    ahead.fetch<kRows, VecOf<Real>>();
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Real* const at = e + r * m + j;
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

// How many rows on lines begin at the same column again.
template <class Real>
inline int64_t rows_to_alike(int64_t m) {
  int64_t rows = 1;
  while (rows * m % kWidth<Real> != 0) rows *= 2;
  return rows;
}

template <bool kFar, class Real, class T>
void store_rows(const SinkhornAssign<Real>& p, Real* chunk, int64_t padded) {
  const T* const scores = static_cast<const T*>(p.scores);
  const int64_t m = p.columns, alike = kFar ? rows_to_alike<Real>(m) : 1, block = kStoredFar * alike;
  const Real k = Real(p.factor);
  for (int64_t j = m; j < padded; ++j) chunk[j] = Real(-__builtin_inf());
  const Real shift = -least_exponent(CostRows<Real, T>{scores, p.stride, chunk, -k, m});
  for (int64_t j = m; j < padded; ++j) chunk[j] = 0;
  const auto store_group = [&](int64_t i, int64_t next, int64_t apart, auto together) {
    store_exponentials<decltype(together)::value, kFar>(scores + i * p.stride, scores + next * p.stride, apart * p.stride, m, k, shift, p.codes + i * m,
                                                        apart * m, chunk);
  };
  if constexpr (!kFar) {
    each_rows_of<kStoredRows>(p.end - p.begin, [&](int64_t r, auto together) {
      constexpr int kRows = decltype(together)::value;
      store_group(p.begin + r, p.begin + r + kRows, 1, together);
      if ((r + kRows) % kChunk == 0) add_chunk(p.sums, chunk, padded);
    });
    return;
  }
  int64_t i = p.begin;
  for (; i + block <= p.end; i += block) {
    for (int64_t first = i; first < i + alike; ++first) {
      store_group(first, first + 1 < i + alike ? first + 1 : i + block, alike, RowCount<kStoredFar>{});
    }
    if ((i + block - p.begin) % kChunk < block) add_chunk(p.sums, chunk, padded);
  }
  for (; i < p.end; ++i) store_group(i, i + 1, 1, RowCount<1>{});
  store_fence();
}

// Whether every row was balanced. The rows go from the first to the last, or back: what the pass before read last is still in the caches.
template <bool kLast, class Real>
bool use_rows(const SinkhornAssign<Real>& p, Real* chunk, int64_t padded) {
  const bool back = p.end < p.begin;
  bool balanced = true;
  each_rows_of<kStoredRows>(back ? p.begin - p.end : p.end - p.begin, [&](int64_t r, auto together) {
    constexpr int kRows = decltype(together)::value;
    const int64_t m = p.columns, i = back ? p.begin - r - kRows : p.begin + r;
    Real* const e = p.codes + i * m;
    Real factor[kRows];
    RowsAhead ahead{reinterpret_cast<const char*>(back ? e - kRows * m : e + kRows * m)};
    balanced &= row_factors<kRows>(e, ahead, m, p.v, factor);
    use_exponentials<kRows, kLast>(e, ahead, m, factor, p.v, chunk);
    if (!kLast && (r + kRows) % kChunk == 0) add_chunk(p.sums, chunk, padded);
  });
  return balanced;
}

// A pass that stores exponentials (without v) or uses those stored. Of rows used, whether all were balanced goes to p.largest: 0, or NaN.
template <class Real, class T>
void assign_stored(const SinkhornAssign<Real>& p, Real* chunk) {
  const int64_t padded = round_up(p.columns, kWidth<Real>);
  bool balanced = true;
  if (p.sums == nullptr) {
    balanced = use_rows<true>(p, chunk, padded);
  } else {
    for (int64_t j = 0; j < padded; ++j) p.sums[j] = chunk[j] = 0;
    if (p.v != nullptr) {
      balanced = use_rows<false>(p, chunk, padded);
    } else {
      constexpr bool kMayBeFar = kLanes == 16;  // where a store is a line
      if (kMayBeFar && (p.end - p.begin) * p.columns * int64_t(sizeof(Real)) > kStoredFarBytes) {
        store_rows<kMayBeFar, Real, T>(p, chunk, padded);
      } else {
        store_rows<false, Real, T>(p, chunk, padded);
      }
    }
    add_chunk(p.sums, chunk, padded);
  }
  *p.largest = balanced ? Real(0) : Real(__builtin_nan(""));
}

}  // namespace
