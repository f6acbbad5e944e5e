// kdfast::sinkhorn_solve and sinkhorn_plan on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "bind.h"
#include "dispatch.h"

namespace {

using kdfast::SinkhornMethod;
using kdfast::SinkhornMetric;
using kdfast::SinkhornPlan;
using kdfast::SinkhornProblem;
using kdfast::SinkhornSchedule;
using kdfast::SinkhornSolution;
using kdfast::SinkhornTeam;
using OptionalTensor = std::optional<Tensor>;

constexpr double kEntriesAThread = 2e5;   // exponentials of 20 us
constexpr int64_t kCachedBytes = 1 << 20;  // a stored kernel of this size stays in L2: half of one

void run_team(int64_t size, void (*body)(void* self, int64_t worker), void* self) {
  for_each_task(size, size, [&](int64_t, int64_t worker) { body(self, worker); });
}

SinkhornMetric metric_of(const std::string& name) {
  if (name == "given") return SinkhornMetric::kGiven;
  if (name == "sqeuclidean") return SinkhornMetric::kSquared;
  if (name == "euclidean") return SinkhornMetric::kEuclidean;
  STD_TORCH_CHECK(name == "dot", "unknown metric ", name);
  return SinkhornMetric::kDot;
}

template <class Real>
constexpr ScalarType kReal = sizeof(Real) == 4 ? ScalarType::Float : ScalarType::Double;

template <class Real>
const Real* packed(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  check(name, x, kReal<Real>, shape);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  return data<Real>(x);
}

// The batch of problems of one call.
template <class Real>
struct Problems {
  int64_t batch, n, m;
  SinkhornProblem<Real> first;
  int64_t cost_batch_stride = 0;  // in bytes
  const Real* epsilon;
  const int64_t *rows = nullptr, *cols = nullptr;

  Problems(const OptionalTensor& cost, const OptionalTensor& x, const OptionalTensor& y, const Tensor& a, const Tensor& b, const Tensor& eps,
           const OptionalTensor& row_counts, const OptionalTensor& col_counts, const std::string& metric, std::optional<double> rho_a,
           std::optional<double> rho_b) {
    STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "a and b must have 2 dimensions, got ", a.dim(), " and ", b.dim());
    batch = a.size(0), n = a.size(1), m = b.size(1);
    first.metric = metric_of(metric);
    first.a = packed<Real>("a", a, {batch, n});
    first.b = packed<Real>("b", b, {batch, m});
    epsilon = packed<Real>("epsilon", eps, {batch});
    first.rho_a = rho_a.value_or(0), first.rho_b = rho_b.value_or(0);
    first.x = first.y = nullptr, first.cost = nullptr, first.cost_stride = first.width = 0;
    first.type = kdfast::ElementType::kFloat32;
    STD_TORCH_CHECK(cost.has_value() == (first.metric == SinkhornMetric::kGiven), "a cost must be given, or points");
    if (cost.has_value()) {
      take_cost(*cost);
    } else {
      STD_TORCH_CHECK(x.has_value() && y.has_value(), "x and y must be given together");
      first.width = x->size(2);
      first.x = packed<Real>("x", *x, {batch, n, first.width});
      first.y = packed<Real>("y", *y, {batch, m, first.width});
    }
    if (!row_counts.has_value()) return;
    STD_TORCH_CHECK(col_counts.has_value(), "rows and cols must be given together");
    for (const Tensor* counts : {&*row_counts, &*col_counts}) {
      check("rows and cols", *counts, ScalarType::Long, {batch});
      STD_TORCH_CHECK(counts->is_contiguous(), "rows and cols must be contiguous");
    }
    rows = data<int64_t>(*row_counts), cols = data<int64_t>(*col_counts);
  }

  SinkhornProblem<Real> at(int64_t i) const {
    SinkhornProblem<Real> p = first;
    p.n = rows == nullptr ? n : std::clamp<int64_t>(rows[i], 0, n);
    p.m = cols == nullptr ? m : std::clamp<int64_t>(cols[i], 0, m);
    p.a += i * n, p.b += i * m;
    p.epsilon = double(epsilon[i]);
    if (p.cost != nullptr) p.cost = static_cast<const char*>(p.cost) + i * cost_batch_stride;
    if (p.x != nullptr) p.x += i * n * p.width, p.y += i * m * p.width;
    return p;
  }

  // As large as any of them.
  SinkhornProblem<Real> first_padded() const {
    SinkhornProblem<Real> p = first;
    p.n = n, p.m = m;
    return p;
  }

