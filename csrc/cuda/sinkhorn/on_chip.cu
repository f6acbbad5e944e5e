// Sinkhorn's iterations on problems that fit on chip: all of them in one launch, a team of threads a problem, its matrix in registers.
//
// With k = log2(e)/epsilon, an iteration is exact,
//
//   f_i = -lambda_a/k log2 sum_j b_j 2^(k (g_j - C_ij)),    g_j = -lambda_b/k log2 sum_i a_i 2^(k (f_i - C_ij))
//
// with true maxima and two readings of the cost (the first iteration, and any at a new epsilon), or scales what is in registers,
//
//   E_ij = 2^(k (f_i + g_j - C_ij)),   u_i = 1 / sum_j E_ij b_j v_j,   v_j = 1 / sum_i E_ij a_i u_i
//
// so that f_i + log2(u_i)/k and g_j + log2(v_j)/k are the potentials: two multiply-adds an entry, and no cost is read. (Relaxed marginals:
// u_i = 2^(k (lambda_a (f_i - log2(s_i)/k) - f_i)), s_i the sum.) An iteration that would leave u or v outside 2^-28 ... 2^28 is undone: what
// underflowed in E would count. Then E is formed anew at the potentials reached, and where that is not enough the iteration is exact.
#include <math.h>

#include "element.h"
#include "sinkhorn/relaxation.cuh"
#include "sinkhorn/schedule.cuh"
#include "sinkhorn/team.cuh"

namespace kdfast {
namespace {

constexpr float kDrift = 0x1p28f;   // of a scaling
constexpr float kTrusted = 1e30f;   // sums beyond it, or below its inverse, may have over- or underflown
constexpr float kMaxExponent = 115; // only pairs without weight exceed it; times their weight it stays 0

// Number: of the cost, float or the bits of a narrow one.
template <class Team, class Number>
class OnChip {
 public:
  __device__ OnChip(const SinkhornOnChip& params, int problem)
      : p_(params.problems), schedule_(params.schedule), out_(params.out), team_(params.cluster), problem_(problem) {
    rows_ = count(p_.rows, p_.n), columns_ = count(p_.columns, p_.m);
    const int64_t row = problem * p_.n + team_.own_row(), column = problem * p_.m + team_.thread;
    a_ = has_row() ? p_.a[row] : 0.0f;
    b_ = has_column() ? p_.b[column] : 0.0f, g_ = has_column() ? params.start_g[column] : 0.0f;
  }

  __device__ void solve() {
    int t = 1;
    for (; t <= schedule_.iterations; ++t) {
      const float last = p_.epsilon[problem_], now = epsilon_at(schedule_, t, last);
      const bool fresh = t == 1 || now != epsilon_;
      tests_ = schedule_.tol >= 0 && t > 1 && epsilon_ == last;
      if (fresh) settle(), epsilon_ = now;
      if (iterate(fresh, t) == Outcome::kConverged) break;
      record(t - 1);
    }
    settle();
    finish(t - 1);
    for (--t; t < schedule_.iterations; ++t) record(t);
    team_.leave();
  }

 private:
  enum class Outcome { kDone, kConverged, kOutOfRange };
  enum class Kernel { kNone, kFormed, kScaled };  // E is not that of f and g; it is; and u and v have moved since

  static constexpr int R = Team::kThreadRows, C = Team::kThreadColumns;

  const SinkhornBatch& p_;
  const SinkhornSchedule& schedule_;
  const SinkhornSolution& out_;
  Team team_;
  const int problem_;
  int rows_, columns_;
  float epsilon_ = 0;
  bool tests_ = false;                         // whether an iteration may find that the last one has converged
  Kernel kernel_ = Kernel::kNone;
  float a_, f_ = 0, u_ = 1;                    // of the own row
  float b_, g_, v_ = 1;                        // of the own column
  float e_[R][C], scale_[C];                   // E; b_j v_j of this thread's columns

