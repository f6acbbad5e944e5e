// Reverse through the iterations of one problem from their potentials, the cost of points formed and kept (the equations:
// kdfast/_ops/sinkhorn/README.md, "One iteration").
//
// Step t, with E_ij = 2^(k (f_i + g_j/lambda_b - C_ij)) and R_ij = 2^(k (f_i/lambda_a + start_j - C_ij)), cotangents F and G:
//
//   y = lambda_b G / (E^T a),   h = E y,   x = lambda_a (F - a h) / (R b),   dC_ij += a_i y_j E_ij + b_j x_i R_ij,   G <- -b R^T x
//
// R's rows are normalised, so that where no column moved far R is E with its columns rescaled, and so, with its rows rescaled, is the E
// of the step before, whose E^T a is summed on the way: one pass and one exponential an entry a step, or none, where the E of a reference is
// stored. dC of many steps is E times a product of low rank, sum_s left_is right_sj, and is formed once for all steps near
// one reference.
//
// The gradient in epsilon is what these two summands of dC make with log E and log R once columns of the one and rows of the other
// are normalised: small numbers, where sums of potentials and costs would cancel.
#pragma once

#include "sinkhorn/sinkhorn_replay_gradient.inl"
#include "sinkhorn/sinkhorn_replay_rows.inl"
#include "sinkhorn/sinkhorn_replay_stored.inl"

namespace {

template <class Real, class T>
class SinkhornReplayer {
 public:
  SinkhornReplayer(const SinkhornProblem<Real>& problem, const SinkhornReplay<Real>& replay, const SinkhornTeam& team, const ReplayArrays<Real>& arrays)
      : p_(problem), r_(replay), team_(team), w_(arrays), gradient_(problem, replay, team, arrays) {}