 private:
  void take_cost(const Tensor& cost) {
    const bool shared = cost.dim() == 2;
    if (shared) {
      check("cost", cost, cost.scalar_type(), {n, m});
    } else {
      check("cost", cost, cost.scalar_type(), {batch, n, m});
    }
    const int64_t d = cost.dim() - 2;
    STD_TORCH_CHECK(m <= 1 || cost.stride(d + 1) == 1, "rows of the cost must be contiguous");
    if (sizeof(Real) == 8) {
      STD_TORCH_CHECK(cost.scalar_type() == ScalarType::Double, "the cost of float64 problems must be float64");
    } else {
      first.type = element_type("sinkhorn_solve", cost.scalar_type());
    }
    first.cost = cost.const_data_ptr();
    first.cost_stride = cost.stride(d);
    cost_batch_stride = shared ? 0 : cost.stride(0) * int64_t(cost.element_size());
  }
};

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

// Many problems: one to a thread at a time. Few: one after another, each over all threads.
struct Division {
  int64_t workers, team;

  Division(int64_t batch, int64_t n, int64_t m, int64_t sweeps) {
    const int64_t threads = torch::stable::get_num_threads();
    const double entries = double(n) * double(m);
    team = batch >= threads ? 1 : std::clamp<int64_t>(int64_t(entries / kEntriesAThread), 1, std::min(threads, n));
    workers = team > 1 ? 1 : std::clamp<int64_t>(int64_t(entries * double(batch) * double(sweeps) / kEntriesAThread), 1, std::min(threads, batch));
  }
};

using Solution = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Real>
Solution solve(const Problems<Real>& problems, const Tensor& a, const Tensor& b, const Tensor& g0, SinkhornSchedule schedule, bool choose, bool history) {
  const auto [batch, n, m] = std::tuple(problems.batch, problems.n, problems.m);
  const Real* const start = packed<Real>("g", g0, {batch, m});
  if (choose) schedule.method = n * m * int64_t(sizeof(Real)) <= kCachedBytes ? SinkhornMethod::kKernel : SinkhornMethod::kLog;
  const int64_t steps = history ? schedule.iterations : 0;
  const auto reals = [&](std::initializer_list<int64_t> shape) {
    Tensor out = torch::stable::new_empty(a, shape);
    return problems.rows == nullptr ? out : torch::stable::zero_(out);  // padding
  };
  Tensor f = reals({batch, n}), g = reals({batch, m}), row = reals({batch, n}), col = reals({batch, m});
  Tensor transport = reals({batch}), error = reals({batch}), done = torch::stable::new_empty(a, {batch}, ScalarType::Long);
  Tensor steps_f = reals({batch, steps, n}), steps_g = reals({batch, steps, m});
  const Solution out{f, g, row, col, transport, error, done, steps_f, steps_g};
  if (batch == 0) return out;

  const auto pointer = [](Tensor& x) { return static_cast<Real*>(x.mutable_data_ptr()); };
  const Division division(batch, n, m, schedule.iterations);
  const SinkhornTeam team{division.team, run_team};
  const int64_t space = solve_workspace(problems.first_padded(), schedule, team.size);
  Tensor work = torch::stable::new_empty(a, {division.workers * space + 16});
  Real* const aligned = reinterpret_cast<Real*>((reinterpret_cast<uintptr_t>(pointer(work)) + 63) / 64 * 64);
  Real *const to_f = pointer(f), *const to_g = pointer(g), *const to_row = pointer(row), *const to_col = pointer(col);
  Real *const to_transport = pointer(transport), *const to_error = pointer(error);
  Real *const to_steps_f = pointer(steps_f), *const to_steps_g = pointer(steps_g);
  int64_t* const to_done = static_cast<int64_t*>(done.mutable_data_ptr());
  for_each_task(division.workers, batch, [&](int64_t worker, int64_t i) {
    const SinkhornProblem<Real> p = problems.at(i);
    SinkhornSolution<Real> s{to_f + i * n, to_row + i * n, to_g + i * m, to_col + i * m, to_transport + i, to_error + i, to_done + i, nullptr, nullptr, n, m};
    if (history) s.history_f = to_steps_f + i * steps * n, s.history_g = to_steps_g + i * steps * m;
    std::copy_n(start + i * m, p.m, s.g);
    solve_one(p, schedule, team, s, aligned + worker * space);
  });
  return out;
}

Solution sinkhorn_solve(const OptionalTensor& cost, const OptionalTensor& x, const OptionalTensor& y, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                        const OptionalTensor& rows, const OptionalTensor& cols, std::string metric, std::optional<double> rho_a, std::optional<double> rho_b,
                        const Tensor& g, int64_t iterations, std::optional<double> tol, std::string method, std::optional<double> anneal_start,
                        std::optional<double> anneal_factor, bool history) {
  SinkhornSchedule schedule{SinkhornMethod::kLog, iterations, tol.value_or(-1), anneal_start.value_or(0), anneal_factor.value_or(1)};
  if (method == "kernel") schedule.method = SinkhornMethod::kKernel;
  if (method == "proximal") schedule.method = SinkhornMethod::kProximal;
  const bool choose = method == "auto";
  STD_TORCH_CHECK(choose || method == "log" || schedule.method != SinkhornMethod::kLog, "unknown method ", method);
  STD_TORCH_CHECK(iterations >= 1, "iterations must be >= 1, got ", iterations);
  if (a.scalar_type() == ScalarType::Double) {
    const Problems<double> problems(cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b);
    return solve<double>(problems, a, b, g, schedule, choose, history);
  }
  const Problems<float> problems(cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b);
  return solve<float>(problems, a, b, g, schedule, choose, history);
}

