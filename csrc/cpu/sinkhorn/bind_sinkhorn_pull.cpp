// kdfast::sinkhorn_pull on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "sinkhorn/bind_sinkhorn.h"

namespace {

using kdfast::SinkhornPlan;

int64_t pull_workspace(const SinkhornProblem<float>& p) { return kdfast::cpu_kernels().sinkhorn_pull_workspace(p); }
int64_t pull_workspace(const SinkhornProblem<double>& p) { return kdfast::cpu_kernels().sinkhorn_pull_workspace_double(p); }
void pull_one(const SinkhornProblem<float>& p, const SinkhornPlan<float>& plan, float* x, float* y, float* work) {
  kdfast::cpu_kernels().sinkhorn_pull(p, plan, x, y, work);
}
void pull_one(const SinkhornProblem<double>& p, const SinkhornPlan<double>& plan, double* x, double* y, double* work) {
  kdfast::cpu_kernels().sinkhorn_pull_double(p, plan, x, y, work);
}

using Pulled = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// (dx, dy) of the gradient (weight + slope C) P in the cost of points and, with a slope, row, col and steepness as sinkhorn_plan has them. Rows of few
// problems are divided, and what they add up to is added in order.
template <class Real>
Pulled pull(const Problems<Real>& problems, const Tensor& a, const Tensor& f, const Tensor& g, const Tensor& weight, const OptionalTensor& slope) {
  const auto [batch, n, m] = std::tuple(problems.batch, problems.n, problems.m);
  const int64_t width = problems.first.width;
  STD_TORCH_CHECK(problems.first.metric != SinkhornMetric::kGiven, "points must be given, not their cost");
  const Real *const at_f = packed<Real>("f", f, {batch, n}), *const at_g = packed<Real>("g", g, {batch, m});
  const Real *const weights = packed<Real>("weight", weight, {batch}), *const slopes = slope ? packed<Real>("slope", *slope, {batch}) : nullptr;
  const auto reals = [&](std::initializer_list<int64_t> shape) { return output(a, shape, scalar_type<Real>()); };
  Tensor dx = reals({batch, n, width}), dy = reals({batch, m, width});
  Tensor row = slope ? reals({batch, n}) : reals({0}), col = slope ? reals({batch, m}) : reals({0}), steepness = slope ? reals({batch}) : reals({0});
  const Pulled out{dx, dy, row, col, steepness};
  if (batch == 0) return out;

  const int64_t threads = torch::stable::get_num_threads();
  const double work = double(n) * double(m) * double(batch) * (1 + double(width) / 8);
  const int64_t workers = std::clamp<int64_t>(int64_t(work / kEntriesAThread), 1, std::min(threads, batch * n));
  const int64_t parts = batch < workers ? std::min(n, workers) : 1, space = pull_workspace(problems.first_padded());
  const int64_t share = parts > 1 ? m * (width + 1) + 1 : 0;  // a part's dy, col and steepness
  const Workspace<Real> memory(workers * space + batch * parts * share);
  Real *const scratch = memory.data(), *const shares = scratch + workers * space;
  Real *const to_x = values<Real>(dx), *const to_y = values<Real>(dy), *const to_row = values<Real>(row), *const to_col = values<Real>(col);
  Real* const to_steepness = values<Real>(steepness);
  for_each_task(workers, batch * parts, [&](int64_t worker, int64_t task) {
    const int64_t i = task / parts, part = task % parts;
    SinkhornPlan<Real> s{};
    s.f = at_f + i * n, s.g = at_g + i * m, s.weight = double(weights[i]), s.over_cost = problems.first.metric == SinkhornMetric::kEuclidean;
    s.begin = part * n / parts, s.end = (part + 1) * n / parts;
    Real *const own = shares + task * share, *const own_y = parts > 1 ? own : to_y + i * m * width;
    if (slope) {
      s.slope = double(slopes[i]), s.row = to_row + i * n + s.begin;
      s.col = parts > 1 ? own + m * width : to_col + i * m, s.steepness = parts > 1 ? own + m * (width + 1) : to_steepness + i;
    }
    pull_one(problems.at(i), s, to_x + i * n * width, own_y, scratch + worker * space);
  });
  const auto add_up = [&](Real* to, const Real* from, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      to[j] = from[j];
      for (int64_t part = 1; part < parts; ++part) to[j] += from[part * share + j];
    }
  };
  for (int64_t i = 0; i < batch && parts > 1; ++i) {
    const Real* const from = shares + i * parts * share;
    add_up(to_y + i * m * width, from, m * width);
    if (!slope) continue;
    add_up(to_col + i * m, from + m * width, m);
    add_up(to_steepness + i, from + m * (width + 1), 1);
  }
  return out;
}

Pulled sinkhorn_pull(const OptionalTensor& cost, const OptionalTensor& x, const OptionalTensor& y, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                     const OptionalTensor& rows, const OptionalTensor& cols, std::string metric, std::optional<double> rho_a, std::optional<double> rho_b,
                     const Tensor& f, const Tensor& g, const Tensor& weight, const OptionalTensor& slope) {
  if (a.scalar_type() == ScalarType::Double) return pull<double>({cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b}, a, f, g, weight, slope);
  return pull<float>({cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b}, a, f, g, weight, slope);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("sinkhorn_pull", TORCH_BOX(&sinkhorn_pull)); }
