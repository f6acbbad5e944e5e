// Reverse through the iterations of one problem from their potentials (the equations: kdfast/_ops/sinkhorn/README.md, "One iteration").
//
// Step t, with E_ij = 2^(k (f_i + g_j/lambda_b - C_ij)) and R_ij = 2^(k (f_i/lambda_a + start_j - C_ij)), cotangents F and G:
//
//   y = lambda_b G / (E^T a),   h = E y,   x = lambda_a (F - a h) / (R b),   dC_ij += a_i y_j E_ij + b_j x_i R_ij,   G <- -b R^T x
//
// in two passes, of which the second visits rows four at a time: weighed, then added to the columns and the gradient while in cache.
// R's rows are normalised, so that where no column moved far R is E with its columns rescaled: one exponential an entry a pass.
#pragma once

#include "sinkhorn/sinkhorn.inl"

namespace {

using kdfast::SinkhornReplay;

constexpr int64_t kReplayRows = 4;

// The arrays of one replay, columns padded to whole panels.
template <class Real>
struct ReplayArrays {
  int64_t m;
  Real *b, *y, *start, *scale, *weighted_scale, *exponent, *row_exponent, *to_g, *older, *to_f, *h, *columns, *entries, *shares;
  int64_t worker_columns, worker_entries;

  int64_t place(const SinkhornProblem<Real>& p, int64_t workers, Real* work) {
    m = round_up(p.m, kPanelWidth<Real>);
    worker_columns = 2 * m, worker_entries = 2 * kReplayRows * m;
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      Real* const at = work + used;
      used += round_up(count, 16);
      return at;
    };
    b = take(m), y = take(m), start = take(m), scale = take(m), weighted_scale = take(m), exponent = take(m), row_exponent = take(m);
    to_g = take(m), older = take(m), to_f = take(p.n), h = take(p.n);
    columns = take(workers * worker_columns), entries = take(workers * worker_entries), shares = take(workers * kShare);
    return used;
  }
};

template <class Real, class T>
class SinkhornReplayer {
 public:
  SinkhornReplayer(const SinkhornProblem<Real>& problem, const SinkhornReplay<Real>& replay, const SinkhornTeam& team, const ReplayArrays<Real>& arrays)
      : p_(problem), r_(replay), team_(team), w_(arrays) {}

  void run() {
    const FlushDenormals flush;
    for (int64_t i = 0; i < p_.n; ++i) w_.to_f[i] = r_.to_f[i], r_.a[i] = 0;
    for (int64_t j = 0; j < w_.m; ++j) {
      const bool inside = j < p_.m;
      w_.b[j] = inside ? p_.b[j] : Real(0);
      w_.to_g[j] = inside ? r_.to_g[j] : Real(0);
      w_.older[j] = w_.start[j] = 0;
      if (inside) r_.b[j] = 0;
    }
    double to_epsilon = 0;
    for (int64_t t = r_.done; t > 0; --t) to_epsilon += step(t);
    *r_.epsilon = Real(to_epsilon);
  }

 private:
  using V = VecOf<Real>;
  static constexpr int64_t kW = kWidth<Real>;

  const SinkhornProblem<Real>& p_;
  const SinkhornReplay<Real>& r_;
  const SinkhornTeam& team_;
  const ReplayArrays<Real> w_;

  const Real *f_ = nullptr, *g_ = nullptr;  // after the step
  Real k_ = 0, damp_a_ = 1, damp_b_ = 1;
  bool far_ = false;    // some column moved far in this step
  bool first_ = false;  // nothing is in the gradient yet

