// Iterations on a stored kernel K that nobody asks for the potentials of: with column factors v, row sums s_i = sum_j K_ij v_j, row factors
// w_i = a_i / s_i and column sums t_j = sum_i w_i K_ij, of which the next v_j = b_j / t_j. No logarithm and no exponential: the chain from rows' sums
// to their weights is a division.
#pragma once

#include "sinkhorn/sinkhorn_rows.inl"

namespace {

// e^20: farther from 1 than this, what underflowed when K was stored may count (sinkhorn_arrays.inl, kDrift).
constexpr double kDrifted = 4.85165195e8;
constexpr int kNarrow = 8;  // vectors of columns whose sums stay in registers

// Rows begin ... end of K [rows, width], taken together as weigh_costs stored them, and what a pass over them is given and forms.
template <class Real>
struct ScaledRows {
  const Real* e;
  int64_t width, m, begin, end;
  bool backward;  // from the last rows to the first
  const Real *a, *v;
  Real *s, *columns, *chunk;  // [n], [width], [width]
};

// s of kRows rows, which with their weights go to the columns' sums. Entries are read anew for that, from L1: the registers hold sums.
template <int kVectors, int kRows, class Real>
inline __attribute__((always_inline)) void scale_together(const Real* e, const Real* a, const Real* v, Real* s, VecOf<Real>* columns) {
  constexpr int64_t kW = kWidth<Real>;
  VecOf<Real> lanes[kRows] = {};
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    const VecOf<Real> factor = load(v + j * kW);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) lanes[r] = multiply_add(load(e + (j * kRows + r) * kW), factor, lanes[r]);
  }
  typedef Real Few __attribute__((vector_size(kRows * sizeof(Real)), aligned(sizeof(Real)), may_alias));
  sum_rows_of<kRows>(lanes, s);
  const Few weight = *reinterpret_cast<const Few*>(a) / *reinterpret_cast<const Few*>(s);
  asm("" : "+r"(e));  // or the compiler keeps entries, most of them on the stack
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const VecOf<Real> w = splat(weight[r]);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) columns[j] = multiply_add(load(e + (j * kRows + r) * kW), w, columns[j]);
  }
}

// Columns of kVectors vectors, or more: up to kNarrow.
template <int kVectors, class Real>
void scale_narrow(ScaledRows<Real> k) {
  constexpr int64_t kW = kWidth<Real>;
  if constexpr (kVectors < kNarrow) {
    if (k.m > kVectors * kW) return scale_narrow<kVectors + 1>(k);
  }
  const int64_t chunks = (k.end - k.begin + kChunk - 1) / kChunk;
  for (int64_t q = 0; q < chunks; ++q) {
    const int64_t begin = k.begin + (k.backward ? chunks - 1 - q : q) * kChunk;
    VecOf<Real> sums[kVectors] = {};
    each_rows(smaller(kChunk, k.end - begin), [&](int64_t r, auto together) __attribute__((always_inline)) {
      const int64_t i = begin + r;
      scale_together<kVectors, decltype(together)::value>(k.e + i * k.width, k.a + i, k.v, k.s + i, sums);
    });
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(k.columns + j * kW, q == 0 ? sums[j] : load(k.columns + j * kW) + sums[j]);
  }
}

// Any number of columns: `step` rows are summed while as many before them, which are in cache, are added.
template <int64_t kGroup, class Real>
void scale_wide(const ScaledRows<Real>& k, int64_t step) {
  for (int64_t j = 0; j < k.width; ++j) k.columns[j] = k.chunk[j] = 0;
  VecOf<Real> lanes[kGroup] = {};
  Real weights[2][kGroup] = {}, sums[kGroup];
  const int64_t groups = (k.end - k.begin + step - 1) / step;
  const bool far = (k.end - k.begin) * k.width * int64_t(sizeof(Real)) > kNearBytes;
  const Real* before = nullptr;
  int64_t waiting = 0;  // rows of `before`
  for (int64_t q = 0; q < groups; ++q) {
    const int64_t i = k.begin + (k.backward ? groups - 1 - q : q) * step, rows = smaller(step, k.end - i);
    const Real* const e = k.e + i * k.width;
    Real *const weight = weights[q % 2], *const other = weights[(q + 1) % 2];
    WeightedRows<Real> old{before, k.width, other, k.chunk};
    if (waiting != rows) {  // taken together otherwise, or none
      if (waiting > 0) add_rows(old, waiting, k.m);
      for (int64_t r = 0; r < kGroup; ++r) other[r] = 0;
      old.e = e;
    }
    const Real* const next = k.backward ? e - step * k.width : e + rows * k.width;  // past the ends too: a fetch cannot fault
    each_rows(rows, [&](int64_t r, auto together) {
      constexpr int kRows = decltype(together)::value;
      if (far) {
        weigh_stored<kRows, true, true>(e + r * k.width, k.v, k.m, old.from(r), lanes + r, next + r * k.width);
      } else {
        weigh_stored<kRows, true>(e + r * k.width, k.v, k.m, old.from(r), lanes + r);
      }
    });
    sum_lanes_of(lanes, rows, sums);
    for (int64_t r = 0; r < rows; ++r) k.s[i + r] = sums[r], weight[r] = k.a[i + r] / sums[r];
    before = e, waiting = rows;
    if ((q + 1) * step / kChunk != q * step / kChunk) add_chunk(k.columns, k.chunk, k.m);
  }
  if (waiting > 0) add_rows(WeightedRows<Real>{before, k.width, weights[(groups + 1) % 2], k.chunk}, waiting, k.m);
  add_chunk(k.columns, k.chunk, k.m);
}

// One pass over the rows; whether every row's sum is as it should be.
template <int64_t kGroup, class Real>
bool scale_rows(const ScaledRows<Real>& k, int64_t step) {
  if (k.m <= kNarrow * kWidth<Real> && k.begin < k.end) {
    scale_narrow<1>(k);
  } else {
    scale_wide<kGroup>(k, step);
  }
  constexpr int64_t kW = kWidth<Real>;
  VecOf<Real> doubt = {};
  int64_t i = k.begin;
  for (; i + kW <= k.end; i += kW) doubt += doubt_of<Real>(load(k.s + i), kDrifted);
  bool near = !(sum_lanes(doubt) > 0);
  for (; i < k.end; ++i) near &= k.s[i] >= Real(1 / kDrifted) && k.s[i] <= Real(kDrifted);
  return near;
}

}  // namespace