  __device__ int count(const int64_t* counts, int64_t most) const {
    const int64_t given = counts == nullptr ? most : counts[problem_];
    return int(given < 0 ? 0 : given > most ? most : given);
  }
  __device__ bool has_row() const { return team_.own_row() < rows_; }
  __device__ bool has_column() const { return team_.thread < columns_; }
  __device__ float bits() const { return device::divide(kBitsPerNat, epsilon_); }  // k
  __device__ float unit() const { return epsilon_ * kNatsPerBit; }  // 1/k, of the cost a bit

  // ---- what this thread reads -----------------------------------------------------------------------------------------

  // A row's costs; padding is as good as forbidden. `columns` are those from this thread's first on, none where there is no row.
  __device__ void load_row(const Number* at, int columns, float (&out)[C]) const {
#pragma unroll
    for (int c = 0; c < C; ++c) out[c] = Team::kLanes * c < columns ? wide(at[Team::kLanes * c]) : INFINITY;
  }
  __device__ float wide(float x) const { return x; }
  __device__ float wide(uint16_t bits) const { return device::float_of(bits, p_.element); }
  __device__ int columns_of(int r, int rows) const { return r < rows ? columns_ - team_.lane : 0; }

  __device__ const Number* first_cost() const {
    return device::known_here(static_cast<const Number*>(p_.cost) + problem_ * p_.batch_stride + team_.first_row() * p_.row_stride + team_.lane);
  }

  __device__ void load_costs() {
    const Number* at = first_cost();
    const int rows = device::known_here(rows_ - team_.first_row());
#pragma unroll
    for (int r = 0; r < R; ++r, at += p_.row_stride) load_row(at, columns_of(r, rows), e_[r]);
  }

  // ---- one iteration --------------------------------------------------------------------------------------------------

  __device__ Outcome iterate(bool fresh, int t) {
#pragma unroll 1
    while (!fresh) {
      if (kernel_ == Kernel::kNone) form();
      const Outcome outcome = scale();
      if (outcome != Outcome::kOutOfRange) return outcome;
      const bool moved = kernel_ == Kernel::kScaled;
      settle();
      if (!moved) break;
    }
    float start = g_;
    if (schedule_.proximal && t > 1) start = device::divide(2 * (float(t) - 1) * g_ - (float(t) - 2) * team_.parked(), float(t));
    return exact(start);
  }

  // Potentials in place of scalings.
  __device__ void settle() {
    f_ = now_f(), g_ = now_g();
    u_ = v_ = 1, kernel_ = Kernel::kNone;
  }
  __device__ float now_f() const { return u_ == 1 ? f_ : fmaf(unit(), log2f(u_), f_); }
  __device__ float now_g() const { return v_ == 1 ? g_ : fmaf(unit(), log2f(v_), g_); }

  __device__ void form() {
    const float k = bits();
    float g[C];
    team_.spread(g_, g);
    load_costs();
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float f = team_.of_row(f_, r);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const float x = k * (f + g[c] - e_[r][c]);
        e_[r][c] = device::exp2_fast(x > kMaxExponent ? kMaxExponent : x);
      }
    }
    team_.spread(b_, scale_);
    kernel_ = Kernel::kFormed;
  }

  // The scaling that a sum stands for, and whether both are in range.
  __device__ float scaling(float sum, float potential, float rho, bool* in_range) const {
    const float x = rho > 0 ? device::exp2_fast(bits() * (damping(rho, epsilon_) * fmaf(-unit(), log2f(sum), potential) - potential)) : device::reciprocal(sum);
    *in_range = x < kDrift && x > 1 / kDrift && sum < kTrusted && sum > 1 / kTrusted;
    return x;
  }

  // Of the own row, once among the lanes that own it.
  __device__ float row_error(float marginal, float f) const {
    return a_ > 0 && team_.first_owner() ? a_ * fabsf(marginal - wanted(p_.rho_a, f)) : 0.0f;
  }

