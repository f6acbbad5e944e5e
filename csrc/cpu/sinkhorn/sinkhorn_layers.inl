// Balanced assignments, one pass over the scores at a time, and doubly stochastic normalisation of many small matrices.
#pragma once

#include "sinkhorn/sinkhorn_rows.inl"

namespace {

using kdfast::SinkhornAssign;
using kdfast::SinkhornNormalize;

constexpr int64_t kAssignRows = 4;      // taken together
constexpr int64_t kFarBytes = 4 << 20;  // codes beyond this are written past the caches

// ---- assignments: rows are softmax(s / epsilon + v) ----------------------------------------------------------------------

template <class Real>
int64_t sinkhorn_assign_workspace(const SinkhornAssign<Real>& p) {
  return (3 + kTogether) * round_up(p.columns, kWidth<Real>);
}

// Largest and sum_n 2^(k s_nj - largest) of each column over rows first ... end: a group of rows moves the maximum once.
template <class Real, class T>
void assign_chunk(const SinkhornAssign<Real>& p, const T* scores, int64_t first, int64_t end, Real* largest, Real* sums) {
  const VecOf<Real> k = splat(Real(p.factor));
  for (int64_t i = first, rows = 0; i < end; i += rows) {
    rows = smaller(kAssignRows, end - i);
    const T* const from = scores + i * p.stride;
    each_vector<Real>(p.columns, [&](int64_t j, int, int64_t count) {
      VecOf<Real> x[kAssignRows], most = load(largest + j);
      const VecOf<Real> before = most;
      for (int64_t r = 0; r < rows; ++r) {
        __builtin_prefetch(from + (r + kAssignRows) * p.stride + j);
        x[r] = load_count<Real>(from + r * p.stride + j, count) * k;
        most = larger(most, x[r]);
      }
      VecOf<Real> sum = load(sums + j) * exp2(before - most);
      for (int64_t r = 0; r < rows; ++r) sum += exp2(x[r] - most);
      store(largest + j, most);
      store(sums + j, sum);
    });
  }
}

template <class Real, class T>
void assign_columns(const SinkhornAssign<Real>& p, const T* scores, Real* work) {
  const int64_t padded = round_up(p.columns, kWidth<Real>);
  Real *const total = work, *const total_largest = work + padded;
  for (int64_t j = 0; j < padded; ++j) p.largest[j] = total_largest[j] = Real(-1e30), total[j] = 0;
  for (int64_t i = p.begin; i < p.end; i += kChunk) {
    for (int64_t j = 0; j < padded; ++j) p.sums[j] = 0;
    assign_chunk(p, scores, i, smaller(i + kChunk, p.end), p.largest, p.sums);
    for (int64_t j = 0; j < padded; j += kWidth<Real>) {
      const VecOf<Real> most = load(p.largest + j);
      store(total + j, multiply_add(load(total + j), exp2(load(total_largest + j) - most), load(p.sums + j)));
      store(total_largest + j, most);
    }
  }
  __builtin_memcpy(p.sums, total, size_t(padded) * sizeof(Real));
}

// to_j = weight e_j; `far`: past the caches, which would first read the lines to be written.
template <class Real>
inline void scale_row(const Real* e, Real weight, int64_t m, bool far, Real* to) {
  const VecOf<Real> scale = splat(weight);
  const int64_t head = far ? smaller(m, -reinterpret_cast<intptr_t>(to) / int64_t(sizeof(Real)) & (kWidth<Real> - 1)) : 0;
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

// Rows added to the column sums. While some are weighed the largest of those that follow are found: these are read from memory
// then, and from the cache afterwards.
template <class Real, class T>
void assign_sums(const SinkhornAssign<Real>& p, const CostRows<Real, T>& rows, const Real* ones, int64_t padded, Real* entries) {
  VecOf<Real> lanes[kTogether], most[kTogether];
  Real weights[kTogether] = {}, u[kTogether];
  Real* const chunk = entries + kTogether * padded;
  const WeightedRows<Real> old{entries, padded, weights, chunk};
  for (int64_t j = 0; j < padded; ++j) p.sums[j] = chunk[j] = 0;
  for (int64_t j = 0; j < kTogether * padded; ++j) entries[j] = 0;
  int64_t i = p.begin;
  for (int64_t r = 0; r < kTogether && i + kTogether <= p.end; ++r) u[r] = least_exponent(rows.from(i + r));
  for (; i + kTogether <= p.end; i += kTogether) {
    const int64_t next = i + 2 * kTogether <= p.end ? i + kTogether : i;
    weigh_costs<kTogether, true, true>(rows.from(i), u, ones, entries, old, lanes, rows.from(next), most);
    for (int r = 0; r < kTogether; ++r) weights[r] = 1 / sum_lanes(lanes[r]), u[r] = against<Real>(most[r]);
    if ((i - p.begin) % kChunk == 0) add_chunk(p.sums, chunk, padded);
  }
  add_rows(old, kTogether, p.columns);
  for (; i < p.end; ++i) {
    u[0] = least_exponent(rows.from(i));
    weigh_costs<1, false>(rows.from(i), u, ones, entries, old, lanes);
    weights[0] = 1 / sum_lanes(lanes[0]);
    add_rows(old, 1, p.columns);
  }
  add_chunk(p.sums, chunk, padded);
}

// Rows written as codes; again each is read from memory for its largest while the one before is weighed.
template <class Real, class T>
void assign_codes(const SinkhornAssign<Real>& p, const CostRows<Real, T>& rows, const Real* ones, Real* entries) {
  const bool far = (p.end - p.begin) * p.columns * int64_t(sizeof(Real)) > kFarBytes;
  VecOf<Real> lanes, most;
  Real u = p.begin < p.end ? least_exponent(rows.from(p.begin)) : Real(0);
  for (int64_t i = p.begin; i < p.end; ++i) {
    weigh_costs<1, false, true>(rows.from(i), &u, ones, entries, WeightedRows<Real>{}, &lanes, rows.from(smaller(i + 1, p.end - 1)), &most);
    u = against<Real>(most);
    scale_row(entries, 1 / sum_lanes(lanes), p.columns, far, p.codes + i * p.columns);
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
  if (p.v == nullptr) {
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
