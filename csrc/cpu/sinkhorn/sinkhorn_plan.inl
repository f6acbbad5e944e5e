// Rows of the plan from potentials, times a weight: what the value's gradient in the cost is. One pass, one exponential an entry.
// With moments the weight is linear in the cost, and moments of the cost under the plan are summed on the way: the transport cost's
// gradient. Without potentials, rows of the cost.
#pragma once

#include "sinkhorn/sinkhorn_rows.inl"

namespace {

using kdfast::SinkhornPlan;

constexpr int64_t kPlanRows = 4;     // whose costs are formed together
constexpr int64_t kFarUnlikeBytes = 12 << 20;  // of rows that share lines; these pass through the caches, and such rows are formed one at a time
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

// to_rj = (or +=) weight a_r b_j 2^(k f_r + x_j) bounded, over c_rj where asked. With kMoments (weight + slope c_rj) takes the weight's place,
// a e_j c_j goes to the columns, and b_j e_j c_j and, t the exponent, a b_j e_j c_j t to `first` and `second` by lanes. Products are formed so that
// 0 times an infinite cost (a forbidden pair), and times an entry near the bound (a row without weight), are 0.
template <int kRows, bool kMoments, class Real, class T>
inline void plan_together(const SinkhornPlan<Real>& plan, const CostRows<Real, T>& rows, const PlanArrays<Real>& w, const Real* f, const Real* a, bool far,
                          Real* to, VecOf<Real>* first, VecOf<Real>* second) {
  using V = VecOf<Real>;
  const V zero = {}, least = splat(Real(kLeastExponent)), finite = splat(kLargestCost<Real>);
  const V slope = splat(Real(plan.slope));
  const bool over_cost = plan.over_cost, add = plan.add;
  V shift[kRows], mass[kRows], factor[kRows], firsts[kRows] = {}, seconds[kRows] = {};
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) shift[r] = splat(rows.k * f[r]), mass[r] = splat(a[r]), factor[r] = mass[r] * splat(Real(plan.weight));
  const auto entries = [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    const V b = load(w.b + j);
    V t[kRows], column = kMoments ? load(w.chunk + j) : zero;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) t[r] = rows.at(r, j, count, shift[r]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Real* const at = to + r * plan.out_stride + j;
      __builtin_prefetch(rows.c + r * rows.stride + j + kPlanAhead);
      if (!far) __builtin_prefetch(at + kPlanAhead, 1);
      const V e = exp2(at_most_largest<Real>(t[r])), share = e * b;
      V out = share * factor[r];
      if constexpr (kMoments) {
        const V given = load_count<Real>(rows.c + r * rows.stride + j, count), c = given > finite ? finite : given, carried = share * mass[r] * c;
        out = multiply_add(carried, slope, out);
        column = multiply_add(e * mass[r], c, column);
        firsts[r] = multiply_add(share, c, firsts[r]);
        seconds[r] = multiply_add(carried, larger(least, t[r]), seconds[r]);
      }
      if (over_cost) {
        const V cost = load_count<Real>(rows.c + r * rows.stride + j, count);
        out = cost > zero ? out / cost : zero;
      }
      if (add) out += load_count<Real>(at, count);
      if (far && count == kWidth<Real>) {
        store_far(at, out);
      } else {
        store_count(at, out, count);
      }
    }
    if constexpr (kMoments) store(w.chunk + j, column);
  };
  const int64_t head = far ? smaller(rows.m, elements_to_line(to)) : 0;
  if (head > 0) entries(0, head);
  each_vector<Real, kRows == 1 ? 4 : 1>(rows.m - head, [&](int64_t j, int, int64_t count) __attribute__((always_inline)) { entries(head + j, count); });
#pragma GCC unroll 4
  for (int r = 0; r < kRows && kMoments; ++r) first[r] = firsts[r], second[r] = seconds[r];
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
  const bool alike = plan.out_stride % kWidth<Real> == 0;  // lines begin at the same columns of every row
  const bool far = !moments && !plan.add && (plan.end - plan.begin) * p.m * int64_t(sizeof(Real)) > (alike ? kFarBytes : kFarUnlikeBytes);
  int64_t stride = 0;
  double steepness = 0;
  for (int64_t i = plan.begin, rows = 0; i < plan.end; i += rows) {
    rows = smaller(kPlanRows, plan.end - i);
    const T* const c = cost_rows<Real, T>(p, points, i, rows, 0, p.m, w.costs, &stride);
    const CostRows<Real, T> costs{c, stride, w.exponent, k, p.m};
    const int64_t at = i - plan.begin;
    const auto to = [&](int64_t r) { return plan.out + (at + r) * plan.out_stride; };
    if (plan.f == nullptr) {
      for (int64_t r = 0; r < rows; ++r)
        each_vector<Real>(p.m, [&](int64_t j, int, int64_t count) { store_count(to(r) + j, load_count<Real>(c + r * stride + j, count), count); });
      continue;
    }
    if (moments) {
      VecOf<Real> first[kPlanRows], second[kPlanRows];
      each_rows(rows, [&](int64_t r, auto together) {
        plan_together<decltype(together)::value, true>(plan, costs.from(r), w, plan.f + i + r, p.a + i + r, false, to(r), first + r, second + r);
      });
      for (int64_t r = 0; r < rows; ++r) plan.row[at + r] = sum_lanes(first[r]), steepness += double(sum_lanes(second[r]));
      if ((at + rows) / kChunk != at / kChunk) add_chunk(w.columns, w.chunk, w.m);
      continue;
    }
    bool weighty = true;
    for (int64_t r = 0; r < rows; ++r) weighty &= p.a[i + r] > 0;
    if (weighty && (alike || !far)) {
      each_rows(rows, [&](int64_t r, auto together) {
        plan_together<decltype(together)::value, false>(plan, costs.from(r), w, plan.f + i + r, p.a + i + r, far, to(r), nullptr, nullptr);
      });
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (p.a[i + r] > 0) {
        plan_together<1, false>(plan, costs.from(r), w, plan.f + i + r, p.a + i + r, far, to(r), nullptr, nullptr);
      } else if (!plan.add) {  // entries may be infinite where a row has no weight
        for (int64_t j = 0; j < p.m; ++j) to(r)[j] = p.a[i + r] * plan.f[i + r];
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
