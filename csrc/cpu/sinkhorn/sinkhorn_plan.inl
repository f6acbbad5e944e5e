// Rows of the plan from potentials, times a weight: what the value's gradient in the cost is. One pass, one exponential an entry.
// Without potentials, rows of the cost.
#pragma once

#include "sinkhorn/sinkhorn_rows.inl"

namespace {

using kdfast::SinkhornPlan;

constexpr int64_t kPlanRows = 4;  // whose costs are formed together

template <class Real>
int64_t sinkhorn_plan_workspace(const SinkhornProblem<Real>& p) {
  return (2 + kPlanRows) * round_up(p.m, kPanelWidth<Real>) + PointSums<Real>::space(p);
}

// to_j = (or +=) weight b_j 2^(u + x_j) bounded, over c_j where asked.
template <class Real, class T>
inline void plan_row(const SinkhornPlan<Real>& plan, const CostRows<Real, T>& row, const Real* b, Real u, Real weight, Real* to) {
  const VecOf<Real> zero = {}, shift = splat(u), most = splat(Real(kLargestExponent));
  each_vector<Real>(row.m, [&](int64_t j, int, int64_t count) {
    const VecOf<Real> t = row.at(0, j, count, shift);
    VecOf<Real> out = exp2(t > most ? most : t) * (weight * load(b + j));
    if (plan.over_cost) {
      const VecOf<Real> cost = load_count<Real>(row.c + j, count);
      out = cost > zero ? out / cost : zero;
    }
    if (plan.add) out += load_count<Real>(to + j, count);
    store_count(to + j, out, count);
  });
}

template <class Real, class T>
void plan_rows(const SinkhornProblem<Real>& p, const SinkhornPlan<Real>& plan, Real* work) {
  const FlushDenormals flush;
  const int64_t m = round_up(p.m, kPanelWidth<Real>);
  Real *const exponent = work, *const b = work + m, *const costs = work + 2 * m;
  const PointSums<Real> points(p, costs + kPlanRows * m);
  const Real k = Real(kBitsPerNat / p.epsilon);
  for (int64_t j = 0; j < m && plan.f != nullptr; ++j) {
    b[j] = j < p.m ? p.b[j] : Real(0);
    exponent[j] = b[j] > 0 ? k * plan.g[j] : Real(-__builtin_inf());
  }
  int64_t stride = 0;
  for (int64_t i = plan.begin, rows = 0; i < plan.end; i += rows) {
    rows = smaller(kPlanRows, plan.end - i);
    const T* const c = cost_rows<Real, T>(p, points, i, rows, 0, p.m, costs, &stride);
    for (int64_t r = 0; r < rows; ++r) {
      Real* const to = plan.out + (i + r - plan.begin) * plan.out_stride;
      if (plan.f == nullptr) {
        each_vector<Real>(p.m, [&](int64_t j, int, int64_t count) { store_count(to + j, load_count<Real>(c + r * stride + j, count), count); });
      } else if (p.a[i + r] > 0) {
        plan_row(plan, CostRows<Real, T>{c + r * stride, stride, exponent, k, p.m}, b, k * plan.f[i + r], Real(plan.weight) * p.a[i + r], to);
      } else if (!plan.add) {  // entries may be infinite where a row has no weight
        for (int64_t j = 0; j < p.m; ++j) to[j] = p.a[i + r] * plan.f[i + r];
      }
    }
  }
}

template <class Real>
void sinkhorn_plan(const SinkhornProblem<Real>& p, const SinkhornPlan<Real>& plan, Real* work) {
  with_cost_type<Real>(p, [&](auto element) { plan_rows<Real, decltype(element)>(p, plan, work); });
}

}  // namespace
