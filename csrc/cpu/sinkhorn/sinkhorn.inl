// Sinkhorn's iterations on one problem. With k = log2(e)/epsilon,
//
//   E_ij = 2^(U_i + X_j - k C_ij),  X_j = k g_j,    s_i = sum_j b_j E_ij,    f_i = lambda_a (U_i - log2 s_i)/k,
//   w_i = a_i 2^(k f_i - U_i),                      t_j = sum_i w_i E_ij,    g_j = lambda_b (X_j - log2 t_j)/k
//
// U_i is any exponent that keeps row i in range: k f_i; before there is an f for this epsilon, what would have made a row before sum
// to 1, while sums stay close to that; minus the row's largest exponent where a sum did not; or E is a stored kernel times
// 2^(k (g_j - g0_j)), and U_i what its row was stored with.
// A group of rows is weighed, then added to the column sums while it is in cache: one exponential an entry. Columns whose sum
// went out of range are redone from their own maxima. Columns without weight, which any row without weight may be infinitely near,
// are left out by X_j = -infinity and get their g at the end.
//
// Potentials are kept in units of the cost, as they are reported, and weights w are formed from the rounded f: then the rounding of
// f, 1e-7 range(C)/epsilon in the exponent, is made up for by g. Updates are corrections, so that g is rounded once.
#pragma once

#include "sinkhorn/sinkhorn_marginals.inl"
#include "sinkhorn/sinkhorn_scalings.inl"

namespace {

constexpr int64_t kGroupBytes = 16384;  // of a group's entries: two groups are most of L1
constexpr int64_t kLag = 2;             // a stored group is added beside the second after it: the chain to its weights takes as long as one

// T is what costs are stored as.
template <class Real, class T>
class SinkhornSolver {
 public:
  SinkhornSolver(const SinkhornProblem<Real>& problem, const SinkhornSchedule& schedule, const SinkhornTeam& team, const SinkhornArrays<Real>& arrays)
      : p_(problem), schedule_(schedule), team_(team), w_(arrays), points_(problem, arrays.points) {}

  void solve(const SinkhornSolution<Real>& out) {
    const FlushDenormals flush;
    begin(out.g);
    if (schedule_.iterations == 0) {
      copy(w_.f, out.f, p_.n);
      set_epsilon(p_.epsilon);
      *out.error = Real(marginals(out));
      return;
    }
    const bool proximal = schedule_.method == SinkhornMethod::kProximal, log = schedule_.method == SinkhornMethod::kLog;
    stores_ = !proximal && w_.kernel != nullptr && p_.m > 0 && !(log && schedule_.tol >= 0);  // its last iteration is of the costs, whichever that is
    scales_ = stores_ && p_.rho_a == 0 && p_.rho_b == 0;
    int64_t done = 0;
    for (int64_t t = 1; t <= schedule_.iterations; ++t) {
      const double before = epsilon_;
      if (proximal && schedule_.tol >= 0 && t > 1 && marginals(out) <= schedule_.tol) break;
      set_epsilon(epsilon_at(p_.epsilon, schedule_, t));
      if (proximal) extrapolate(start_weights(schedule_, t));
      iterate(t == 1 || epsilon_ != before, schedule_.iterations - t);
      if (!proximal && schedule_.tol >= 0 && t > 1 && before == p_.epsilon && error_ <= schedule_.tol) {
        scaled_ = false;
        break;
      }
      if (!scaled_) advance();
      ++done;
      if (schedule_.tol >= 0 || out.history_f != nullptr) settle();  // potentials are asked for
      if (out.history_f != nullptr) record(out, t - 1);
    }
    finish_columns();
    for (int64_t t = done; out.history_f != nullptr && t < schedule_.iterations; ++t) record(out, t);
    *out.done = done;
    if (out.row != nullptr) *out.error = Real(marginals(out));
    copy(out.f, w_.f, p_.n);
    copy(out.g, w_.g, p_.m);
  }

 private:
  enum class Form { kFresh, kAbsorbed, kStored, kScaled };  // kScaled: of a stored kernel, and potentials are not formed

