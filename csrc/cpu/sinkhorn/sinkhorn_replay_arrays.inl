// The memory a replay of Sinkhorn's iterations works in, and when it stores exponentials.
#pragma once

#include "sinkhorn/sinkhorn_arrays.inl"
#include "sinkhorn/sinkhorn_pull.inl"

namespace {

using kdfast::SinkhornReplay;

constexpr int64_t kRank = 64;                  // rows of `left` and `right` at most: two a step
constexpr int64_t kStoredBytes = 1 << 20;      // of exponentials that are stored, half of L2: a given cost is to take no scratch of its size,
constexpr int64_t kStoredOfPoints = 64 << 20;  // but points have theirs formed anyway, and iterations of method "kernel" stored as many

// The arrays of one replay, columns padded to whole panels, rows to whole groups.
template <class Real>
struct ReplayArrays {
  int64_t n, m;
  Real *b, *y, *start, *shift, *scale, *weighted_scale, *exponent, *row_exponent;
  Real *to_g, *older, *sums, *back_exponent, *back_scale, *reference_g, *right;
  Real *to_f, *h, *u, *moved, *back_u, *back_moved, *back_a, *reference_f, *left;
  Real *columns, *entries, *shares;
  Real* kernel;                              // [n, m] or null
  Real *kept, *gradient, *points, *pulled;   // of points: their cost [n, m], the gradient in it, and what these, and that in y, are made from
  int64_t worker_columns, worker_entries;

  // Entries of exponentials that may be stored, for one step to serve others: none where it does not, the same for the largest of several problems and any.
  static int64_t stored(const SinkhornProblem<Real>& p, const SinkhornReplay<Real>& r, int64_t entries) {
    if (r.schedule.method == SinkhornMethod::kProximal || r.schedule.iterations <= 1 || r.to_epsilon || p.rho_a > 0) return 0;
    if (r.schedule.method == SinkhornMethod::kKernel) return entries;
    return smaller(entries, (p.metric == SinkhornMetric::kGiven ? kStoredBytes : kStoredOfPoints) / int64_t(sizeof(Real)));
  }

  int64_t place(const SinkhornProblem<Real>& p, const SinkhornReplay<Real>& r, int64_t workers, Real* work) {
    n = round_up(p.n, 16), m = round_up(p.m, kPanelWidth<Real>);
    worker_columns = 4 * m, worker_entries = (kTogether + 1) * m;
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      Real* const at = work + used;
      used += round_up(count, 16);
      return at;
    };
    b = take(m), y = take(m), start = take(m), shift = take(m), scale = take(m), weighted_scale = take(m), exponent = take(m), row_exponent = take(m);
    to_g = take(m), older = take(m), sums = take(m), back_exponent = take(m), back_scale = take(m);
    reference_g = take(m), right = take(kRank * m);
    to_f = take(n), h = take(n), u = take(n), moved = take(n), back_u = take(n), back_moved = take(n), back_a = take(n), reference_f = take(n);
    left = take((kRank + 1) * n);
    columns = take(workers * worker_columns), entries = take(workers * worker_entries), shares = take(workers * kShare);
    const bool formed = p.metric != SinkhornMetric::kGiven;
    const int64_t space = stored(p, r, p.n * m);
    kernel = take(space);
    if (space == 0 || space < p.n * m) kernel = nullptr;
    kept = take(formed ? p.n * m : 0), gradient = take(formed ? p.n * PointPull<Real>::stride(p) : 0);
    points = take(PointSums<Real>::space(p)), pulled = take(formed ? workers * PointPull<Real>::space(p) : 0);
    return used;
  }
};

}  // namespace
