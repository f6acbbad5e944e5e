// kdfast::sinkhorn_plan on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "kept_output.h"
#include "sinkhorn/bind_sinkhorn.h"

namespace {

using kdfast::SinkhornPlan;

int64_t plan_workspace(const SinkhornProblem<float>& p) { return kdfast::cpu_kernels().sinkhorn_plan_workspace(p); }
int64_t plan_workspace(const SinkhornProblem<double>& p) { return kdfast::cpu_kernels().sinkhorn_plan_workspace_double(p); }
void plan_one(const SinkhornProblem<float>& p, const SinkhornPlan<float>& plan, float* work) { kdfast::cpu_kernels().sinkhorn_plan(p, plan, work); }
void plan_one(const SinkhornProblem<double>& p, const SinkhornPlan<double>& plan, double* work) { kdfast::cpu_kernels().sinkhorn_plan_double(p, plan, work); }

using Planned = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Real>
Planned plan(const Problems<Real>& problems, const Tensor& a, const OptionalTensor& f, const OptionalTensor& g, const OptionalTensor& weight,
             const OptionalTensor& slope, bool sum, int64_t begin, int64_t end) {
  const auto [batch, n, m] = std::tuple(problems.batch, problems.n, problems.m);
  STD_TORCH_CHECK(0 <= begin && begin <= end && end <= n, "begin and end must be in order within ", n, " rows, got ", begin, " and ", end);
  STD_TORCH_CHECK(f.has_value() == g.has_value() && f.has_value() == weight.has_value(), "f, g and weight must be given together");
  STD_TORCH_CHECK(f.has_value() || !slope.has_value(), "slope needs f, g and weight");
  const Real *const from_f = f ? packed<Real>("f", *f, {batch, n}) : nullptr, *const from_g = f ? packed<Real>("g", *g, {batch, m}) : nullptr;
  const Real *const weights = f ? packed<Real>("weight", *weight, {batch}) : nullptr, *const slopes = slope ? packed<Real>("slope", *slope, {batch}) : nullptr;
  const int64_t rows = end - begin;
  Tensor out = sum ? kept_output(a, {rows, m}, scalar_type<Real>()) : kept_output(a, {batch, rows, m}, scalar_type<Real>());
  if (problems.rows != nullptr || batch == 0) torch::stable::zero_(out);  // padding
  const auto moments = [&](std::initializer_list<int64_t> shape) {
    Tensor out = slope ? output(a, shape, scalar_type<Real>()) : output(a, {0}, scalar_type<Real>());
    std::fill_n(values<Real>(out), out.numel(), Real(0));
    return out;
  };
  Tensor row = moments({batch, rows}), col = moments({batch, m}), steepness = moments({batch});  // 0 at padding
  const Planned planned{out, row, col, steepness};
  if (batch * rows == 0) return planned;
  Real* const to = values<Real>(out);

  // Row ranges of problems are tasks of their own, but problems that are summed.
  const int64_t threads = torch::stable::get_num_threads();
  const double entries = double(rows) * double(m) * double(batch);
  const int64_t workers = std::clamp<int64_t>(int64_t(entries / kEntriesAThread), 1, std::min(threads, batch * rows));
  const int64_t parts = sum || batch < workers ? std::min(rows, workers) : 1, tasks = sum ? parts : batch * parts;
  const int64_t space = plan_workspace(problems.first_padded()), shares = slope ? parts * batch : 0;  // every part's moments of every problem
  Tensor work = torch::stable::new_empty(a, {workers * space + shares * (m + 1)});
  Real *const scratch = values<Real>(work), *const cols = scratch + workers * space, *const steepnesses = cols + shares * m;
  for_each_task(workers, tasks, [&](int64_t worker, int64_t task) {
    const int64_t part = task % parts;
    for (int64_t i = sum ? 0 : task / parts; i < (sum ? batch : task / parts + 1); ++i) {
      const SinkhornProblem<Real> p = problems.at(i);
      SinkhornPlan<Real> s{};
      s.begin = std::min(p.n, begin + part * rows / parts), s.end = std::min(p.n, begin + (part + 1) * rows / parts);
      if (f) s.f = from_f + i * n, s.g = from_g + i * m, s.weight = double(weights[i]);
      s.add = sum && (i > 0 || problems.rows != nullptr);
      s.out = to + ((sum ? 0 : i) * rows + s.begin - begin) * m, s.out_stride = m;
      if (slope) {
        const int64_t share = part * batch + i;
        s.slope = double(slopes[i]), s.row = values<Real>(row) + i * rows + s.begin - begin, s.col = cols + share * m, s.steepness = steepnesses + share;
      }
      plan_one(p, s, scratch + worker * space);
    }
  });
  for (int64_t i = 0; i < batch && slope; ++i) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t share = part * batch + i;
      for (int64_t j = 0; j < problems.at(i).m; ++j) values<Real>(col)[i * m + j] += cols[share * m + j];
      values<Real>(steepness)[i] += steepnesses[share];
    }
  }
  return planned;
}

Planned sinkhorn_plan(const OptionalTensor& cost, const OptionalTensor& x, const OptionalTensor& y, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                      const OptionalTensor& rows, const OptionalTensor& cols, std::string metric, std::optional<double> rho_a, std::optional<double> rho_b,
                      const OptionalTensor& f, const OptionalTensor& g, const OptionalTensor& weight, const OptionalTensor& slope, bool sum,
                      int64_t begin, int64_t end) {
  if (a.scalar_type() == ScalarType::Double)
    return plan<double>({cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b}, a, f, g, weight, slope, sum, begin, end);
  return plan<float>({cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b}, a, f, g, weight, slope, sum, begin, end);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("sinkhorn_plan", TORCH_BOX(&sinkhorn_plan));
}
