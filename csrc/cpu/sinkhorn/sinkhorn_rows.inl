// Rows of exponentials 2^(u_i + X_j - k c_ij), a few at a time: weighed against their columns, and added to the column sums.
//
// What is known of a row only when it has been weighed - its weight - reaches the columns with the rows after it: the two share a
// loop, and what memory or a long chain of instructions keeps waiting of the one, arithmetic of the other fills.
#pragma once

#include "sinkhorn/sinkhorn_cost.inl"

namespace {

constexpr double kBitsPerNat = 0x1.71547652b82fep+0;
constexpr double kTrusted = 0x1p100;  // sums outside [1/this, this] are redone
constexpr double kLargestExponent = 115;  // 80 nats: pairs of zero weight exceed it
constexpr double kLeastExponent = -1e4;   // 0 times which is 0
constexpr int64_t kChunk = 128;  // rows whose columns are summed apart, for the sake of rounding
constexpr int64_t kNearBytes = 1 << 20;  // more of stored exponentials do not stay in L2: rows to come are fetched into it
constexpr int64_t kFarBytes = 4 << 20;  // results beyond this are written past the caches
constexpr int kTogether = kLanes == 16 ? 4 : 2;  // rows in one loop, as registers allow

template <class Real>
constexpr Real kLargestCost = sizeof(Real) == 4 ? Real(0x1.fffffep127) : Real(0x1.fffffffffffffp1023);  // finite

template <class Real>
inline bool trusted(Real sum) {
  return sum >= Real(1 / kTrusted) && sum <= Real(kTrusted);
}

// Sums of exponentials within this of 1, or its inverse, have exponents so small that their rounding is that of the exponential.
constexpr double kClose = 0x1p12;

template <class Real>
inline bool close(Real sum) {
  return sum >= Real(1 / kClose) && sum <= Real(kClose);
}

// 1 for sums outside [1/bound, bound], 0 elsewhere.
template <class Real>
inline VecOf<Real> doubt_of(VecOf<Real> sum, double bound = kTrusted) {
  const VecOf<Real> zero = {};
  return sum >= splat(Real(1 / bound)) && sum <= splat(Real(bound)) ? zero : zero + 1;
}

// t, or the largest exponent where that is less; NaN stays. One instruction in place of two where the compiler forms none itself.
template <class Real>
inline VecOf<Real> at_most_largest(VecOf<Real> t) {
  const VecOf<Real> most = splat(Real(kLargestExponent));
#if KDFAST_LANES == 16
  if constexpr (sizeof(Real) == 4) return (VecOf<Real>)_mm512_min_ps((__m512)most, (__m512)t);
  if constexpr (sizeof(Real) == 8) return (VecOf<Real>)_mm512_min_pd((__m512d)most, (__m512d)t);
#endif
  return t > most ? most : t;
}

template <int kCount>
struct RowCount {
  static constexpr int value = kCount;
};

// f(r, RowCount of how many rows from r on are taken together) over 0 ... rows.
template <class F>
inline void each_rows(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + kTogether <= rows; r += kTogether) f(r, RowCount<kTogether>{});
  for (; r < rows; ++r) f(r, RowCount<1>{});
}

// Rows of costs, and X with -infinity past the last column.
template <class Real, class T>
struct CostRows {
  const T* c;
  int64_t stride;
  const Real* exponent;
  Real k;
  int64_t m;

  CostRows from(int64_t row) const { return {c + row * stride, stride, exponent, k, m}; }

  // In this order u is rounded against the cost, and X only beside a result that is small wherever the entry counts.
  VecOf<Real> at(int64_t r, int64_t j, int64_t count, VecOf<Real> u) const {
    return multiply_add(load_count<Real>(c + r * stride + j, count), splat(-k), u) + load(exponent + j);
  }
};

// Rows of exponentials whose weights are known, and the column sums they go to. Rows that are taken together lie vector by vector
// - row r of kRows has its columns j ... at e[kRows j + kWidth r] - so that one pointer and one stream of memory serve them all.
template <class Real>
struct WeightedRows {
  const Real* e;
  int64_t width;  // of a row there: its columns, in whole vectors
  const Real* weight;
  Real* columns;

  WeightedRows from(int64_t row) const { return {e + row * width, width, weight + row, columns}; }
};

// From p to where store_far may begin.
template <class Real>
inline int64_t elements_to_line(const Real* p) {
  return -reinterpret_cast<intptr_t>(p) / int64_t(sizeof(Real)) & (kWidth<Real> - 1);
}

// The u that makes 1 of a row's largest exponential; 0 where there is nothing to sum.
template <class Real, class T>
inline Real least_exponent(const CostRows<Real, T>& row) {
  const VecOf<Real> none = splat(Real(-__builtin_inf()));
  VecOf<Real> most[4] = {none, none, none, none};
  each_vector<Real>(row.m, [&](int64_t j, int lane, int64_t count) { most[lane] = larger(most[lane], row.at(0, j, count, VecOf<Real>{})); });
  const Real largest = largest_lane(larger(larger(most[0], most[1]), larger(most[2], most[3])));
  return largest == Real(-__builtin_inf()) ? Real(0) : -largest;
}

