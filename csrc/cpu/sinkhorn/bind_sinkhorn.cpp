// kdfast::sinkhorn_solve, sinkhorn_iterate, sinkhorn_marginals, sinkhorn_replay and sinkhorn_plan on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "kept_output.h"
#include "sinkhorn/bind_sinkhorn.h"

namespace {

using kdfast::SinkhornPlan;
using kdfast::SinkhornReplay;
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

// ---- reverse through the iterations -----------------------------------------------------------------------------------

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

// ---- rows of the plan, or of the cost ---------------------------------------------------------------------------------

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
  m.impl("sinkhorn_solve", TORCH_BOX(&sinkhorn_solve));
  m.impl("sinkhorn_iterate", TORCH_BOX(&sinkhorn_iterate));
  m.impl("sinkhorn_marginals", TORCH_BOX(&sinkhorn_marginals));
  m.impl("sinkhorn_replay", TORCH_BOX(&sinkhorn_replay));
  m.impl("sinkhorn_plan", TORCH_BOX(&sinkhorn_plan));
}