  // Out of range: u and v are what they were, scale_ is not.
  __device__ Outcome scale() {
    float part[R], add[C];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      part[r] = 0;
#pragma unroll
      for (int c = 0; c < C; ++c) part[r] = fmaf(e_[r][c], scale_[c], part[r]);
    }
    const float sum = team_.row_total(part, Add());
    bool right;
    const float u = scaling(sum, f_, p_.rho_a, &right), weight = has_row() ? a_ * u : 0.0f;
#pragma unroll
    for (int c = 0; c < C; ++c) add[c] = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float w = team_.of_row(weight, r);
#pragma unroll
      for (int c = 0; c < C; ++c) add[c] = fmaf(e_[r][c], w, add[c]);
    }
    const float error = tests_ ? row_error(u_ * sum, now_f()) : 0.0f;
    const auto total = team_.columns(add, Add(), has_row() && !right, tests_, error);
    if (total.flag) return Outcome::kOutOfRange;
    if (tests_ && total.error <= schedule_.tol) return Outcome::kConverged;
    const float v = scaling(total.column, g_, p_.rho_b, &right);
    if (team_.spread(has_column() ? b_ * v : 0.0f, scale_, has_column() && !right)) return Outcome::kOutOfRange;
    if (has_row()) u_ = u;
    if (has_column()) v_ = v;
    kernel_ = Kernel::kScaled;
    return Outcome::kDone;
  }

  // The potential that belongs to a sum of 2^(. - shift), and the sum's logarithm.
  __device__ float potential(float shift, float sum, float rho, float* level) const {
    *level = sum == 0 ? -INFINITY : shift + log2f(sum);
    return sum == 0 ? alone(rho) : -damping(rho, epsilon_) * (*level * unit());
  }
  __device__ static float finite(float shift) { return fabsf(shift) < INFINITY ? shift : 0.0f; }

  __device__ Outcome exact(float start) {
    const float k = bits();
    float line[C], part[R], sums[C], level;
    team_.spread(fmaf(k, start, log2f(device::known_here(b_))), line);
    load_costs();
#pragma unroll
    for (int r = 0; r < R; ++r) {
      part[r] = -INFINITY;
#pragma unroll
      for (int c = 0; c < C; ++c) e_[r][c] = fmaf(-k, e_[r][c], line[c]), part[r] = fmaxf(part[r], e_[r][c]);
    }
    const float row_shift = finite(team_.row_total(part, Larger()));
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float shift = team_.of_row(row_shift, r);
      part[r] = 0;
#pragma unroll
      for (int c = 0; c < C; ++c) part[r] += device::exp2_fast(e_[r][c] - shift);
    }
    const float f = potential(row_shift, team_.row_total(part, Add()), p_.rho_a, &level);
    const float error = tests_ ? row_error(device::exp2_fast(fmaf(k, f_, level)), f_) : 0.0f;

    const float line_f = fmaf(k, f, log2f(device::known_here(a_)));
    load_costs();
#pragma unroll
    for (int c = 0; c < C; ++c) sums[c] = -INFINITY;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float x = team_.of_row(line_f, r);
#pragma unroll
      for (int c = 0; c < C; ++c) e_[r][c] = fmaf(-k, e_[r][c], x), sums[c] = fmaxf(sums[c], e_[r][c]);
    }
    const auto most = team_.columns(sums, Larger(), false, tests_, error);
    if (tests_ && most.error <= schedule_.tol) return Outcome::kConverged;
    const float column_shift = finite(most.column);
    team_.spread(column_shift, line);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      sums[c] = 0;
