// kdfast::sinkhorn_replay on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "kept_output.h"
#include "sinkhorn/bind_sinkhorn.h"

namespace {

using kdfast::SinkhornReplay;

int64_t replay_workspace(const SinkhornProblem<float>& p, const SinkhornReplay<float>& r, int64_t workers) {
  return kdfast::cpu_kernels().sinkhorn_replay_workspace(p, r, workers);
}
int64_t replay_workspace(const SinkhornProblem<double>& p, const SinkhornReplay<double>& r, int64_t workers) {
  return kdfast::cpu_kernels().sinkhorn_replay_workspace_double(p, r, workers);
}
void replay_one(const SinkhornProblem<float>& p, const SinkhornReplay<float>& r, const SinkhornTeam& t, float* work) {
  kdfast::cpu_kernels().sinkhorn_replay(p, r, t, work);
}
void replay_one(const SinkhornProblem<double>& p, const SinkhornReplay<double>& r, const SinkhornTeam& t, double* work) {
  kdfast::cpu_kernels().sinkhorn_replay_double(p, r, t, work);
}

using Replayed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Real>
Replayed replay(const Problems<Real>& problems, const Tensor& a, const Tensor& g0, const Tensor& history_f, const Tensor& history_g, const Tensor& done,
                const Tensor& to_f, const Tensor& to_g, bool to_epsilon, const SinkhornSchedule& schedule) {
  const auto [batch, n, m] = std::tuple(problems.batch, problems.n, problems.m);
  const int64_t steps = schedule.iterations;
  check("done", done, ScalarType::Long, {batch});
  const int64_t* const counts = data<int64_t>(done);
  SinkhornReplay<Real> first{};
  first.schedule = schedule, first.to_epsilon = to_epsilon;
  first.start_g = packed<Real>("g", g0, {batch, m});
  first.history_f = packed<Real>("history_f", history_f, {batch, steps, n}), first.history_f_stride = n;
  first.history_g = packed<Real>("history_g", history_g, {batch, steps, m}), first.history_g_stride = m;
  first.to_f = packed<Real>("to_f", to_f, {batch, n}), first.to_g = packed<Real>("to_g", to_g, {batch, m});
  const auto reals = [&](std::initializer_list<int64_t> shape) {
    Tensor out = kept_output(a, shape, scalar_type<Real>());
    return problems.rows == nullptr ? out : torch::stable::zero_(out);  // padding
  };
  const bool given = problems.first.metric == SinkhornMetric::kGiven;
  const int64_t width = problems.first.width;
  Tensor cost = given ? reals({batch, n, m}) : reals({0});
  Tensor dx = given ? reals({0}) : reals({batch, n, width}), dy = given ? reals({0}) : reals({batch, m, width});
  Tensor da = reals({batch, n}), db = reals({batch, m}), depsilon = reals({batch});
  const Replayed out{cost, dx, dy, da, db, depsilon};
  if (batch == 0) return out;
  const Division division(batch, n, m, 2 * steps);
  const SinkhornTeam team{division.team, run_team};
  const int64_t space = replay_workspace(problems.first_padded(), first, team.size);
  const Workspace<Real> work(division.workers * space);
  Real *const scratch = work.data(), *const to_cost = values<Real>(cost), *const to_a = values<Real>(da), *const to_b = values<Real>(db);
  Real *const to_eps = values<Real>(depsilon), *const to_x = values<Real>(dx), *const to_y = values<Real>(dy);
  for_each_task(division.workers, batch, [&](int64_t worker, int64_t i) {
    SinkhornReplay<Real> r = first;
    r.done = counts[i];
    r.start_g += i * m, r.history_f += i * steps * n, r.history_g += i * steps * m, r.to_f += i * n, r.to_g += i * m;
    r.a = to_a + i * n, r.b = to_b + i * m, r.epsilon = to_eps + i;
    if (given) {
      r.cost = to_cost + i * n * m, r.cost_stride = m;
      if (r.done == 0) std::fill_n(r.cost, n * m, Real(0));
    } else {
      r.x = to_x + i * n * width, r.y = to_y + i * m * width;
    }
    replay_one(problems.at(i), r, team, scratch + worker * space);
  });
  return out;
}

Replayed sinkhorn_replay(const OptionalTensor& cost, const OptionalTensor& x, const OptionalTensor& y, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                         const OptionalTensor& rows, const OptionalTensor& cols, std::string metric, std::optional<double> rho_a, std::optional<double> rho_b,
                         const Tensor& g, const Tensor& history_f, const Tensor& history_g, const Tensor& done, const Tensor& to_f, const Tensor& to_g,
                         bool to_epsilon, int64_t iterations, std::optional<double> tol, std::string method, std::optional<double> anneal_start,
                         std::optional<double> anneal_factor) {
  const SinkhornSchedule schedule = schedule_of(iterations, tol, method, anneal_start, anneal_factor);
  if (a.scalar_type() == ScalarType::Double) {
    const Problems<double> problems(cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b);
    return replay<double>(problems, a, g, history_f, history_g, done, to_f, to_g, to_epsilon, schedule);
  }
  const Problems<float> problems(cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b);
  return replay<float>(problems, a, g, history_f, history_g, done, to_f, to_g, to_epsilon, schedule);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("sinkhorn_replay", TORCH_BOX(&sinkhorn_replay));
}
