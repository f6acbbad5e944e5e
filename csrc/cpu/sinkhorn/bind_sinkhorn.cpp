// kdfast::sinkhorn_solve, sinkhorn_iterate and sinkhorn_marginals on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "sinkhorn/bind_sinkhorn.h"

namespace {

using kdfast::SinkhornSolution;

constexpr int64_t kCachedBytes = 1 << 20;  // a stored kernel of this size stays in L2: half of one

int64_t solve_workspace(const SinkhornProblem<float>& p, const SinkhornSchedule& s, int64_t workers) {
  return kdfast::cpu_kernels().sinkhorn_workspace(p, s, workers);
}
int64_t solve_workspace(const SinkhornProblem<double>& p, const SinkhornSchedule& s, int64_t workers) {
  return kdfast::cpu_kernels().sinkhorn_workspace_double(p, s, workers);
}
void solve_one(const SinkhornProblem<float>& p, const SinkhornSchedule& s, const SinkhornTeam& t, const SinkhornSolution<float>& out, float* work) {
  kdfast::cpu_kernels().sinkhorn_solve(p, s, t, out, work);
}
void solve_one(const SinkhornProblem<double>& p, const SinkhornSchedule& s, const SinkhornTeam& t, const SinkhornSolution<double>& out, double* work) {
  kdfast::cpu_kernels().sinkhorn_solve_double(p, s, t, out, work);
}

template <class Real>
struct Outputs {
  const Problems<Real>& problems;
  const Tensor& like;

  Tensor operator()(std::initializer_list<int64_t> shape) const {
    Tensor out = output(like, shape, scalar_type<Real>());
    return problems.rows == nullptr ? out : torch::stable::zero_(out);  // padding
  }
};

// What potentials make: row, col, transport and error of every problem.
template <class Real>
struct Marginals {
  Tensor row, col, transport, error;

  explicit Marginals(const Outputs<Real>& make)
      : row(make({make.problems.batch, make.problems.n})), col(make({make.problems.batch, make.problems.m})),
        transport(make({make.problems.batch})), error(make({make.problems.batch})) {}