  // Returns what the step adds to the gradient in epsilon.
  double step(int64_t t) {
    const double epsilon = epsilon_at(p_.epsilon, r_.schedule, t);
    k_ = Real(kBitsPerNat / epsilon);
    damp_a_ = Real(damping(p_.rho_a, epsilon)), damp_b_ = Real(damping(p_.rho_b, epsilon));
    f_ = r_.history_f + (t - 1) * r_.history_f_stride, g_ = r_.history_g + (t - 1) * r_.history_g_stride;
    const Real* const previous = t > 1 ? g_ - r_.history_g_stride : r_.start_g;
    const StartWeights start = start_weights(r_.schedule, t);
    first_ = t == r_.done;
    far_ = false;
    for (int64_t j = 0; j < p_.m; ++j) {
      w_.start[j] = Real(start.now) * previous[j] + (start.older != 0 ? Real(start.older) * (g_ - 2 * r_.history_g_stride)[j] : Real(0));
      far_ |= !(__builtin_fabs(double(k_ * (w_.start[j] - g_[j] / damp_b_))) < kDrift);
    }
    const Real none = Real(-__builtin_inf());
    for (int64_t j = 0; j < w_.m; ++j) {
      const bool inside = j < p_.m;
      w_.exponent[j] = inside ? k_ * (g_[j] / damp_b_) : none;
      w_.row_exponent[j] = w_.b[j] > 0 ? k_ * w_.start[j] : none;
      w_.scale[j] = inside && !far_ ? k_ * (w_.start[j] - g_[j] / damp_b_) : Real(0);
    }
    for (int64_t j = 0; j < w_.m; j += kW) {
      const V scale = exp2(load(w_.scale + j));
      store(w_.scale + j, scale);
      store(w_.weighted_scale + j, scale * load(w_.b + j));
    }

    team_.run(team_.size, [](void* self, int64_t worker) { static_cast<SinkhornReplayer*>(self)->sum_columns(worker); }, this);
    for (int64_t j = 0; j < w_.m; ++j) {
      const Real sum = total(0, j);
      w_.y[j] = j < p_.m ? damp_b_ * w_.to_g[j] / (sum < Real(1e-30) ? Real(1e-30) : sum) : Real(0);
    }
    team_.run(team_.size, [](void* self, int64_t worker) { static_cast<SinkhornReplayer*>(self)->pull(worker); }, this);
    return finish(epsilon, start, r_.schedule.method == SinkhornMethod::kProximal ? 1 / double(t) : double(epsilon == p_.epsilon));
  }

  Real total(int64_t which, int64_t j) const {
    Real sum = 0;
    for (int64_t worker = 0; worker < team_.size; ++worker) sum += w_.columns[worker * w_.worker_columns + which * w_.m + j];
    return sum;
  }

  // The gradients in weights and epsilon, and the cotangents of the step before.
  double finish(double epsilon, const StartWeights& start, double share) {
    double pairing = 0, with_f = 0, with_g = 0;
    for (int64_t i = 0; i < p_.n; ++i) {
      const double pulled = double(p_.a[i]) * double(w_.h[i]);
      with_f += (double(w_.to_f[i]) - pulled) * double(f_[i]);
      pairing += pulled * double(f_[i]);
      r_.a[i] -= Real(epsilon) * w_.h[i];
      w_.to_f[i] = 0;
    }
    for (int64_t j = 0; j < p_.m; ++j) {
      const Real through = w_.scale[j] * total(0, j) + total(1, j), back = -w_.b[j] * through;
      with_g += double(w_.to_g[j]) * double(g_[j]);
      pairing -= double(back) * double(w_.start[j]);
      r_.b[j] -= Real(epsilon) * through;
      w_.to_g[j] = w_.older[j] + Real(start.now) * back;
      w_.older[j] = Real(start.older) * back;
    }
    for (int64_t worker = 0; worker < team_.size; ++worker) pairing -= double(w_.shares[worker * kShare]);
    if (!r_.to_epsilon) return 0;
    double out = (pairing + with_f + with_g) / epsilon;
    if (p_.rho_a > 0) out -= with_f / (p_.rho_a + epsilon);
    if (p_.rho_b > 0) out -= with_g / (p_.rho_b + epsilon);
    return share * out;
  }

  const T* cost(int64_t i) const { return static_cast<const T*>(p_.cost) + i * p_.cost_stride; }
  CostRows<Real, T> rows_at(int64_t i, const Real* exponent) const { return {cost(i), p_.cost_stride, exponent, k_, p_.m}; }
  int64_t first_row(int64_t worker) const { return worker * p_.n / team_.size; }

  // E^T a
  void sum_columns(int64_t worker) {
    const FlushDenormals flush;
    Real* const columns = w_.columns + worker * w_.worker_columns;
    for (int64_t j = 0; j < w_.m; ++j) columns[j] = 0;
    Real u[kReplayRows];
    const int64_t end = first_row(worker + 1);
    for (int64_t i = first_row(worker), rows = 0; i < end; i += rows) {
      rows = smaller(kReplayRows, end - i);
      for (int64_t r = 0; r < rows; ++r) u[r] = k_ * f_[i + r];
      const CostRows<Real, T> costs = rows_at(i, w_.exponent);
      each_rows(rows, [&](int64_t r, auto together) {
        add_costs<decltype(together)::value, false>(costs.from(r), u + r, w_.b, p_.a + i + r, columns, static_cast<V*>(nullptr), static_cast<V*>(nullptr));
      });
    }
  }

