// Rows of the plan from potentials, times a weight: what the value's gradient in the cost is. One pass, one exponential an entry.
// With moments the weight is linear in the cost, and moments of the cost under the plan are summed on the way: the transport cost's
// gradient. Without potentials, rows of the cost.
#pragma once

#include "sinkhorn/sinkhorn_rows.inl"

namespace {

using kdfast::SinkhornPlan;

constexpr int64_t kPlanRows = 4;     // whose costs are formed together
constexpr int64_t kPlanAhead = 512;  // elements ahead of which a given cost and the result are fetched: across the end of a page

// What rows of the plan are made from, and the column sums of a_i E_ij C_ij: `chunk` those of the last rows, for the sake of rounding.
template <class Real>
struct PlanArrays {
  int64_t m;  // padded
  Real *exponent, *b, *columns, *chunk, *costs, *points;

  int64_t place(const SinkhornProblem<Real>& p, Real* work) {
    m = round_up(p.m, kPanelWidth<Real>);
    exponent = work, b = work + m, columns = work + 2 * m, chunk = work + 3 * m, costs = work + 4 * m, points = costs + kPlanRows * m;
    return (4 + kPlanRows) * m + PointSums<Real>::space(p);
  }
};

template <class Real>
int64_t sinkhorn_plan_workspace(const SinkhornProblem<Real>& p) {
  return PlanArrays<Real>{}.place(p, nullptr);
}

// to_j = (or +=) weight a b_j 2^(k f + x_j) bounded, over c_j where asked. With kMoments (weight + slope c_j) takes the weight's place,
// a e_j c_j goes to the columns, and b_j e_j c_j and, t the exponent, a b_j e_j c_j t to `first` and `second` by lanes. Products are formed so that
// 0 times an infinite cost (a forbidden pair), and times an entry near the bound (a row without weight), are 0.
template <bool kMoments, class Real, class T>
inline void plan_row(const SinkhornPlan<Real>& plan, const CostRows<Real, T>& row, const PlanArrays<Real>& w, Real f, Real a, bool far, Real* to,
                     VecOf<Real>* first, VecOf<Real>* second) {
  using V = VecOf<Real>;
  const V zero = {}, least = splat(Real(kLeastExponent)), finite = splat(kLargestCost<Real>);
  const V shift = splat(row.k * f), weight = splat(Real(plan.weight)), slope = splat(Real(plan.slope)), mass = splat(a);
  const bool over_cost = plan.over_cost, add = plan.add;
  V firsts[4] = {}, seconds[4] = {};
  const auto entries = [&](int64_t j, int lane, int64_t count) {
    __builtin_prefetch(row.c + j + kPlanAhead);
    if (!far) __builtin_prefetch(to + j + kPlanAhead, 1);
    const V t = row.at(0, j, count, shift), e = exp2(at_most_largest<Real>(t)), share = e * load(w.b + j);
    V out = share * (mass * weight);
    if constexpr (kMoments) {
      const V given = load_count<Real>(row.c + j, count), c = given > finite ? finite : given, carried = share * mass * c;
      out = multiply_add(carried, slope, out);
      store(w.chunk + j, multiply_add(e * mass, c, load(w.chunk + j)));
      firsts[lane] = multiply_add(share, c, firsts[lane]);
      seconds[lane] = multiply_add(carried, larger(least, t), seconds[lane]);
    }
    if (over_cost) {
      const V cost = load_count<Real>(row.c + j, count);
      out = cost > zero ? out / cost : zero;
    }
    if (add) out += load_count<Real>(to + j, count);
    if (far && count == kWidth<Real>) {
      store_far(to + j, out);
    } else {
      store_count(to + j, out, count);
    }
  };
  const int64_t head = far ? smaller(row.m, elements_to_line(to)) : 0;
  if (head > 0) entries(0, 0, head);
  each_vector<Real>(row.m - head, [&](int64_t j, int lane, int64_t count) { entries(head + j, lane, count); });
  if constexpr (kMoments) {
    *first = (firsts[0] + firsts[1]) + (firsts[2] + firsts[3]);
    *second = (seconds[0] + seconds[1]) + (seconds[2] + seconds[3]);
  }
}

template <class Real>
inline Real bits_of(const SinkhornProblem<Real>& p) {
  return Real(kBitsPerNat / p.epsilon);
}

template <class Real>
void begin_plan(const SinkhornProblem<Real>& p, const SinkhornPlan<Real>& plan, const PlanArrays<Real>& w) {
  const Real k = bits_of(p);
  const bool moments = plan.row != nullptr;  // columns without weight have them too
  for (int64_t j = 0; j < w.m && plan.f != nullptr; ++j) {
    w.b[j] = j < p.m ? p.b[j] : Real(0);
    w.exponent[j] = w.b[j] > 0 || (moments && j < p.m) ? k * plan.g[j] : Real(-__builtin_inf());
    w.columns[j] = w.chunk[j] = 0;
  }
}

// Rows begin ... end; returns their steepness, in bits.
template <class Real, class T>
double plan_rows(const SinkhornProblem<Real>& p, const SinkhornPlan<Real>& plan, const PointSums<Real>& points, const PlanArrays<Real>& w) {
  const Real k = bits_of(p);
  const bool moments = plan.row != nullptr;
  const bool far = !moments && !plan.add && (plan.end - plan.begin) * p.m * int64_t(sizeof(Real)) > kFarBytes;
  int64_t stride = 0;
  double steepness = 0;
  for (int64_t i = plan.begin, rows = 0; i < plan.end; i += rows) {
    rows = smaller(kPlanRows, plan.end - i);
    const T* const c = cost_rows<Real, T>(p, points, i, rows, 0, p.m, w.costs, &stride);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = i + r - plan.begin;
      const CostRows<Real, T> row{c + r * stride, stride, w.exponent, k, p.m};
      Real* const to = plan.out + at * plan.out_stride;
      if (plan.f == nullptr) {
        each_vector<Real>(p.m, [&](int64_t j, int, int64_t count) { store_count(to + j, load_count<Real>(row.c + j, count), count); });
      } else if (moments) {
        VecOf<Real> first, second;
        plan_row<true>(plan, row, w, plan.f[i + r], p.a[i + r], false, to, &first, &second);
        plan.row[at] = sum_lanes(first);
        steepness += double(sum_lanes(second));
        if (at % kChunk == kChunk - 1) add_chunk(w.columns, w.chunk, w.m);
      } else if (p.a[i + r] > 0) {
        plan_row<false, Real, T>(plan, row, w, plan.f[i + r], p.a[i + r], far, to, nullptr, nullptr);
      } else if (!plan.add) {  // entries may be infinite where a row has no weight
        for (int64_t j = 0; j < p.m; ++j) to[j] = p.a[i + r] * plan.f[i + r];
      }
    }
  }
  if (far) store_fence();
  if (moments) add_chunk(w.columns, w.chunk, w.m);
  return steepness;
}

template <class Real>
void finish_moments(const SinkhornProblem<Real>& p, const SinkhornPlan<Real>& plan, const PlanArrays<Real>& w, double steepness) {
  __builtin_memcpy(plan.col, w.columns, size_t(p.m) * sizeof(Real));
  *plan.steepness = Real(steepness / kBitsPerNat);
}

template <class Real>
void sinkhorn_plan(const SinkhornProblem<Real>& p, const SinkhornPlan<Real>& plan, Real* work) {
  const FlushDenormals flush;
  PlanArrays<Real> w;
  w.place(p, work);
  const PointSums<Real> points(p, w.points);
  begin_plan(p, plan, w);
  with_cost_type<Real>(p, [&](auto element) {
    const double steepness = plan_rows<Real, decltype(element)>(p, plan, points, w);
    if (plan.row != nullptr) finish_moments(p, plan, w, steepness);
  });
}

}  // namespace