  using V = VecOf<Real>;
  static constexpr int64_t kW = kWidth<Real>;

  const SinkhornProblem<Real>& p_;
  const SinkhornSchedule& schedule_;
  const SinkhornTeam& team_;
  SinkhornArrays<Real> w_;
  const PointSums<Real> points_;

  double epsilon_ = 0;
  Real k_ = 0, damp_a_ = 1, damp_b_ = 1;
  Form form_ = Form::kFresh;
  bool keep_ = false;        // this sweep stores its exponentials
  bool kernel_ok_ = false;   // the stored kernel serves the current potentials
  bool stores_ = false;      // exponentials are stored where iterations follow that use them
  bool scales_ = false;      // iterations before the last are products and divisions
  bool scaled_ = false;      // f and g are older than the last iteration, which left row sums in new_f and factors of columns in scale
  bool backward_ = true;     // this sweep starts at the last row: what the one before read last is still in cache
  bool doubtful_ = false;    // a sum of stored entries went out of range
  double error_ = 0, transport_ = 0;

  // ---- the schedule ---------------------------------------------------------------------------------------------------

  void begin(const Real* start) {
    copy_padded(w_.a, p_.a, p_.n, w_.n);
    copy_padded(w_.b, p_.b, p_.m, w_.m);
    for (int64_t i = 0; i < w_.n; i += kW) store(w_.log_a + i, log2<Real>(load(w_.a + i)));
    copy_padded(w_.g, start, p_.m, w_.m);
    for (int64_t i = 0; i < w_.n; ++i) w_.f[i] = w_.new_f[i] = w_.stored_u[i] = 0;
    for (int64_t j = 0; j < w_.m; ++j) w_.new_g[j] = w_.older_g[j] = w_.start_g[j] = 0;
  }

  static void copy_padded(Real* to, const Real* from, int64_t count, int64_t padded) {
    for (int64_t i = 0; i < padded; ++i) to[i] = i < count ? from[i] : Real(0);
  }

  static void copy(Real* to, const Real* from, int64_t count) { __builtin_memcpy(to, from, size_t(count) * sizeof(Real)); }

  void set_epsilon(double epsilon) {
    if (epsilon != epsilon_) settle();
    epsilon_ = epsilon;
    k_ = Real(kBitsPerNat / epsilon);
    damp_a_ = Real(damping(p_.rho_a, epsilon)), damp_b_ = Real(damping(p_.rho_b, epsilon));
  }

  void extrapolate(const StartWeights& start) {
    for (int64_t j = 0; j < w_.m; ++j) w_.start_g[j] = Real(start.now) * w_.g[j] + (start.older != 0 ? Real(start.older) * w_.older_g[j] : Real(0));
  }

  void advance() {
    Real* const f = w_.f;
    w_.f = w_.new_f, w_.new_f = f;
    Real* const g = w_.older_g;
    w_.older_g = w_.g, w_.g = w_.new_g, w_.new_g = g;
  }

  void record(const SinkhornSolution<Real>& out, int64_t t) {
    finish_columns();
    copy(out.history_f + t * out.history_f_stride, w_.f, p_.n);
    copy(out.history_g + t * out.history_g_stride, w_.g, p_.m);
  }

  // ---- one iteration --------------------------------------------------------------------------------------------------

  // new_f and new_g from g, or factors from factors. `fresh`: f and g are not the result of an iteration at this epsilon.
  // `left`: how many iterations follow.
  void iterate(bool fresh, int64_t left) {
    const bool scale = scales_ && left > 0, log = schedule_.method == SinkhornMethod::kLog;  // whose last iteration is of the costs
    if (!fresh && kernel_ok_ && scale) {
      sweep(Form::kScaled);
      scaled_ |= !doubtful_;
      if (!doubtful_) return;
    }
    settle();
    if (!fresh && kernel_ok_ && !scale && (!log || left > 0)) {
      sweep(Form::kStored);
      if (!doubtful_ && drift() < kDrift) return;
    }
    keep_ = stores_ && left > (log ? 1 : 0);
    if (schedule_.method != SinkhornMethod::kProximal)
      for (int64_t j = 0; j < w_.m; ++j) w_.start_g[j] = w_.g[j];
    sweep(fresh ? Form::kFresh : Form::kAbsorbed);
    kernel_ok_ = keep_ && drift() < kDrift;
    keep_ = false;
  }