  void run() {
    const FlushDenormals flush;
    apart_ = p_.rho_a > 0;
    for (int64_t i = 0; i < w_.n; ++i) w_.back_a[i] = 0;
    for (int64_t i = 0; i < p_.n; ++i) {
      w_.to_f[i] = r_.to_f[i], r_.a[i] = 0;
      apart_ |= !(p_.a[i] > 0);
    }
    for (int64_t j = 0; j < w_.m; ++j) {
      const bool inside = j < p_.m;
      w_.b[j] = inside ? p_.b[j] : Real(0);
      w_.to_g[j] = inside ? r_.to_g[j] : Real(0);
      w_.older[j] = w_.start[j] = 0;
      if (inside) r_.b[j] = 0;
    }
    double to_epsilon = 0;
    for (int64_t t = r_.done; t > 0; --t) to_epsilon += step(t);
    gradient_.add(stored_);
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
  double epsilon_ = 0;
  Real k_ = 0, damp_a_ = 1, damp_b_ = 1;
  bool apart_ = false;       // some row may have no weight, or keep no mass in this precision
  bool far_ = false;         // some column moved far in this step
  bool summed_ = false;      // sums hold E^T a of the step
  bool carries_ = false;     // this step sums those of the one before
  bool stored_ = false;      // exponentials at the reference are; moved, sums and a row of left are then the next step's
  LowRankGradient<Real, T> gradient_;

  // Whether |shift(j, count)|, a vector, stays below kDrift in 0 ... size; NaN does not.
  template <class F>
  static bool near(int64_t size, const F& shift) {
    const V zero = {}, drift = splat(Real(kDrift));
    V beyond = {};
    each_vector<Real, 1>(size, [&](int64_t j, int, int64_t count) {
      const V x = shift(j, count);
      beyond += (x < drift) & (x > -drift) ? zero : zero + 1;
    });
    return sum_lanes(beyond) == 0;
  }

  // Returns what the step adds to the gradient in epsilon.
  double step(int64_t t) {
    const double before = epsilon_;
    epsilon_ = epsilon_at(p_.epsilon, r_.schedule, t);
    k_ = Real(kBitsPerNat / epsilon_);
    damp_a_ = Real(damping(p_.rho_a, epsilon_)), damp_b_ = Real(damping(p_.rho_b, epsilon_));
    f_ = r_.history_f + (t - 1) * r_.history_f_stride, g_ = r_.history_g + (t - 1) * r_.history_g_stride;
    const bool more = t > 1 && epsilon_at(p_.epsilon, r_.schedule, t - 1) == epsilon_;
    const StartWeights start = start_weights(r_.schedule, t);
    const Real* const previous = t > 1 ? g_ - r_.history_g_stride : r_.start_g;
    if (stored_ && step_of_stored(previous, more)) return 0;
    leave_stored();
    place_rows(f_, w_.u);
    place_columns(previous, start);
    refer(epsilon_ != before);
    if (w_.kernel != nullptr && gradient_.rank == 0 && more && !far_ && !apart_) {
      store_kernel();
      if (step_of_stored(previous, more)) return 0;
      leave_stored();
    }
    carry(more);
    if ((far_ || apart_) && !gradient_.written()) gradient_.clear();
    if (!summed_) sum_columns<false>();
    Real *const with_y = w_.right + gradient_.rank * w_.m, *const with_scale = with_y + w_.m;
    for (int64_t j = 0; j < w_.m; j += kW) {
      const V moved = exp2(load(w_.exponent + j) - load(w_.reference_g + j)), y = slope_of_column(j);
      store(w_.y + j, y);
      store(with_y + j, moved * y);
      store(with_scale + j, moved * load(w_.weighted_scale + j));
    }
    each_vector<Real, 1>(p_.n, [&](int64_t i, int, int64_t count) {
      store(w_.moved + i, load_count<Real>(p_.a + i, count) > V{} ? exp2(load(w_.u + i) - load(w_.reference_f + i)) : V{});
    });
    run_team<&SinkhornReplayer::pull>();
    gradient_.rank += 2;
    return finish(start, r_.schedule.method == SinkhornMethod::kProximal ? 1 / double(t) : double(epsilon_ == p_.epsilon));
  }

  template <void (SinkhornReplayer::*kPart)(int64_t)>
  void run_team() {
    team_.run(team_.size, [](void* self, int64_t worker) { (static_cast<SinkhornReplayer*>(self)->*kPart)(worker); }, this);
  }

  // u = k f. What E's rows, and columns, are rescaled by elsewhere are differences of such rounded exponents: to E's rounding, which is
  // alike along a row and large beside 1e-7 where costs are many epsilons, sums and products must hold.
  void place_rows(const Real* f, Real* u) const {
    each_vector<Real, 1>(p_.n, [&](int64_t i, int, int64_t count) { store(u + i, k_ * load_count<Real>(f + i, count)); });
  }

  // Where the columns start from, what E and R make of it, and R from E.
  void place_columns(const Real* previous, const StartWeights& start) {
    const V zero = {};
    far_ = !near(p_.m, [&](int64_t j, int64_t count) {
      V from = Real(start.now) * load_count<Real>(previous + j, count);
      if (start.older != 0) from += Real(start.older) * load_count<Real>(g_ - 2 * r_.history_g_stride + j, count);
      const V g = load_count<Real>(g_ + j, count) / damp_b_, shift = k_ * (from - g);
      store(w_.start + j, from);
      store(w_.exponent + j, k_ * g);
      store(w_.row_exponent + j, k_ * from);
      store(w_.shift + j, shift);
      return shift;
    });
    for (int64_t j = p_.m; j < w_.m; ++j) w_.exponent[j] = w_.row_exponent[j] = Real(-__builtin_inf()), w_.shift[j] = 0;
    for (int64_t j = 0; j < w_.m; j += kW) {
      const V scale = far_ ? zero + 1 : exp2(load(w_.shift + j));
      store(w_.scale + j, scale);
      store(w_.weighted_scale + j, scale * load(w_.b + j));
    }
  }

  // Makes room in the product, and these potentials its reference where they left the one there is.
  void refer(bool fresh) {
    const bool close = !fresh && gradient_.rank > 0 && near(p_.n, [&](int64_t i, int64_t count) { return shift_of_row(i, count, w_.u, w_.reference_f); }) &&
                       near(p_.m, [&](int64_t j, int64_t count) { return shift_of_column(j, count, w_.exponent, w_.reference_g); });
    if (close && gradient_.rank + 2 <= kRank) return;
    gradient_.add(stored_);
    copy(w_.reference_f, w_.u, p_.n);
    for (int64_t j = 0; j < w_.m; ++j) w_.reference_g[j] = j < p_.m ? w_.exponent[j] : Real(0);  // from which padding differs by -infinity
    gradient_.reference_k = k_;
  }

  // Rows without weight do not matter; nor do lanes past the last row or column.
  V shift_of_row(int64_t i, int64_t count, const Real* to, const Real* from) const {
    return load_count<Real>(p_.a + i, count) > V{} ? load(to + i) - load(from + i) : V{};
  }
  static V shift_of_column(int64_t j, int64_t count, const Real* to, const Real* from) {
    return load_count<Real>(to + j, count) - load_count<Real>(from + j, count);
  }

  // Whether the column sums of the step before can be had from this one's entries, and what takes them there.
  void carry(bool more) {
    carries_ = more;
    if (!carries_) return;
    const Real* const g = g_ - r_.history_g_stride;
    place_rows(f_ - r_.history_f_stride, w_.back_u);
    each_vector<Real, 1>(p_.m, [&](int64_t j, int, int64_t count) { store(w_.back_exponent + j, k_ * (load_count<Real>(g + j, count) / damp_b_)); });
    carries_ = near(p_.n, [&](int64_t i, int64_t count) {
      const V shift = shift_of_row(i, count, w_.back_u, w_.u);
      store(w_.back_a + i, load_count<Real>(p_.a + i, count) * exp2(shift));
      return shift;
    });
    carries_ &= near(p_.m, [&](int64_t j, int64_t count) {
      const V shift = shift_of_column(j, count, w_.back_exponent, w_.exponent);
      store(w_.back_scale + j, exp2(shift));
      return shift;
    });
  }

  static void copy(Real* to, const Real* from, int64_t count) { __builtin_memcpy(to, from, size_t(count) * sizeof(Real)); }

  V total(int64_t which, int64_t j) const {
    V sum = {};
    for (int64_t worker = 0; worker < team_.size; ++worker) sum += load(w_.columns + worker * w_.worker_columns + which * w_.m + j);
    return sum;
  }

  // The gradients in weights and epsilon, and the cotangents of the step before.
  double finish(const StartWeights& start, double share) {
    const double out = r_.to_epsilon ? share * to_epsilon() : 0;
    const V zero = {}, epsilon = splat(Real(epsilon_)), now = splat(Real(start.now)), older = splat(Real(start.older));
    summed_ = carries_;
    each_vector<Real, 1>(p_.m, [&](int64_t j, int, int64_t count) {
      const V b = load(w_.b + j), through = multiply_add(load(w_.scale + j), total(0, j), total(2, j));
      const V back = b == zero ? zero : -b * through;  // through may have overflowed where there is no weight
      if (carries_) store(w_.sums + j, load(w_.back_scale + j) * total(1, j));
      store_count(r_.b + j, load_count<Real>(r_.b + j, count) - epsilon * through, count);
      store_count(w_.to_g + j, multiply_add(now, back, load(w_.older + j)), count);
      store_count(w_.older + j, older * back, count);
    });
    each_vector<Real, 1>(p_.n, [&](int64_t i, int, int64_t count) {
      store_count(r_.a + i, load_count<Real>(r_.a + i, count) - epsilon * load(w_.h + i), count);
      store(w_.to_f + i, zero);
    });
    return out;
  }

  // The step's gradient in its epsilon, while sums are still those of E.
  double to_epsilon() const {
    double steepness = 0, with_f = 0, with_g = 0;
    for (int64_t worker = 0; worker < team_.size; ++worker) steepness += double(w_.shares[worker * kShare]);
    for (int64_t j = 0; j < p_.m; ++j) {
      if (w_.sums[j] == 0) continue;  // a constant
      const double sum = double(w_.sums[j]) < 1e-30 ? 1e-30 : double(w_.sums[j]);
      steepness -= double(damp_b_) * double(w_.to_g[j]) * __builtin_log2(sum);
      if (!far_) steepness += double(w_.b[j]) * double(w_.scale[j]) * double(total(0, j)[0]) * double(w_.shift[j]);
      with_g += double(w_.to_g[j]) * double(g_[j]);
    }
    for (int64_t i = 0; i < p_.n; ++i) with_f += (double(w_.to_f[i]) - double(p_.a[i]) * double(w_.h[i])) * double(f_[i]);
    double out = steepness / kBitsPerNat;
    if (p_.rho_a > 0) out -= with_f / (p_.rho_a + epsilon_);
    if (p_.rho_b > 0) out -= with_g / (p_.rho_b + epsilon_);
    return out;
  }

  CostRows<Real, T> rows_at(int64_t i, const Real* exponent) const {
    return {static_cast<const T*>(p_.cost) + i * p_.cost_stride, p_.cost_stride, exponent, k_, p_.m};
  }
  int64_t first_row(int64_t worker) const { return worker * p_.n / team_.size; }

  // y, of sums that are E^T a
  V slope_of_column(int64_t j) const {
    const V sum = load(w_.sums + j);
    return sum == V{} ? V{} : damp_b_ * load(w_.to_g + j) / larger(sum, splat(Real(1e-30)));
  }

  // E^T a; with kKeep E is stored.
  template <bool kKeep>
  void sum_columns() {
    run_team<&SinkhornReplayer::sum_rows<kKeep>>();
    for (int64_t j = 0; j < w_.m; j += kW) store(w_.sums + j, total(0, j));
  }

  template <bool kKeep>
  void sum_rows(int64_t worker) {
    const FlushDenormals flush;
    Real* const columns = w_.columns + worker * w_.worker_columns;
    for (int64_t j = 0; j < w_.m; ++j) columns[j] = 0;
    const int64_t end = first_row(worker + 1);
    for (int64_t i = first_row(worker), rows = 0; i < end; i += rows) {
      rows = smaller(kTogether, end - i);
      const CostRows<Real, T> costs = rows_at(i, w_.exponent);
      each_rows(rows, [&](int64_t r, auto together) {
        Real* const e = kKeep ? w_.kernel + (i + r) * w_.m : nullptr;
        add_costs<decltype(together)::value, false, Real>(costs.from(r), w_.u + i + r, w_.b, p_.a + i + r, e, columns, nullptr, nullptr);
      });
    }
  }

  void pull(int64_t worker) {
    const FlushDenormals flush;
    Real *const columns = w_.columns + worker * w_.worker_columns, *const entries = w_.entries + worker * w_.worker_entries;
    Real* const own = entries + kTogether * w_.m;
    Real *const left_y = w_.left + gradient_.rank * w_.n, *const left_scale = left_y + w_.n;
    for (int64_t j = 0; j < 3 * w_.m; ++j) columns[j] = 0;
    double steepness = 0;
    const int64_t end = first_row(worker + 1);
    for (int64_t i = first_row(worker), rows = 0; i < end; i += rows) {
      rows = smaller(kTogether, end - i);
      Real slopes[kTogether];
      RowSums<Real> sums;
      const CostRows<Real, T> costs = rows_at(i, w_.exponent);
      each_rows(rows, [&](int64_t r, auto together) {
        constexpr int kRows = decltype(together)::value;
        if (r_.to_epsilon) {
          weigh_pair<kRows, true>(costs.from(r), w_.u + i + r, w_.y, w_.weighted_scale, entries + r * w_.m, r, &sums);
        } else {
          weigh_pair<kRows, false>(costs.from(r), w_.u + i + r, w_.y, w_.weighted_scale, entries + r * w_.m, r, &sums);
        }
      });
      for (int64_t r = 0; r < rows; ++r) {
        const Real a = p_.a[i + r];
        const bool apart = far_ || (apart_ && !(a > 0 && trusted(sums.with_weight[r])));
        w_.h[i + r] = sums.with_y[r];
        slopes[r] = apart ? Real(0) : slope(i + r, sums.with_weight[r]);
        if (a > 0) steepness += double(a) * double(sums.steep_y[r]);
        if (!apart) steepness += steepness_of(slopes[r], sums, r);
        if (apart) steepness += pull_apart(i + r, own, columns + 2 * w_.m);
        left_y[i + r] = a * w_.moved[i + r];
        left_scale[i + r] = slopes[r] * w_.moved[i + r];
      }
      add_rows(WeightedRows<Real>{entries, w_.m, slopes, columns}, rows, p_.m);
      if (carries_) add_rows(WeightedRows<Real>{entries, w_.m, w_.back_a + i, columns + w_.m}, rows, p_.m);
    }
    w_.shares[worker * kShare] = Real(steepness);
  }

  // x_i, given sum_j b_j R_ij; where nothing is summed the potential is a constant
  Real slope(int64_t i, Real sum) const {
    return sum == 0 ? Real(0) : damp_a_ * (w_.to_f[i] - p_.a[i] * w_.h[i]) / (sum < Real(1e-30) ? Real(1e-30) : sum);
  }

  // x sum_j b_j R_j log2 R_j of a row, R its exponentials over their sum with b; columns' shifts are added for all rows at once.
  double steepness_of(Real x, const RowSums<Real>& sums, int64_t r) const {
    if (!r_.to_epsilon) return 0;
    const double sum = double(sums.with_weight[r]);
    return double(x) * (double(sums.steep_weight[r]) - sum * __builtin_log2(sum < 1e-30 ? 1e-30 : sum));
  }

  // A row whose R is not E rescaled: its part of R^T x to the columns, and b_j x R_j to the gradient. Returns its steepness.
  double pull_apart(int64_t i, Real* own, Real* columns) const {
    const Real u = k_ * (f_[i] / damp_a_);
    RowSums<Real> sums;
    weigh_pair<1, true>(rows_at(i, w_.row_exponent), &u, w_.b, w_.b, own, 0, &sums);
    if (sums.with_weight[0] == 0) w_.to_f[i] = p_.a[i] * w_.h[i];  // nothing of it goes anywhere
    const Real x = slope(i, sums.with_weight[0]);
    add_rows(WeightedRows<Real>{own, w_.m, &x, columns}, 1, p_.m);
    Real* const to = r_.cost + i * r_.cost_stride;
    each_vector<Real>(p_.m, [&](int64_t j, int, int64_t count) {
      store_count(to + j, multiply_add(load(own + j), splat(x) * load(w_.b + j), load_count<Real>(to + j, count)), count);
    });
    return steepness_of(x, sums, 0);
  }

  // ---- steps on stored exponentials ---------------------------------------------------------------------------------------
  //
  // With K the reference's and factors moved_i and scale_j = 2^(how far exponents are from it) a step's E is moved_i K_ij but for what its columns are
  // divided by, its R K_ij scale_j but for what its rows are.

  void store_kernel() {
    sum_columns<true>();
    for (int64_t i = 0; i < p_.n; ++i) w_.moved[i] = 1, w_.left[i] = p_.a[i];
    stored_ = true;
  }

  void leave_stored() {
    if (!stored_) return;
    gradient_.add(stored_);
    stored_ = summed_ = false;
  }

  // A step whose columns start from `previous`, where `more`, one of the same epsilon follows; or nothing, and false, where they moved too far.
  bool step_of_stored(const Real* previous, bool more) {
    if (gradient_.rank + 2 > kRank) {
      gradient_.add(stored_);
      copy(w_.left, w_.left + kRank * w_.n, p_.n);
    }
    const V k = splat(k_);
    Real *const y = w_.right + gradient_.rank * w_.m, *const start = y + w_.m;
    const bool serves = near(p_.m, [&](int64_t j, int64_t count) {
      const V shift = multiply_add(k, load_count<Real>(previous + j, count), -load_count<Real>(w_.reference_g + j, count)), factor = exp2(shift);
      store(w_.scale + j, factor);
      store(start + j, factor * load(w_.b + j));
      store(y + j, slope_of_column(j));
      return shift;
    });
    if (!serves) return false;
    Real* const before = w_.left + (gradient_.rank + 2) * w_.n;
    for (int64_t i = 0; i < p_.n && !more; ++i) before[i] = 0;
    const bool stays = more && near(p_.n, [&](int64_t i, int64_t count) {
      const V f = load_count<Real>(f_ - r_.history_f_stride + i, count), shift = multiply_add(k, f, -load_count<Real>(w_.reference_f + i, count));
      store(w_.back_moved + i, exp2(shift));
      store(before + i, load_count<Real>(p_.a + i, count) * load(w_.back_moved + i));
      return shift;
    });
    run_team<&SinkhornReplayer::step_rows>();
    each_vector<Real, 1>(p_.m, [&](int64_t j, int, int64_t count) {
      const V b = load(w_.b + j), through = load(w_.scale + j) * total(0, j), zero = {};
      store_count(r_.b + j, load_count<Real>(r_.b + j, count) - splat(Real(epsilon_)) * through, count);
      store_count(w_.to_g + j, b == zero ? zero : -b * through, count);
      store(w_.sums + j, total(2, j));
    });
    each_vector<Real, 1>(p_.n, [&](int64_t i, int, int64_t count) {
      store_count(r_.a + i, load_count<Real>(r_.a + i, count) - splat(Real(epsilon_)) * load(w_.moved + i) * load(w_.h + i), count);
      store(w_.to_f + i, V{});
    });
    copy(w_.moved, w_.back_moved, p_.n);
    gradient_.rank += 2;
    if (!stays) leave_stored();
    return true;
  }

  void step_rows(int64_t worker) {
    const FlushDenormals flush;
    Real *const columns = w_.columns + worker * w_.worker_columns, *const y = w_.right + gradient_.rank * w_.m, *const now = w_.left + gradient_.rank * w_.n;
    step_stored<Real>({w_.kernel, w_.m, p_.m, first_row(worker), first_row(worker + 1), y, y + w_.m, now, w_.to_f, now + 2 * w_.n, w_.h, now + w_.n, columns,
                       columns + 2 * w_.m});
  }
};

}  // namespace