#pragma unroll
      for (int r = 0; r < R; ++r) sums[c] += device::exp2_fast(e_[r][c] - line[c]);
    }
    const auto total = team_.columns(sums, Add(), false);
    if (schedule_.proximal) team_.park(g_);
    f_ = has_row() ? f : 0.0f, g_ = has_column() ? potential(column_shift, total.column, p_.rho_b, &level) : 0.0f;
    return Outcome::kDone;
  }

  // ---- what the potentials make ---------------------------------------------------------------------------------------

  __device__ void record(int t) const {
    if (out_.history_f == nullptr) return;
    const int64_t at = int64_t(problem_) * schedule_.iterations + t;
    if (writes_row()) out_.history_f[at * p_.n + team_.own_row()] = now_f();
    if (writes_column()) out_.history_g[at * p_.m + team_.thread] = now_g();
  }
  __device__ bool writes_row() const { return team_.own_row() < p_.n && team_.first_owner(); }
  __device__ bool writes_column() const { return team_.thread < p_.m && team_.rank == 0; }

  __device__ void finish(int done) {
    const float k = bits();
    float g[C], b[C], paid[C], sums[C], row = 0, spent = 0;
    const Number* at = first_cost();
    team_.spread(g_, g);
    team_.spread(b_, b);
#pragma unroll
    for (int c = 0; c < C; ++c) sums[c] = 0;
#pragma unroll 1
    for (int r = 0; r < R; ++r, at += p_.row_stride) {
      const float f = team_.of_row(f_, r), a = team_.of_row(a_, r);
      float part = 0;
      load_row(at, columns_of(r, rows_ - team_.first_row()), paid);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const float x = k * (f + g[c] - paid[c]);
        const float e = device::exp2_fast(x > kMaxExponent ? kMaxExponent : x), mass = a * (b[c] * e);
        part = fmaf(b[c], e, part), sums[c] = fmaf(a, e, sums[c]);
        if (mass != 0) spent = fmaf(mass, paid[c], spent);  // a forbidden pair costs nothing
      }
      part = team_.over_lanes(part);
      if (team_.own_row() == team_.first_row() + r) row = part;
    }
    const auto total = team_.columns(sums, Add(), false, true, row_error(row, f_));
    team_.spread(0, g);  // between two calls of columns
    const float transport = team_.columns(sums, Add(), false, true, spent).error;
    const int64_t own_row = problem_ * p_.n + team_.own_row(), own_column = problem_ * p_.m + team_.thread;
    if (writes_row()) out_.f[own_row] = f_, out_.row[own_row] = has_row() ? row : 0.0f;
    if (writes_column()) out_.g[own_column] = g_, out_.column[own_column] = has_column() ? total.column : 0.0f;
    if (team_.thread == 0 && team_.rank == 0) out_.transport[problem_] = transport, out_.error[problem_] = total.error, out_.done[problem_] = done;
  }
};

template <class Team, class Number>
__global__ void __launch_bounds__(Team::kThreads, 512 / Team::kThreads) on_chip_kernel(const SinkhornOnChip params) {
  const int team = int(blockIdx.x) / params.cluster * Team::kTeams + int(threadIdx.x) * Team::kTeams / Team::kThreads;
  if (team < params.problems.batch) OnChip<Team, Number>(params, team).solve();
}

template <class Team>
const char* run(const SinkhornOnChip& params, void* stream) {
  const int64_t blocks = (params.problems.batch + Team::kTeams - 1) / Team::kTeams * params.cluster;
  const auto kernel = params.problems.element == Element::kFloat32 ? on_chip_kernel<Team, float> : on_chip_kernel<Team, uint16_t>;
  return launch(kernel, Launch{blocks, Team::kThreads, Team::kSharedBytes, params.cluster, stream}, params);
}

// A warp or less holds small problems, several to a block; larger ones take 4 or 16 warps, and blocks of a cluster 128 rows each.
using Four = Team<4, 1, 4, 1>;
using Eight = Team<8, 1, 8, 1>;
using Warp = Team<32, 1, 32, 1>;
using Quarter = Team<32, 4, 16, 2>;
using Square = Team<32, 16, 8, 4>;
using Wide = Team<32, 16, 8, 8>;
static_assert(Square::kRows == Wide::kRows, "");
constexpr int64_t kCluster = 8;  // blocks, on every device that has clusters

}  // namespace

bool sinkhorn_fits_on_chip(int64_t n, int64_t m) { return m <= Wide::kColumns && n <= Wide::kRows * (has_clusters() ? kCluster : 1); }

const char* sinkhorn_on_chip(SinkhornOnChip params, void* stream) {
  const int64_t n = params.problems.n, m = params.problems.m, most = n > m ? n : m;
  params.cluster = 1;
  if (most <= 4) return run<Four>(params, stream);
  if (most <= 8) return run<Eight>(params, stream);
  if (most <= 32) return run<Warp>(params, stream);
  if (most <= 64) return run<Quarter>(params, stream);
  params.cluster = int((n + Wide::kRows - 1) / Wide::kRows);
  if (m > Wide::kColumns || params.cluster > kCluster) return "the problems do not fit on chip";
  return m <= Square::kColumns ? run<Square>(params, stream) : run<Wide>(params, stream);
}

}  // namespace kdfast
