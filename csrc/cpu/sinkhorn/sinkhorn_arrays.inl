// The schedule of a solve of Sinkhorn's iterations and the memory it works in.
#pragma once

#include "sinkhorn/sinkhorn_cost.inl"

namespace {

using kdfast::SinkhornMethod;
using kdfast::SinkhornSchedule;

constexpr double kDrift = 28.85;         // 20 nats: past 2^this, what underflowed when a kernel was stored may count
constexpr double kAlone = 40;            // times rho, a potential that stands for infinity: geometry.py, ALONE
constexpr int64_t kGroup = 16;           // rows weighed together, at most
constexpr int64_t kTileBytes = 1 << 18;  // of a stored kernel, a quarter of L2: the log form may have it too
constexpr int64_t kKeptBytes = 1 << 20;  // half of L2: points whose cost fits there have it kept,
constexpr int64_t kKeptWidth = 92;       // or where forming it anew takes longer than reading it from memory
constexpr int64_t kShare = 64;           // elements between what workers report: no cache line in common

// Epsilon of iteration t >= 1.
inline double epsilon_at(double epsilon, const SinkhornSchedule& schedule, int64_t t) {
  if (schedule.method == SinkhornMethod::kProximal) return epsilon / double(t);
  if (schedule.anneal_start == 0 || t == schedule.iterations) return epsilon;
  double now = schedule.anneal_start;
  for (int64_t i = 1; i < t && now > epsilon; ++i) now *= schedule.anneal_factor;
  return now > epsilon ? now : epsilon;
}

// Iteration t starts from now g_{t-1} + older g_{t-2}: a proximal step extrapolates.
struct StartWeights {
  double now, older;
};
inline StartWeights start_weights(const SinkhornSchedule& schedule, int64_t t) {
  if (schedule.method != SinkhornMethod::kProximal) return {1, 0};
  return {2 * (double(t) - 1) / double(t), t > 2 ? -(double(t) - 2) / double(t) : 0};
}

inline double damping(double rho, double epsilon) { return rho > 0 ? rho / (rho + epsilon) : 1.0; }  // lambda
inline double alone(double rho) { return rho > 0 ? kAlone * rho : 0.0; }  // the potential where nothing is summed

// The arrays of one solve. Those over rows are padded by a group, those over columns to whole panels.
template <class Real>
struct SinkhornArrays {
  int64_t n, m;  // padded
  Real *a, *log_a, *f, *new_f, *stored_u;
  Real *b, *g, *new_g, *older_g, *start_g, *exponent, *scale;
  Real* kernel;                                // [n, m] or null
  Real *columns, *entries, *costs, *shares;    // of every worker
  Real *points, *kept;
  int64_t worker_columns, worker_entries;

  static bool keeps_cost(const SinkhornProblem<Real>& p) {
    return p.metric != SinkhornMetric::kGiven && (p.width >= kKeptWidth || p.n * p.m * int64_t(sizeof(Real)) <= kKeptBytes);
  }

  // Elements of a stored kernel, none where it is not kept. A tile, so that the largest of several problems has space for any of them.
  static int64_t kernel_space(SinkhornMethod method, int64_t rows, int64_t columns) {
    if (method == SinkhornMethod::kProximal) return 0;
    return method == SinkhornMethod::kKernel ? rows * columns : smaller(rows * columns, kTileBytes / int64_t(sizeof(Real)));
  }

  // Places the arrays from `work` on and returns their size in elements.
  int64_t place(const SinkhornProblem<Real>& p, SinkhornMethod method, int64_t workers, Real* work) {
    n = round_up(p.n, kGroup) + kGroup, m = round_up(p.m, kPanelWidth<Real>);
    worker_columns = 2 * m, worker_entries = kGroup * m;
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      Real* const at = work + used;
      used += round_up(count, 16);
      return at;
    };
    a = take(n), log_a = take(n), f = take(n), new_f = take(n), stored_u = take(n);
    b = take(m), g = take(m), new_g = take(m), older_g = take(m), start_g = take(m), exponent = take(m), scale = take(m);
    columns = take(workers * worker_columns);
    entries = take(workers * worker_entries);
    costs = take(p.metric == SinkhornMetric::kGiven ? 0 : workers * worker_entries);
    shares = take(workers * kShare);
    points = take(PointSums<Real>::space(p));
    const int64_t stored = kernel_space(method, p.n, m);
    kernel = take(stored);
    if (stored < p.n * m) kernel = nullptr;
    kept = take(keeps_cost(p) ? p.n * m : 0);
    return used;
  }
};

}  // namespace
