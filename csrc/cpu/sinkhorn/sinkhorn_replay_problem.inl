// The unrolled gradient of one problem: in its cost where that is given, from that to the points where it is not.
#pragma once

#include "sinkhorn/sinkhorn_replay.inl"

namespace {

template <class Real>
int64_t sinkhorn_replay_workspace(const SinkhornProblem<Real>& p, const SinkhornReplay<Real>& replay, int64_t workers) {
  return ReplayArrays<Real>{}.place(p, replay, workers, nullptr);
}

// From the gradient in the cost `q` has kept to that in the points of `p`.
template <class Real>
void pull_to_points(const SinkhornProblem<Real>& p, const SinkhornProblem<Real>& q, const SinkhornReplay<Real>& replay, const SinkhornTeam& team,
                    const ReplayArrays<Real>& arrays) {
  using Pull = PointPull<Real>;
  struct Rows {
    const SinkhornProblem<Real>&p, &q;
    const SinkhornReplay<Real>& r;
    const ReplayArrays<Real>& w;
    const PointSums<Real> points;
    int64_t workers;
  } rows{p, q, replay, arrays, PointSums<Real>(p, arrays.points), team.size};
  team.run(team.size, [](void* self, int64_t worker) {
    const FlushDenormals flush;
    const Rows& s = *static_cast<Rows*>(self);
    Pull pull(s.p, s.points, s.w.pulled + worker * Pull::space(s.p));
    const int64_t end = (worker + 1) * s.p.n / s.workers, stride = Pull::stride(s.p);
    for (int64_t i = worker * s.p.n / s.workers, rows = 0; i < end; i += rows) {
      rows = smaller(Pull::tile(s.p), end - i);
      Real* const w = s.w.gradient + i * stride;
      Pull::pad(s.p, w, rows);
      for (int64_t r = 0; r < rows && s.p.metric == SinkhornMetric::kEuclidean; ++r) {
        const Real* const c = static_cast<const Real*>(s.q.cost) + (i + r) * s.q.cost_stride;
        for (int64_t j = 0; j < s.p.m; ++j) w[r * stride + j] = c[j] > 0 ? w[r * stride + j] / c[j] : Real(0);
      }
      pull.add(w, i, rows, s.r.x);
    }
    if (s.workers == 1) pull.finish(s.r.y);
  }, &rows);
  if (team.size == 1) return;
  for (int64_t j = 0; j < Pull::space(p); ++j)
    for (int64_t worker = 1; worker < team.size; ++worker) arrays.pulled[j] += arrays.pulled[worker * Pull::space(p) + j];
  Pull::finish(p, arrays.pulled, replay.y);
}

template <class Real>
void sinkhorn_replay(const SinkhornProblem<Real>& p, const SinkhornReplay<Real>& replay, const SinkhornTeam& team, Real* work) {
  ReplayArrays<Real> arrays;
  arrays.place(p, replay, team.size, work);
  const bool formed = p.metric != SinkhornMetric::kGiven;
  const SinkhornProblem<Real> q = formed && replay.done > 0 ? keep_cost(p, team, arrays) : p;
  SinkhornReplay<Real> r = replay;
  if (formed) r.cost = arrays.gradient, r.cost_stride = PointPull<Real>::stride(p);
  with_cost_type<Real>(q, [&](auto element) { SinkhornReplayer<Real, decltype(element)>(q, r, team, arrays).run(); });
  if (formed && r.done > 0) return pull_to_points(p, q, r, team, arrays);
  if (formed) __builtin_memset(r.x, 0, size_t(p.n * p.width) * sizeof(Real)), __builtin_memset(r.y, 0, size_t(p.m * p.width) * sizeof(Real));
}

}  // namespace