// ---- rows of the plan, or of the cost ---------------------------------------------------------------------------------

int64_t plan_workspace(const SinkhornProblem<float>& p) { return kdfast::cpu_kernels().sinkhorn_plan_workspace(p); }
int64_t plan_workspace(const SinkhornProblem<double>& p) { return kdfast::cpu_kernels().sinkhorn_plan_workspace_double(p); }
void plan_one(const SinkhornProblem<float>& p, const SinkhornPlan<float>& plan, float* work) { kdfast::cpu_kernels().sinkhorn_plan(p, plan, work); }
void plan_one(const SinkhornProblem<double>& p, const SinkhornPlan<double>& plan, double* work) { kdfast::cpu_kernels().sinkhorn_plan_double(p, plan, work); }

template <class Real>
Tensor plan(const Problems<Real>& problems, const Tensor& a, const OptionalTensor& f, const OptionalTensor& g, const OptionalTensor& weight, bool over_cost,
            bool sum, int64_t begin, int64_t end) {
  const auto [batch, n, m] = std::tuple(problems.batch, problems.n, problems.m);
  STD_TORCH_CHECK(0 <= begin && begin <= end && end <= n, "begin and end must be in order within ", n, " rows, got ", begin, " and ", end);
  STD_TORCH_CHECK(f.has_value() == g.has_value() && f.has_value() == weight.has_value(), "f, g and weight must be given together");
  const Real *const from_f = f ? packed<Real>("f", *f, {batch, n}) : nullptr, *const from_g = f ? packed<Real>("g", *g, {batch, m}) : nullptr;
  const Real* const weights = f ? packed<Real>("weight", *weight, {batch}) : nullptr;
  const int64_t rows = end - begin;
  Tensor out = sum ? torch::stable::new_empty(a, {rows, m}) : torch::stable::new_empty(a, {batch, rows, m});
  if (problems.rows != nullptr || batch == 0) torch::stable::zero_(out);  // padding
  if (batch * rows == 0) return out;
  Real* const to = static_cast<Real*>(out.mutable_data_ptr());

  // Row ranges of problems are tasks of their own, but problems that are summed.
  const int64_t threads = torch::stable::get_num_threads();
  const double entries = double(rows) * double(m) * double(batch);
  const int64_t workers = std::clamp<int64_t>(int64_t(entries / kEntriesAThread), 1, std::min(threads, batch * rows));
  const int64_t parts = sum || batch < workers ? std::min(rows, workers) : 1, tasks = sum ? parts : batch * parts;
  const int64_t space = plan_workspace(problems.first_padded());
  Tensor work = torch::stable::new_empty(a, {workers * space});
  Real* const scratch = static_cast<Real*>(work.mutable_data_ptr());
  for_each_task(workers, tasks, [&](int64_t worker, int64_t task) {
    const int64_t part = task % parts;
    for (int64_t i = sum ? 0 : task / parts; i < (sum ? batch : task / parts + 1); ++i) {
      const SinkhornProblem<Real> p = problems.at(i);
      SinkhornPlan<Real> s{};
      s.begin = std::min(p.n, begin + part * rows / parts), s.end = std::min(p.n, begin + (part + 1) * rows / parts);
      if (f) s.f = from_f + i * n, s.g = from_g + i * m, s.weight = double(weights[i]);
      s.over_cost = over_cost, s.add = sum && (i > 0 || problems.rows != nullptr);
      s.out = to + ((sum ? 0 : i) * rows + s.begin - begin) * m, s.out_stride = m;
      plan_one(p, s, scratch + worker * space);
    }
  });
  return out;
}

Tensor sinkhorn_plan(const OptionalTensor& cost, const OptionalTensor& x, const OptionalTensor& y, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                     const OptionalTensor& rows, const OptionalTensor& cols, std::string metric, std::optional<double> rho_a, std::optional<double> rho_b,
                     const OptionalTensor& f, const OptionalTensor& g, const OptionalTensor& weight, bool over_cost, bool sum, int64_t begin, int64_t end) {
  if (a.scalar_type() == ScalarType::Double)
    return plan<double>({cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b}, a, f, g, weight, over_cost, sum, begin, end);
  return plan<float>({cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b}, a, f, g, weight, over_cost, sum, begin, end);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("sinkhorn_solve", TORCH_BOX(&sinkhorn_solve));
  m.impl("sinkhorn_plan", TORCH_BOX(&sinkhorn_plan));
}
