// The memory a replay of Sinkhorn's iterations works in, and when it stores exponentials.
#pragma once

#include "sinkhorn/sinkhorn.inl"
#include "sinkhorn/sinkhorn_pull.inl"

namespace {

using kdfast::SinkhornReplay;

constexpr int64_t kRank = 64;                  // rows of `right` at most: two a step
constexpr int64_t kStoredBytes = 1 << 20;      // of exponentials that are stored, half of L2: a given cost is to take no scratch of its size;
constexpr int64_t kStoredOfPoints = 64 << 20;  // points have theirs formed anyway

// The arrays of one replay, columns padded to whole panels, rows to whole groups.
template <class Real>
struct ReplayArrays {
  int64_t n, m;
  Real *b, *y, *start, *shift, *scale, *weighted_scale, *exponent, *row_exponent;
  Real *to_g, *older, *sums, *back_exponent, *back_scale, *reference_g, *lift, *right;
  Real *to_f, *h, *u, *moved, *back_u, *back_a, *reference_f, *x, *left;
  Real *columns, *entries, *shares;
  Real* kernel;                              // [n, m] or null
  Real *kept, *gradient, *points, *pulled;   // of points: their cost [n, m], the gradient in it, and what these, and that in y, are made from
  int64_t worker_columns, worker_entries;

  // Whether the exponentials of one step serve others: the same for the largest of several problems and any of them.
  static bool stores(const SinkhornProblem<Real>& p, const SinkhornReplay<Real>& r) {
    return r.schedule.iterations > 1 && !r.to_epsilon && p.rho_a == 0;
  }

  int64_t place(const SinkhornProblem<Real>& p, const SinkhornReplay<Real>& r, int64_t workers, Real* work) {
    n = round_up(p.n, 16), m = round_up(p.m, kPanelWidth<Real>);
    worker_columns = 3 * m, worker_entries = (kTogether + 1) * m;
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      Real* const at = work + used;
      used += round_up(count, 16);
      return at;
    };
    b = take(m), y = take(m), start = take(m), shift = take(m), scale = take(m), weighted_scale = take(m), exponent = take(m), row_exponent = take(m);
    to_g = take(m), older = take(m), sums = take(m), back_exponent = take(m), back_scale = take(m);
    reference_g = take(m), lift = take(m), right = take(kRank * m);
    to_f = take(n), h = take(n), u = take(n), moved = take(n), back_u = take(n), back_a = take(n), reference_f = take(n), x = take(n), left = take(n * kRank);
    columns = take(workers * worker_columns), entries = take(workers * worker_entries), shares = take(workers * kShare);
    const bool formed = p.metric != SinkhornMetric::kGiven;
    const int64_t stored = stores(p, r) ? smaller(p.n * m, (formed ? kStoredOfPoints : kStoredBytes) / int64_t(sizeof(Real))) : 0;
    kernel = take(stored);
    if (stored == 0 || stored < p.n * m) kernel = nullptr;
    kept = take(formed ? p.n * m : 0), gradient = take(formed ? p.n * PointPull<Real>::stride(p) : 0);
    points = take(PointSums<Real>::space(p)), pulled = take(formed ? workers * PointPull<Real>::space(p) : 0);
    return used;
  }
};

}  // namespace