  // f and g from what scalings have left.
  void settle() {
    if (!scaled_) return;
    scaled_ = false;
    const V zero = {}, k = splat(k_);
    for (int64_t i = 0; i < p_.n; i += kW) {
      const V s = load(w_.new_f + i), sum = doubt_of<Real>(s) > zero ? zero + 1 : s;
      store(w_.f + i, (load(w_.stored_u + i) - log2<Real>(sum)) / k);
    }
    for (int64_t j = 0; j < p_.m; j += kW) {
      const V b = load(w_.b + j), start = load(w_.start_g + j), rest = multiply_add(-k, start, load(w_.exponent + j));
      store(w_.g + j, b > zero ? start + (rest + log2<Real>(load(w_.scale + j) / b)) / k : start);
    }
  }

  // How far scalings have moved since the kernel was stored.
  double drift() const {
    V most = {};
    for (int64_t i = 0; i < p_.n; i += kW) most = larger(most, magnitude(multiply_add(splat(k_), load(w_.new_f + i), -load(w_.stored_u + i))));
    for (int64_t j = 0; j < p_.m; j += kW) most = larger(most, magnitude(k_ * (load(w_.new_g + j) - load(w_.start_g + j))));
    double out = 0;
    for (int64_t lane = 0; lane < kW; ++lane) out = double(most[lane]) > out ? double(most[lane]) : out;
    return out;
  }

  static V magnitude(V x) { return larger(x, -x); }

  bool reads_kernel() const { return form_ == Form::kStored || form_ == Form::kScaled; }

  void sweep(Form form) {
    form_ = form;
    backward_ = !backward_;
    for (int64_t j = 0; j < w_.m && !scaled_; j += kW) {
      const V start = load(w_.start_g + j);
      if (reads_kernel()) {
        store(w_.scale + j, load(w_.b + j) * exp2(k_ * (load(w_.g + j) - start)));
      } else {
        store(w_.exponent + j, column_exponent(load(w_.b + j), start, k_));
      }
    }
    doubtful_ = false;
    team_.run(team_.size, [](void* self, int64_t worker) { static_cast<SinkhornSolver*>(self)->sweep_rows(worker); }, this);
    error_ = 0;
    for (int64_t worker = 0; worker < team_.size; ++worker) {
      const Real* const share = w_.shares + worker * kShare;
      error_ += double(share[0]);
      doubtful_ |= share[1] != 0;
    }
    if (doubtful_) return;
    if (form_ == Form::kScaled) {
      scale_columns();
    } else {
      update_columns();
    }
  }

  int64_t group() const {
    if (reads_kernel()) return kGroup;  // from L2 they are added as well while memory is waited for
    const int64_t rows = kGroupBytes / (w_.m * int64_t(sizeof(Real)) + 1) / 4 * 4;
    return rows < 4 ? 4 : smaller(rows, kGroup);
  }

  int64_t first_row(int64_t worker) const { return worker * p_.n / team_.size; }

  double marginals(const SinkhornSolution<Real>& out) const { return SinkhornMarginals<Real, T>(p_, points_, team_, w_, k_, damp_b_, out).measure(); }

  void sweep_rows(int64_t worker) {
    const FlushDenormals flush;
    if (form_ != Form::kScaled) return weigh(worker);
    Real *const columns = w_.columns + worker * w_.worker_columns, *const share = w_.shares + worker * kShare;
    const int64_t begin = first_row(worker), end = first_row(worker + 1);
    const ScaledRows<Real> rows{w_.kernel, w_.m, p_.m, begin, end, backward_, w_.a, w_.scale, w_.new_f, columns, columns + w_.m};
    share[1] = scale_rows<kGroup>(rows, group()) ? 0 : 1;
    share[0] = schedule_.tol < 0 ? Real(0) : scaled_error(begin, end);
  }

