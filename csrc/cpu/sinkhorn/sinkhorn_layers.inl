// Balanced assignments, one pass over the scores at a time, and doubly stochastic normalisation of many small matrices.
#pragma once

#include "sinkhorn/sinkhorn_codes.inl"

namespace {

using kdfast::SinkhornNormalize;

// ---- assignments: rows are softmax(s / epsilon + v) ----------------------------------------------------------------------

template <class Real>
int64_t sinkhorn_assign_workspace(const SinkhornAssign<Real>& p) {
  return (3 + kTogether) * round_up(p.columns, kWidth<Real>);
}

// Largest and sum_n 2^(k s_nj - largest) of each column over rows first ... end: a group of rows moves the maximum once. Or, with kFixed, the
// sum of 2^(k s_nj - largest) for the largest at hand.
template <bool kFixed, class Real, class T>
void assign_chunk(const SinkhornAssign<Real>& p, const T* scores, int64_t first, int64_t end, Real* largest, Real* sums) {
  using V = VecOf<Real>;
  const V k = splat(Real(p.factor));
  each_rows(end - first, [&](int64_t i, auto together) {
    constexpr int kRows = decltype(together)::value;
    const T* const from = scores + (first + i) * p.stride;
    each_vector<Real>(p.columns, [&](int64_t j, int, int64_t count) {
      V x[kRows], most = load(largest + j), sum = load(sums + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        __builtin_prefetch(from + (r + kRows) * p.stride + j);
        x[r] = load_count<Real>(from + r * p.stride + j, count);
      }
      if constexpr (!kFixed) {
        const V before = most;
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) most = larger(most, x[r] * k);
        sum *= exp2(before - most);
        store(largest + j, most);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum += exp2(multiply_add(x[r], k, -most));
      store(sums + j, sum);
    });
  });
}

// Each chunk takes the largest of those before, and vectors of columns find their own where a sum is not close to 1.
template <class Real, class T>
void assign_columns(const SinkhornAssign<Real>& p, const T* scores, Real* work) {
  const int64_t padded = round_up(p.columns, kWidth<Real>);
  Real *const total = work, *const largest = work + padded;
  for (int64_t j = 0; j < padded; ++j) p.largest[j] = Real(-1e30), total[j] = p.sums[j] = 0;
  for (int64_t i = p.begin; i < p.end; i += kChunk) {
    const int64_t end = smaller(i + kChunk, p.end);
    for (int64_t j = 0; j < padded; ++j) largest[j] = p.largest[j], p.sums[j] = 0;
    if (i == p.begin) {
      assign_chunk<false>(p, scores, i, end, largest, p.sums);
    } else {
      assign_chunk<true>(p, scores, i, end, largest, p.sums);
      for (int64_t j = 0; j < p.columns; j += kWidth<Real>) {
        SinkhornAssign<Real> few = p;
        few.columns = smaller(kWidth<Real>, p.columns - j);
        bool known = true;
        for (int64_t lane = j; lane < j + few.columns; ++lane) known &= close(p.sums[lane]);
        if (known) continue;
        store(p.sums + j, VecOf<Real>{});
        assign_chunk<false>(few, scores + j, i, end, largest + j, p.sums + j);
      }
    }
    for (int64_t j = 0; j < padded; j += kWidth<Real>) {
      const VecOf<Real> most = load(largest + j);
      store(total + j, multiply_add(load(total + j), exp2(load(p.largest + j) - most), load(p.sums + j)));
      store(p.largest + j, most);
    }
  }
  __builtin_memcpy(p.sums, total, size_t(padded) * sizeof(Real));
}

// to_j = weight e_j; `far`: past the caches, which would first read the lines to be written.
template <class Real>
inline void scale_row(const Real* e, Real weight, int64_t m, bool far, Real* to) {
  const VecOf<Real> scale = splat(weight);
  const int64_t head = far ? smaller(m, elements_to_line(to)) : 0;
  if (head > 0) store_count(to, load(e) * scale, head);
  each_vector<Real>(m - head, [&](int64_t j, int, int64_t count) {
    const VecOf<Real> x = load(e + head + j) * scale;
    if (far && count == kWidth<Real>) {
      store_far(to + head + j, x);
    } else {
      store_count(to + head + j, x, count);
    }
  });
}

// Weighs kRows rows at exponents u, which the first of those before them had: where a sum is not close to 1, again at the largest of its own
// row. Returns what the rows that follow may start from.
template <int kRows, bool kAdd, class Real, class T>
inline Real weigh_alike(const CostRows<Real, T>& rows, Real u, const Real* ones, Real* entries, const WeightedRows<Real>& old, const CostRows<Real, T>& next,
                        Real* weights) {
  VecOf<Real> lanes[kRows];
  Real used[kRows], sum[kRows];
  for (int r = 0; r < kRows; ++r) used[r] = u;
  weigh_costs<kRows, kAdd, true>(rows, used, ones, entries, old, lanes, next);
  bool again = false;
  for (int r = 0; r < kRows; ++r) {
    sum[r] = sum_lanes(lanes[r]);
    if (close(sum[r])) continue;
    used[r] = least_exponent(rows.from(r));
    again = true;
  }
  if (again) {
    weigh_costs<kRows, false, false>(rows, used, ones, entries, old, lanes);
    for (int r = 0; r < kRows; ++r) sum[r] = sum_lanes(lanes[r]);
  }
  for (int r = 0; r < kRows; ++r) weights[r] = 1 / sum[r];
  return used[0] - log2<Real>(splat(sum[0]))[0];
}

// Rows added to the column sums.
template <class Real, class T>
void assign_sums(const SinkhornAssign<Real>& p, const CostRows<Real, T>& rows, const Real* ones, int64_t padded, Real* entries) {
  Real weights[kTogether] = {}, u = 0;
  Real* const chunk = entries + kTogether * padded;
  const WeightedRows<Real> old{entries, padded, weights, chunk};
  for (int64_t j = 0; j < padded; ++j) p.sums[j] = chunk[j] = 0;
  for (int64_t j = 0; j < kTogether * padded; ++j) entries[j] = 0;
  int64_t i = p.begin;
  for (; i + kTogether <= p.end; i += kTogether) {
    u = weigh_alike<kTogether, true>(rows.from(i), u, ones, entries, old, rows.from(smaller(i + kTogether, p.end - kTogether)), weights);
    if ((i - p.begin) % kChunk == 0) add_chunk(p.sums, chunk, padded);
  }
  add_rows(old, kTogether, p.columns);
  for (; i < p.end; ++i) {
    u = weigh_alike<1, false>(rows.from(i), u, ones, entries, old, rows.from(i), weights);
    add_rows(old, 1, p.columns);
  }
  add_chunk(p.sums, chunk, padded);
}

// Rows written as codes.
template <class Real, class T>
void assign_codes(const SinkhornAssign<Real>& p, const CostRows<Real, T>& rows, const Real* ones, Real* entries) {
  const bool far = (p.end - p.begin) * p.columns * int64_t(sizeof(Real)) > kFarBytes;
  Real u = 0, weight = 0;
  for (int64_t i = p.begin; i < p.end; ++i) {
    u = weigh_alike<1, false>(rows.from(i), u, ones, entries, WeightedRows<Real>{}, rows.from(smaller(i + 1, p.end - 1)), &weight);
    scale_row(entries, weight, p.columns, far, p.codes + i * p.columns);
  }
  if (far) store_fence();
}

template <class Real, class T>
void assign_rows(const SinkhornAssign<Real>& p, const T* scores, Real* work) {
  const int64_t padded = round_up(p.columns, kWidth<Real>);
  Real *const exponent = work, *const ones = work + padded, *const entries = work + 2 * padded;
  for (int64_t j = 0; j < padded; ++j) exponent[j] = j < p.columns ? Real(kBitsPerNat) * p.v[j] : Real(-__builtin_inf()), ones[j] = 1;
  const CostRows<Real, T> rows{scores, p.stride, exponent, Real(-p.factor), p.columns};
  if (p.sums != nullptr) return assign_sums(p, rows, ones, padded, entries);
  assign_codes(p, rows, ones, entries);
}

template <class Real, class T>
void assign(const SinkhornAssign<Real>& p, Real* work) {
  const T* const scores = static_cast<const T*>(p.scores);
  if (p.scores == nullptr || (p.v == nullptr && p.codes != nullptr)) {
    assign_stored<Real, T>(p, work);
  } else if (p.v == nullptr) {
    assign_columns(p, scores, work);
  } else {
    assign_rows(p, scores, work);
  }
}

template <class Real>
void sinkhorn_assign(const SinkhornAssign<Real>& p, Real* work) {
  const FlushDenormals flush;
  if constexpr (sizeof(Real) == 4) {
    if (p.type == ElementType::kBFloat16) return assign<Real, BFloat16>(p, work);
    if (p.type == ElementType::kFloat16) return assign<Real, Half>(p, work);
  }
  assign<Real, Real>(p, work);
}

// ---- normalisation: a matrix to a lane -----------------------------------------------------------------------------------

// x <- x / (sum x + eps) over rows or columns of an n x n matrix in each lane; the divisors are left in d.
template <bool kRows, class V>
inline void normalize_step(V* x, int64_t n, V eps, V* d) {
  for (int64_t i = 0; i < n; ++i) {
    V sum = eps;
    for (int64_t j = 0; j < n; ++j) sum += x[kRows ? i * n + j : j * n + i];
    d[i] = sum;
    const V inverse = 1 / sum;
    for (int64_t j = 0; j < n; ++j) x[kRows ? i * n + j : j * n + i] *= inverse;
  }
}

// Its gradient: from x after the step to x before it, and dx likewise: dx <- (dx - sum dx x) / d, x <- x d.
template <bool kRows, class V>
inline void normalize_step_back(V* x, V* dx, int64_t n, const V* d) {
  for (int64_t i = 0; i < n; ++i) {
    V dot = {};
    for (int64_t j = 0; j < n; ++j) dot += dx[kRows ? i * n + j : j * n + i] * x[kRows ? i * n + j : j * n + i];
    const V inverse = 1 / d[i];
    for (int64_t j = 0; j < n; ++j) {
      const int64_t at = kRows ? i * n + j : j * n + i;
      dx[at] = (dx[at] - dot) * inverse;
      x[at] *= d[i];
    }
  }
}

// kWidth matrices from p.logits at element `first`; kN is n where the compiler may know it, else 0.
template <int kN, class Real>
inline void normalize_lanes(const SinkhornNormalize<Real>& p, int64_t first, int64_t count, VecOf<Real>* x, VecOf<Real>* dx, VecOf<Real>* d) {
  using V = VecOf<Real>;
  const int64_t n = kN > 0 ? kN : p.n, size = n * n;
  const V eps = splat(Real(p.eps));
  const auto gather = [&](const Real* from, V* to) {
    for (int64_t lane = 0; lane < kWidth<Real>; ++lane)
      for (int64_t e = 0; e < size; ++e) reinterpret_cast<Real*>(to + e)[lane] = lane < count ? from[(first + lane) * size + e] : Real(0);
  };
  gather(p.logits, x);
  for (int64_t i = 0; i < n; ++i) {  // softmax, and eps
    V most = x[i * n], sum = {};
    for (int64_t j = 1; j < n; ++j) most = larger(most, x[i * n + j]);
    for (int64_t j = 0; j < n; ++j) sum += x[i * n + j] = exp2((x[i * n + j] - most) * Real(kBitsPerNat));
    const V inverse = 1 / sum;
    for (int64_t j = 0; j < n; ++j) x[i * n + j] = x[i * n + j] * inverse + eps;
  }
  const int64_t keep = p.gradient != nullptr ? n : 0;  // divisors of every step, or of none
  normalize_step<false>(x, n, eps, d);
  for (int64_t t = 1; t < p.iterations; ++t) {
    normalize_step<true>(x, n, eps, d + (2 * t - 1) * keep);
    normalize_step<false>(x, n, eps, d + 2 * t * keep);
  }
  V* out = x;
  if (p.gradient != nullptr) {
    gather(p.gradient, dx);
    for (int64_t t = p.iterations - 1; t > 0; --t) {
      normalize_step_back<false>(x, dx, n, d + 2 * t * keep);
      normalize_step_back<true>(x, dx, n, d + (2 * t - 1) * keep);
    }
    normalize_step_back<false>(x, dx, n, d);
    for (int64_t i = 0; i < n; ++i) {
      V dot = {};
      for (int64_t j = 0; j < n; ++j) dot += dx[i * n + j] * (x[i * n + j] - eps);
      for (int64_t j = 0; j < n; ++j) dx[i * n + j] = (x[i * n + j] - eps) * (dx[i * n + j] - dot);
    }
    out = dx;
  }
  for (int64_t lane = 0; lane < count; ++lane)
    for (int64_t e = 0; e < size; ++e) p.out[(first + lane) * size + e] = reinterpret_cast<const Real*>(out + e)[lane];
}

template <class Real>
int64_t sinkhorn_normalize_workspace(const SinkhornNormalize<Real>& p) {
  return (2 * p.n * p.n + 2 * p.iterations * p.n) * kWidth<Real>;
}

template <class Real>
void sinkhorn_normalize(const SinkhornNormalize<Real>& p, int64_t begin, int64_t end, Real* work) {
  const FlushDenormals flush;
  VecOf<Real>* const x = reinterpret_cast<VecOf<Real>*>(work);
  VecOf<Real>*const dx = x + p.n * p.n, *const d = dx + p.n * p.n;
  for (int64_t i = begin; i < end; i += kWidth<Real>) {
    const int64_t count = smaller(kWidth<Real>, end - i);
    if (p.n == 4) {
      normalize_lanes<4>(p, i, count, x, dx, d);
    } else {
      normalize_lanes<0>(p, i, count, x, dx, d);
    }
  }
}

}  // namespace