// e_rj = 2^(u_r + x_j) for kRows rows, and sum_j b_j e_rj by lanes. With kAdd `old`, which may lie where e does, goes to its columns;
// with kFetch as many rows at `next` are brought into the caches.
template <int kRows, bool kAdd, bool kFetch, class Real, class T>
inline void weigh_costs(const CostRows<Real, T>& rows, const Real* u, const Real* b, Real* e, const WeightedRows<Real>& old, VecOf<Real>* sums,
                        const CostRows<Real, T>& next = {}) {
  VecOf<Real> sum[kRows][2], shift[kRows], weight[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = sum[r][1] = VecOf<Real>{};
    shift[r] = splat(u[r]), weight[r] = splat(kAdd ? old.weight[r] : Real(0));
  }
  each_vector<Real, 2>(rows.m, [&](int64_t j, int lane, int64_t count) __attribute__((always_inline)) {
    const VecOf<Real> share = load(b + j);
    VecOf<Real> column = kAdd ? load(old.columns + j) : VecOf<Real>{}, t[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) t[r] = rows.at(r, j, count, shift[r]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows && kAdd; ++r) column = multiply_add(load(old.e + kRows * j + r * kWidth<Real>), weight[r], column);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kFetch) __builtin_prefetch(next.c + r * next.stride + j);
      const VecOf<Real> x = exp2(t[r]);
      store(e + kRows * j + r * kWidth<Real>, x);
      sum[r][lane] = multiply_add(x, share, sum[r][lane]);
    }
    if constexpr (kAdd) store(old.columns + j, column);
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = sum[r][0] + sum[r][1];
}

// The same of exponentials that are stored, and any v in place of b; as many entries from `next` on are fetched into L2. Two vectors' work
// in L1 is all there is to a step, so nothing else may be: sums set to 0 as one array would live in memory, and where integers wrap around
// (-fwrapv) `j + step <= m` bounds no loop.
template <int kRows, bool kAdd, bool kFetch = false, class Real>
inline __attribute__((always_inline)) void weigh_stored(const Real* e, const Real* v, int64_t m, const WeightedRows<Real>& old, VecOf<Real>* sums,
                                                        const Real* next = nullptr) {
  VecOf<Real> sum[kRows][2], weight[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = sum[r][1] = VecOf<Real>{};
    weight[r] = splat(kAdd ? old.weight[r] : Real(0));
  }
  const auto vector = [&](int64_t j, int lane) __attribute__((always_inline)) {
    const VecOf<Real> scale = load(v + j);
    VecOf<Real> column = kAdd ? load(old.columns + j) : VecOf<Real>{};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kAdd) column = multiply_add(load(old.e + kRows * j + r * kWidth<Real>), weight[r], column);
      if constexpr (kFetch) __builtin_prefetch(next + kRows * j + r * kWidth<Real>, 0, 2);
      sum[r][lane] = multiply_add(load(e + kRows * j + r * kWidth<Real>), scale, sum[r][lane]);
    }
    if constexpr (kAdd) store(old.columns + j, column);
  };
  constexpr int64_t kW = kWidth<Real>;
  const int64_t pairs = (m + kW - 1) / kW / 2 * 2 * kW;
  int64_t j = 0;
  for (; j != pairs; j += 2 * kW) vector(j, 0), vector(j + kW, 1);
  if (j < m) vector(j, 0);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = sum[r][0] + sum[r][1];
}

// columns_j += chunk_j, which starts anew; m in whole vectors.
template <class Real>
inline void add_chunk(Real* columns, Real* chunk, int64_t m) {
  for (int64_t j = 0; j < m; j += kWidth<Real>) {
    store(columns + j, load(columns + j) + load(chunk + j));
    store(chunk + j, VecOf<Real>{});
  }
}

// columns_j += sum_r weight_r e_rj.
template <class Real>
inline void add_rows(const WeightedRows<Real>& rows, int64_t count, int64_t m) {
  each_rows(count, [&](int64_t first, auto together) {
    constexpr int kRows = decltype(together)::value;
    const WeightedRows<Real> from = rows.from(first);
    VecOf<Real> weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weight[r] = splat(from.weight[r]);
    each_vector<Real>(round_up(m, kWidth<Real>), [&](int64_t j, int, int64_t) {
      VecOf<Real> column = load(from.columns + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) column = multiply_add(load(from.e + kRows * j + r * kWidth<Real>), weight[r], column);
      store(from.columns + j, column);
    });
  });
}

// Rows whose weights are known beforehand: columns_j += sum_r weight_r e_rj, e_rj = 2^(u_r + x_j) bounded, and stored in e where that is given. With
// kMoments also sum_j b_j e_rj and sum_j b_j e_rj c_rj by lanes, where 0 times an infinite cost (a forbidden pair) is 0.
template <int kRows, bool kMoments, class Real, class T>
inline void add_costs(const CostRows<Real, T>& rows, const Real* u, const Real* b, const Real* weight, Real* e, Real* columns, VecOf<Real>* sums,
                      VecOf<Real>* costs) {
  const VecOf<Real> largest = splat(kLargestCost<Real>);
  VecOf<Real> sum[kRows], cost[kRows], shift[kRows], factor[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    sum[r] = cost[r] = VecOf<Real>{};
    shift[r] = splat(u[r]), factor[r] = splat(weight[r]);
  }
  each_vector<Real, 1>(rows.m, [&](int64_t j, int, int64_t count) {
    const VecOf<Real> share = kMoments ? load(b + j) : VecOf<Real>{};
    VecOf<Real> column = load(columns + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(rows.c + (r + kRows) * rows.stride + j);  // of the rows after these
      const VecOf<Real> x = exp2(at_most_largest<Real>(rows.at(r, j, count, shift[r])));
      column = multiply_add(x, factor[r], column);
      if (e != nullptr) store(e + kRows * j + r * kWidth<Real>, x);
      if constexpr (kMoments) {
        const VecOf<Real> mass = x * share, c = load_count<Real>(rows.c + r * rows.stride + j, count);
        sum[r] += mass;
        cost[r] = multiply_add(mass, c > largest ? largest : c, cost[r]);
      }
    }
    store(columns + j, column);
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows && kMoments; ++r) sums[r] = sum[r], costs[r] = cost[r];
}

}  // namespace