  // The error of rows' marginals before a scaling of them, which left their sums in new_f.
  Real scaled_error(int64_t begin, int64_t end) const {
    V error = {};
    each_vector<Real, 1>(end - begin, [&](int64_t r, int, int64_t count) {
      const int64_t i = begin + r;
      const V before = exp2(multiply_add(splat(k_), load_count<Real>(w_.f + i, count), -load_count<Real>(w_.stored_u + i, count)));
      error += load_count<Real>(w_.a + i, count) * magnitude(before * load_count<Real>(w_.new_f + i, count) - 1);
    });
    return sum_lanes(error);
  }

  // Weighs a worker's rows, a group at a time, each while one before is added to the worker's column sums.
  void weigh(int64_t worker) {
    const bool stored = form_ == Form::kStored || keep_;
    const bool far = form_ != Form::kStored && p_.metric == SinkhornMetric::kGiven && p_.n * p_.m * int64_t(sizeof(T)) > kKeptBytes;
    const int64_t begin = first_row(worker), end = first_row(worker + 1), step = group(), lag = form_ == Form::kStored ? kLag : 1;
    Real *const columns = w_.columns + worker * w_.worker_columns, *const chunk = columns + w_.m;
    Real* const entries = w_.entries + worker * w_.worker_entries;
    for (int64_t j = 0; j < w_.m; ++j) columns[j] = chunk[j] = 0;
    Real error = 0, weights[kLag][kGroup] = {};
    V doubt = {};
    WeightedRows<Real> old[kLag] = {};
    int64_t waiting[kLag] = {};  // rows of old
    const int64_t groups = (end - begin + step - 1) / step;
    const auto first = [&](int64_t q) { return begin + (backward_ ? groups - 1 - q : q) * step; };
    Real guess = Real(__builtin_nan(""));
    for (int64_t q = 0; q < groups; ++q) {
      const int64_t i = first(q), rows = smaller(step, end - i), slot = q % lag;
      if (waiting[slot] != rows) {  // taken together otherwise
        add_rows(old[slot], waiting[slot], p_.m);
        waiting[slot] = 0;
      }
      Real* const e = stored ? w_.kernel + i * w_.m : entries;
      Real sums[kGroup], used[kGroup] = {};
      const int64_t following = q + 1 < groups ? first(q + 1) : i, ahead = following + rows <= end ? following : i;
      weigh_group(i, rows, e, waiting[slot] > 0 ? &old[slot] : nullptr, w_.costs + worker * w_.worker_entries, far ? ahead : -1, sums, used, &guess);
      for (int64_t r = rows; r < kGroup; ++r) sums[r] = 1;
      if (keep_) __builtin_memcpy(w_.stored_u + i, used, size_t(rows) * sizeof(Real));
      error += update_rows(i, rows, sums, form_ == Form::kStored ? w_.stored_u + i : used, weights[slot], &doubt);
      old[slot] = {e, w_.m, weights[slot], chunk}, waiting[slot] = rows;
      if ((q + 1) * step / kChunk != q * step / kChunk) add_chunk(columns, chunk, w_.m);
    }
    for (int64_t q = groups; q < groups + lag; ++q) add_rows(old[q % lag], waiting[q % lag], p_.m);
    add_chunk(columns, chunk, w_.m);
    Real* const share = w_.shares + worker * kShare;
    share[0] = error, share[1] = form_ == Form::kStored ? sum_lanes(doubt) : Real(0);
  }