  // e_j = 2^(u + exponent_j - k c_j) clamped, its sums with y and with `weight`.
  static void weigh_twice(const CostRows<Real, T>& row, Real u, const Real* y, const Real* weight, Real* e, Real* with_y, Real* with_weight) {
    V first[4] = {}, second[4] = {};
    each_vector<Real>(row.m, [&](int64_t j, int lane, int64_t count) {
      const V t = row.at(0, j, count, splat(u)), most = splat(Real(kLargestExponent));
      const V x = exp2(t > most ? most : t);
      store(e + j, x);
      first[lane] = multiply_add(x, load(y + j), first[lane]);
      second[lane] = multiply_add(x, load(weight + j), second[lane]);
    });
    *with_y = sum_lanes((first[0] + first[1]) + (first[2] + first[3]));
    *with_weight = sum_lanes((second[0] + second[1]) + (second[2] + second[3]));
  }

  // Adds one row to the gradient and the columns: dC_j += e_j (x b_j scale_j + a y_j), columns_j += x e_j; where R's row is kept apart in
  // `own`, x counts there instead. Returns sum_j dC_j C_j of what was added, where it is wanted.
  template <bool kApart, bool kCost>
  Real pull_row(const T* c, const Real* e, const Real* own, Real x, Real a, Real* columns, Real* to) const {
    const V zero = {}, slope = splat(x), weight = splat(a);
    V pairing = {};
    const Real* const scale = kApart ? w_.b : w_.weighted_scale;
    each_vector<Real>(p_.m, [&](int64_t j, int, int64_t count) {
      const V entry = load(e + j), other = kApart ? load(own + j) : entry;
      V w = entry * (weight * load(w_.y + j));
      w = multiply_add(other, slope * load(scale + j), w);
      store(columns + j, multiply_add(other, slope, load(columns + j)));
      if constexpr (kCost) pairing += w == zero ? zero : w * load_count<Real>(c + j, count);
      store_count(to + j, first_ ? w : w + load_count<Real>(to + j, count), count);
    });
    return sum_lanes(pairing);
  }

  void pull(int64_t worker) {
    const FlushDenormals flush;
    Real *const columns = w_.columns + worker * w_.worker_columns, *const own_columns = columns + w_.m;
    Real *const e = w_.entries + worker * w_.worker_entries, *const own = e + kReplayRows * w_.m;
    for (int64_t j = 0; j < w_.m; ++j) columns[j] = own_columns[j] = 0;
    double at_cost = 0;
    const int64_t end = first_row(worker + 1);
    for (int64_t i = first_row(worker), rows = 0; i < end; i += rows) {
      rows = smaller(kReplayRows, end - i);
      Real sums[kReplayRows];
      bool apart[kReplayRows];
      for (int64_t r = 0; r < rows; ++r) {
        const Real u = k_ * f_[i + r], row_u = k_ * (f_[i + r] / damp_a_);
        Real unused;
        apart[r] = far_ || !(p_.a[i + r] > 0);
        weigh_twice(rows_at(i + r, w_.exponent), u, w_.y, w_.weighted_scale, e + r * w_.m, &w_.h[i + r], &sums[r]);
        if (apart[r]) weigh_twice(rows_at(i + r, w_.row_exponent), row_u, w_.b, w_.b, own + r * w_.m, &unused, &sums[r]);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const Real a = p_.a[i + r], x = damp_a_ * (w_.to_f[i + r] - a * w_.h[i + r]) / (sums[r] < Real(1e-30) ? Real(1e-30) : sums[r]);
        const T* const c = cost(i + r);
        const Real *const entries = e + r * w_.m, *const others = own + r * w_.m;
        Real* const to = r_.cost + (i + r) * r_.cost_stride;
        if (apart[r]) {
          at_cost += double(r_.to_epsilon ? pull_row<true, true>(c, entries, others, x, a, own_columns, to)
                                          : pull_row<true, false>(c, entries, others, x, a, own_columns, to));
        } else {
          at_cost += double(r_.to_epsilon ? pull_row<false, true>(c, entries, others, x, a, columns, to)
                                          : pull_row<false, false>(c, entries, others, x, a, columns, to));
        }
      }
    }
    w_.shares[worker * kShare] = Real(at_cost);
  }
};

template <class Real>
int64_t sinkhorn_replay_workspace(const SinkhornProblem<Real>& p, int64_t workers) {
  return ReplayArrays<Real>{}.place(p, workers, nullptr);
}

template <class Real>
void sinkhorn_replay(const SinkhornProblem<Real>& p, const SinkhornReplay<Real>& replay, const SinkhornTeam& team, Real* work) {
  ReplayArrays<Real> arrays;
  arrays.place(p, team.size, work);
  with_cost_type<Real>(p, [&](auto element) { SinkhornReplayer<Real, decltype(element)>(p, replay, team, arrays).run(); });
}

}  // namespace
