// What conjugate gradients on a problem's fixed point need of its plan in each step: both products in one pass, one exponential an entry.
#pragma once

#include "sinkhorn/sinkhorn_rows.inl"

namespace {

using kdfast::SinkhornProduct;

// Exponents, v and column sums of `chunk` the last rows, padded to whole panels; entries and costs of kTogether rows.
template <class Real>
struct ProductArrays {
  int64_t m;
  Real *exponent, *v, *columns, *chunk, *entries, *costs, *points;

  int64_t place(const SinkhornProblem<Real>& p, Real* work) {
    m = round_up(p.m, kPanelWidth<Real>);
    exponent = work, v = work + m, columns = work + 2 * m, chunk = work + 3 * m;
    entries = work + 4 * m, costs = entries + kTogether * m, points = costs + kTogether * m;
    return (4 + 2 * kTogether) * m + PointSums<Real>::space(p);
  }
};

template <class Real>
int64_t sinkhorn_product_workspace(const SinkhornProblem<Real>& p) {
  return ProductArrays<Real>{}.place(p, nullptr);
}

// e_rj = 2^(u_r + x_j) bounded for kRows rows, vector by vector as in WeightedRows, and sum_j e_rj v_j by lanes.
template <int kRows, class Real, class T>
inline void weigh_bounded(const CostRows<Real, T>& rows, const Real* u, const Real* v, Real* e, VecOf<Real>* sums) {
  using V = VecOf<Real>;
  V sum[kRows][2] = {}, shift[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) shift[r] = splat(u[r]);
  each_vector<Real, 2>(rows.m, [&](int64_t j, int lane, int64_t count) {
    const V factor = load(v + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(rows.c + (r + kRows) * rows.stride + j);  // of the rows after these
      const V x = exp2(at_most_largest<Real>(rows.at(r, j, count, shift[r])));
      store(e + kRows * j + r * kWidth<Real>, x);
      sum[r][lane] = multiply_add(x, factor, sum[r][lane]);
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = sum[r][0] + sum[r][1];
}

template <class Real, class T>
void product_rows(const SinkhornProblem<Real>& p, const SinkhornProduct<Real>& product, Real* work) {
  const FlushDenormals flush;
  ProductArrays<Real> w;
  w.place(p, work);
  const PointSums<Real> points(p, w.points);
  const Real k = Real(kBitsPerNat / p.epsilon);
  for (int64_t j = 0; j < w.m; ++j) {
    w.exponent[j] = j < p.m ? k * product.g[j] : Real(-__builtin_inf());
    w.v[j] = j < p.m ? product.v[j] : Real(0);
    w.columns[j] = w.chunk[j] = 0;
  }
  int64_t stride = 0;
  for (int64_t i = product.begin, rows = 0; i < product.end; i += rows) {
    rows = smaller(kTogether, product.end - i);
    const T* const c = cost_rows<Real, T>(p, points, i, rows, 0, p.m, w.costs, &stride);
    const CostRows<Real, T> costs{c, stride, w.exponent, k, p.m};
    Real u[kTogether], weights[kTogether];
    for (int64_t r = 0; r < rows; ++r) u[r] = k * product.f[i + r];
    each_rows(rows, [&](int64_t r, auto together) {
      constexpr int kRows = decltype(together)::value;
      VecOf<Real> lanes[kRows];
      weigh_bounded<kRows>(costs.from(r), u + r, w.v, w.entries + r * w.m, lanes);
      for (int q = 0; q < kRows; ++q) weights[r + q] = product.plus[i + r + q] + product.factor[i + r + q] * sum_lanes(lanes[q]);
    });
    add_rows(WeightedRows<Real>{w.entries, w.m, weights, w.chunk}, rows, p.m);
    if ((i - product.begin) / kChunk != (i + rows - product.begin) / kChunk) add_chunk(w.columns, w.chunk, w.m);
  }
  add_chunk(w.columns, w.chunk, w.m);
  __builtin_memcpy(product.columns, w.columns, size_t(p.m) * sizeof(Real));
}

template <class Real>
void sinkhorn_product(const SinkhornProblem<Real>& p, const SinkhornProduct<Real>& product, Real* work) {
  with_cost_type<Real>(p, [&](auto element) { product_rows<Real, decltype(element)>(p, product, work); });
}

}  // namespace