  // sums_r = sum_j b_j e_rj of rows i ... i + rows, at the exponents `used`, adding as many rows of `old`, where given, to their
  // columns. `ahead` >= 0: rows come from memory, and those from there on follow. `guess`: what makes rows like these sum to 1, or NaN.
  void weigh_group(int64_t i, int64_t rows, Real* e, const WeightedRows<Real>* old, Real* buffer, int64_t ahead, Real* sums, Real* used, Real* guess) {
    V lanes[kGroup];
    if (form_ == Form::kStored) {
      each_rows(rows, [&](int64_t r, auto together) {
        constexpr int kRows = decltype(together)::value;
        if (old != nullptr) {
          weigh_stored<kRows, true>(e + r * w_.m, w_.scale, p_.m, old->from(r), lanes + r);
        } else {
          weigh_stored<kRows, false>(e + r * w_.m, w_.scale, p_.m, WeightedRows<Real>{}, lanes + r);
        }
      });
      return sum_lanes_of(lanes, rows, sums);
    }
    CostRows<Real, T> costs{nullptr, 0, w_.exponent, k_, p_.m};
    costs.c = cost_rows<Real, T>(p_, points_, i, rows, 0, p_.m, buffer, &costs.stride);
    const bool absorbed = form_ == Form::kAbsorbed;
    if (!absorbed && !(*guess - *guess == 0)) *guess = least_exponent(costs);
    for (int64_t r = 0; r < rows; ++r) used[r] = absorbed ? k_ * w_.f[i + r] : *guess;
    each_rows(rows, [&](int64_t r, auto together) {
      constexpr int kRows = decltype(together)::value;
      if (old != nullptr && ahead >= 0) {
        weigh_costs<kRows, true, true>(costs.from(r), used + r, w_.b, e + r * w_.m, old->from(r), lanes + r, costs.from(ahead - i + r));
      } else if (old != nullptr) {
        weigh_costs<kRows, true, false>(costs.from(r), used + r, w_.b, e + r * w_.m, old->from(r), lanes + r);
      } else {
        weigh_costs<kRows, false, false>(costs.from(r), used + r, w_.b, e + r * w_.m, WeightedRows<Real>{}, lanes + r);
      }
    });
    sum_lanes_of(lanes, rows, sums);
    each_rows(rows, [&](int64_t first, auto together) {
      constexpr int kRows = decltype(together)::value;
      bool again = false;
      for (int64_t r = first; r < first + kRows; ++r) {
        if (absorbed ? trusted(sums[r]) : close(sums[r])) continue;
        used[r] = least_exponent(costs.from(r));
        again = true;
      }
      if (!again) return;
      weigh_costs<kRows, false, false>(costs.from(first), used + first, w_.b, e + first * w_.m, WeightedRows<Real>{}, lanes);
      for (int64_t r = 0; r < kRows; ++r) sums[first + r] = sum_lanes(lanes[r]);
    });
    *guess = used[0] - log2<Real>(splat(sums[0]))[0];
  }

  // new_f and the weights of a group of rows; returns the error of their marginals before. `doubt`: not 0 where a sum was not trusted.
  Real update_rows(int64_t i, int64_t rows, const Real* sums, const Real* used, Real* weights, V* doubt) {
    const V zero = {}, k = splat(k_), none = splat(Real(alone(p_.rho_a)));
    const Real relaxation = p_.rho_a > 0 ? Real(kBitsPerNat / p_.rho_a) : Real(0);
    Real error = 0;
    for (int64_t r = 0; r < rows; r += kW) {
      const V s = load(sums + r), u = load(used + r), a = load(w_.a + i + r), l = log2<Real>(s), old = load(w_.f + i + r);
      const V f = s == zero ? none : damp_a_ * (old + (multiply_add(-k, old, u) - l) / k);
      store(weights + r, s == zero ? zero : a * exp2(multiply_add(k, f, -u)));
      store_count(w_.new_f + i + r, f, smaller(kW, rows - r));
      *doubt += doubt_of<Real>(s);
      if (schedule_.tol < 0) continue;
      Real gaps[kW];
      store(gaps, a > zero ? a * magnitude(exp2(multiply_add(k, old, -u) + l) - exp2(-relaxation * old)) : zero);
      for (int64_t lane = 0; lane < smaller(kW, rows - r); ++lane) error += gaps[lane];
    }
    return error;
  }