  // Problem i's places for them.
  void place(const Problems<Real>& problems, int64_t i, SinkhornSolution<Real>& s) {
    s.row = values<Real>(row) + i * problems.n, s.col = values<Real>(col) + i * problems.m;
    s.transport = values<Real>(transport) + i, s.error = values<Real>(error) + i;
  }
};

using Solution = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Iterated = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// f, g, done and the history; with `measured`, of every problem, what these potentials make.
template <class Real>
Iterated iterate(const Problems<Real>& problems, const Tensor& a, const Tensor& g0, SinkhornSchedule schedule, bool choose, bool history,
                 Marginals<Real>* measured) {
  const auto [batch, n, m] = std::tuple(problems.batch, problems.n, problems.m);
  const Real* const start = packed<Real>("g", g0, {batch, m});
  if (choose) schedule.method = n * m * int64_t(sizeof(Real)) <= kCachedBytes ? SinkhornMethod::kKernel : SinkhornMethod::kLog;
  const int64_t steps = history ? schedule.iterations : 0;
  const Outputs<Real> reals{problems, a};
  Tensor f = reals({batch, n}), g = reals({batch, m}), done = output(a, {batch}, ScalarType::Long);
  Tensor steps_f = reals({batch, steps, n}), steps_g = reals({batch, steps, m});
  const Iterated out{f, g, done, steps_f, steps_g};
  if (batch == 0) return out;

  const Division division(batch, n, m, schedule.iterations);
  const SinkhornTeam team{division.team, run_team};
  const int64_t space = solve_workspace(problems.first_padded(), schedule, team.size);
  const Workspace<Real> work(division.workers * space);
  Real *const to_f = values<Real>(f), *const to_g = values<Real>(g), *const to_steps_f = values<Real>(steps_f), *const to_steps_g = values<Real>(steps_g);
  int64_t* const to_done = static_cast<int64_t*>(done.mutable_data_ptr());
  for_each_task(division.workers, batch, [&](int64_t worker, int64_t i) {
    const SinkhornProblem<Real> p = problems.at(i);
    SinkhornSolution<Real> s{to_f + i * n, nullptr, to_g + i * m, nullptr, nullptr, nullptr, to_done + i, nullptr, nullptr, n, m};
    if (measured != nullptr) measured->place(problems, i, s);
    if (history) s.history_f = to_steps_f + i * steps * n, s.history_g = to_steps_g + i * steps * m;
    std::copy_n(start + i * m, p.m, s.g);
    solve_one(p, schedule, team, s, work.data() + worker * space);
  });
  return out;
}

template <class Real>
Solution solve(const Problems<Real>& problems, const Tensor& a, const Tensor& g0, const SinkhornSchedule& schedule, bool choose, bool history) {
  Marginals<Real> made(Outputs<Real>{problems, a});
  const auto [f, g, done, steps_f, steps_g] = iterate<Real>(problems, a, g0, schedule, choose, history, &made);
  return {f, g, made.row, made.col, made.transport, made.error, done, steps_f, steps_g};
}

Solution sinkhorn_solve(const OptionalTensor& cost, const OptionalTensor& x, const OptionalTensor& y, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                        const OptionalTensor& rows, const OptionalTensor& cols, std::string metric, std::optional<double> rho_a, std::optional<double> rho_b,
                        const Tensor& g, int64_t iterations, std::optional<double> tol, std::string method, std::optional<double> anneal_start,
                        std::optional<double> anneal_factor, bool history) {
  const SinkhornSchedule schedule = schedule_of(iterations, tol, method, anneal_start, anneal_factor);
  const bool choose = method == "auto";
  if (a.scalar_type() == ScalarType::Double) {
    const Problems<double> problems(cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b);
    return solve<double>(problems, a, g, schedule, choose, history);
  }
  const Problems<float> problems(cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b);
  return solve<float>(problems, a, g, schedule, choose, history);
}

Iterated sinkhorn_iterate(const OptionalTensor& cost, const OptionalTensor& x, const OptionalTensor& y, const Tensor& a, const Tensor& b,
                          const Tensor& epsilon, const OptionalTensor& rows, const OptionalTensor& cols, std::string metric, std::optional<double> rho_a,
                          std::optional<double> rho_b, const Tensor& g, int64_t iterations, std::string method, std::optional<double> anneal_start,
                          std::optional<double> anneal_factor, bool history) {
  const SinkhornSchedule schedule = schedule_of(iterations, std::nullopt, method, anneal_start, anneal_factor);
  const bool choose = method == "auto";
  if (a.scalar_type() == ScalarType::Double)
    return iterate<double>({cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b}, a, g, schedule, choose, history, nullptr);
  return iterate<float>({cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b}, a, g, schedule, choose, history, nullptr);
}

// ---- what potentials make -----------------------------------------------------------------------------------------------

using Measured = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Real>
Measured marginals(const Problems<Real>& problems, const Tensor& a, const Tensor& f, const Tensor& g) {
  const auto [batch, n, m] = std::tuple(problems.batch, problems.n, problems.m);
  Real *const at_f = const_cast<Real*>(packed<Real>("f", f, {batch, n})), *const at_g = const_cast<Real*>(packed<Real>("g", g, {batch, m}));
  Marginals<Real> made(Outputs<Real>{problems, a});
  const Measured out{made.row, made.col, made.transport, made.error};
  if (batch == 0) return out;
  const SinkhornSchedule none{SinkhornMethod::kLog, 0, -1, 0, 1};
  const Division division(batch, n, m, 1);
  const SinkhornTeam team{division.team, run_team};
  const int64_t space = solve_workspace(problems.first_padded(), none, team.size);
  const Workspace<Real> work(division.workers * space);
  for_each_task(division.workers, batch, [&](int64_t worker, int64_t i) {
    SinkhornSolution<Real> s{at_f + i * n, nullptr, at_g + i * m, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, n, m};
    made.place(problems, i, s);
    solve_one(problems.at(i), none, team, s, work.data() + worker * space);
  });
  return out;
}

Measured sinkhorn_marginals(const OptionalTensor& cost, const OptionalTensor& x, const OptionalTensor& y, const Tensor& a, const Tensor& b,
                            const Tensor& epsilon, const OptionalTensor& rows, const OptionalTensor& cols, std::string metric, std::optional<double> rho_a,
                            std::optional<double> rho_b, const Tensor& f, const Tensor& g) {
  if (a.scalar_type() == ScalarType::Double) return marginals<double>({cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b}, a, f, g);
  return marginals<float>({cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b}, a, f, g);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("sinkhorn_solve", TORCH_BOX(&sinkhorn_solve));
  m.impl("sinkhorn_iterate", TORCH_BOX(&sinkhorn_iterate));
  m.impl("sinkhorn_marginals", TORCH_BOX(&sinkhorn_marginals));
}