  // Factors of a stored kernel's columns; doubtful, and the factors as they were, where one is too large or too small.
  void scale_columns() {
    V doubt = {};
    for (int64_t j = 0; j < p_.m; j += kW) {
      V sum = {};
      for (int64_t worker = 0; worker < team_.size; ++worker) sum += load(w_.columns + worker * w_.worker_columns + j);
      const V b = load(w_.b + j), weighty = b > V{} ? sum : V{} + 1;
      doubt += doubt_of<Real>(weighty, kDrifted);
      store(w_.new_g + j, b / weighty);
    }
    doubtful_ = sum_lanes(doubt) > 0;
    if (!doubtful_) copy(w_.scale, w_.new_g, p_.m);
  }

  void update_columns() {
    const V zero = {}, k = splat(k_);
    for (int64_t j = 0; j < p_.m; j += kW) {
      V sum = {};
      for (int64_t worker = 0; worker < team_.size; ++worker) sum += load(w_.columns + worker * w_.worker_columns + j);
      const V start = load(w_.start_g + j), exponent = load(w_.exponent + j);
      const auto weighty = load(w_.b + j) > zero;
      store(w_.new_g + j, weighty ? damp_b_ * (start + (multiply_add(-k, start, exponent) - log2<Real>(sum)) / k) : start);
      if (sum_lanes(weighty ? doubt_of<Real>(sum) : zero) > 0) redo_columns(w_.new_f, w_.new_g, j);
    }
  }

  // A vector of columns' potentials from their own maxima: -lambda_b/k log2 sum_i a_i 2^(k (f_i - C_ij)).
  void redo_columns(const Real* f, Real* g, int64_t j) {
    const int64_t columns = smaller(kW, p_.m - j);
    V most = splat(Real(-1e30)), sum = {};
    int64_t stride = 0;
    for (int64_t i = 0; i < p_.n; ++i) {
      const int64_t panel = j / kPanelWidth<Real> * kPanelWidth<Real>;
      const T* const c = cost_rows<Real, T>(p_, points_, i, 1, panel, kPanelWidth<Real>, w_.costs, &stride) + (j - panel);
      const V x = multiply_add(splat(-k_), load_count<Real>(c, columns), splat(k_ * f[i] + w_.log_a[i]));
      const V larger_one = larger(most, x);
      sum = sum * exp2(most - larger_one) + exp2(x - larger_one);
      most = larger_one;
    }
    Real out[kW];
    store(out, sum == V{} ? splat(Real(alone(p_.rho_b))) : -damp_b_ * ((most + log2<Real>(sum)) / k_));
    __builtin_memcpy(g + j, out, size_t(columns) * sizeof(Real));
  }

  // Columns without weight get the potential that belongs to f.
  void finish_columns() {
    for (int64_t j = 0; j < p_.m; j += kW) {
      bool weightless = false;
      for (int64_t lane = j; lane < smaller(j + kW, p_.m); ++lane) weightless |= !(w_.b[lane] > 0);
      if (weightless) redo_columns(w_.f, w_.g, j);
    }
  }
};

template <class Real>
int64_t sinkhorn_workspace(const SinkhornProblem<Real>& p, const SinkhornSchedule& schedule, int64_t workers) {
  SinkhornArrays<Real> arrays;
  return arrays.place(p, schedule.method, workers, nullptr);
}

template <class Real>
void sinkhorn_solve(const SinkhornProblem<Real>& p, const SinkhornSchedule& schedule, const SinkhornTeam& team, const SinkhornSolution<Real>& out, Real* work) {
  SinkhornArrays<Real> arrays;
  arrays.place(p, schedule.method, team.size, work);
  const SinkhornProblem<Real> q = SinkhornArrays<Real>::keeps_cost(p) ? keep_cost(p, team, arrays) : p;
  with_cost_type<Real>(q, [&](auto element) { SinkhornSolver<Real, decltype(element)>(q, schedule, team, arrays).solve(out); });
}

}  // namespace
