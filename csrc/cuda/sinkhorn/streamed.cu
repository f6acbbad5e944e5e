// Sinkhorn's iterations on costs too large for a chip, each of which reads them once. With k = log2(e)/epsilon and v_j = k g_j + log2 b_j,
//
//   S_i = sum_j 2^(v_j - k C_ij),  f_i = -lambda_a/k log2 S_i,  T_j = sum_i a_i 2^(k f_i) 2^(v_j - k C_ij),  g_j = lambda_b (v_j - log2 T_j)/k
//
// A row is weighed with its true maximum and added to the sums of the columns while it is in registers; a second launch joins the parts of
// these sums, in order, and makes g. Columns without weight, or whose sum has underflown, get theirs from their own maxima there.
#include "sinkhorn/relaxation.cuh"
#include "sinkhorn/row_pairs.cuh"
#include "sinkhorn/schedule.cuh"

namespace kdfast {
namespace {

constexpr float kMaxRow = 0x1p115f;  // rows and columns without weight may be near any others: their sums are reported as at most this
constexpr float kTrusted = 1e30f;  // sums beyond it, or below its inverse, may have over- or underflown

__device__ __forceinline__ int warps_of(const SinkhornRows& rows) { return rows.cluster * (rows.threads / 32); }

// Of a problem's rows or columns.
__device__ __forceinline__ int count_of(const int64_t* counts, int problem, int64_t most) {
  const int64_t given = counts == nullptr ? most : counts[problem];
  return int(given < 0 ? 0 : given > most ? most : given);
}

// v for iteration t.
__device__ __forceinline__ void store_v(const SinkhornStreamed& p, int problem, int64_t at, int t, float g) {
  const float epsilon = epsilon_at(p.schedule, t, p.epsilon[problem]);
  p.v[at] = fmaf(device::divide(kBitsPerNat, epsilon), g, log2f(p.b[at]));
}

__global__ void __launch_bounds__(256) start_kernel(const SinkhornStreamed p) {
  const int64_t at = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (at < p.batch * p.cost.columns) store_v(p, int(at / p.cost.columns), at, 1, p.start_g[at]);
}

// kMeasure: f is known, and the sums are those of a_i b_j E_ij, with what the plan costs and its rows are off.
template <bool kMeasure>
class Streamer {
 public:
  __device__ Streamer(const SinkhornStreamed& params) : p_(params), pairs_(params.cost) {
    const int unit = int(blockIdx.x) / p_.cost.cluster;
    problem_ = unit / p_.cost.parts, part_ = unit % p_.cost.parts;
    rows_ = count_of(p_.rows, problem_, p_.cost.rows), columns_ = count_of(p_.columns, problem_, p_.cost.columns);
    epsilon_ = epsilon_at(p_.schedule, p_.t, p_.epsilon[problem_]);
    k_ = device::divide(kBitsPerNat, epsilon_);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum_[c] = 0;
  }

  __device__ void run() {
    const int begin = pairs_.first_row(part_), end = pairs_.first_row(part_ + 1), real = end < rows_ ? end : rows_;
    RowPairs::Tile costs;
    if constexpr (!kMeasure) load(begin, real, costs);
#pragma unroll 1
    for (int i = begin; i < end; i += kRows) {
      if constexpr (kMeasure) load(i, real, costs);
      form_exponents(costs);
      if constexpr (!kMeasure) load(i + kRows, real, costs);
      float most[kRows];
      pairs_.weigh(e_, most);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float level = pairs_.level(r), total = pairs_.total(r);
        if (i + r < end) add_row(i + r, i + r < real, most[r], level, total, e_[r], costs[r]);
      }
    }
    store_parts();
    pairs_.leave();
  }

 private:
  static constexpr int kRows = RowPairs::kRows, kWidth = RowPairs::kWidth;

  const SinkhornStreamed& p_;
  RowPairs pairs_;
  int problem_, part_, rows_, columns_;
  float epsilon_, k_, spent_ = 0, error_ = 0;
  float sum_[kWidth];
  RowPairs::Tile e_;

  __device__ void load(int i, int end, RowPairs::Tile& out) const { pairs_.load(problem_, i, end, columns_, INFINITY, out); }

  __device__ void form_exponents(const RowPairs::Tile& costs) {
#pragma unroll
    for (int c = 0; c < kWidth; c += 4) {
      float v[4];
      pairs_.load_columns(p_.v, problem_, c, v);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) e_[r][c + i] = fmaf(-k_, costs[r][c + i], v[i]);
    }
  }

  // A row that is not `real` is padding: it has no mass, and f 0.
  __device__ void add_row(int i, bool real, float most, float level, float total, const float (&e)[kWidth], const float (&costs)[kWidth]) {
    const int64_t at = device::known_here(problem_) * p_.cost.rows + i;
    const float a = real ? p_.a[at] : 0.0f;
    if constexpr (kMeasure) {
      measure_row(at, real, a, most, level, total, e, costs);
    } else {
      const float f = total == 0 ? alone(p_.rho_a) : -damping(p_.rho_a, epsilon_) * (shift_of(level) + log2f(total)) * (epsilon_ * kNatsPerBit);
      if (pairs_.first()) store_f(i, at, real ? f : 0.0f);
      add(a, device::exp2_fast(fmaf(k_, f, most)), e);
    }
  }

  __device__ void measure_row(int64_t at, bool real, float a, float most, float level, float total, const float (&e)[kWidth],
                              const float (&costs)[kWidth]) {
    const float f = p_.out.f[at], weight = device::exp2_fast(fmaf(k_, f, most));
    const float row = total == 0 ? 0.0f : total * device::exp2_fast(fmaf(k_, f, shift_of(level)));
    add(a, weight, e);
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      if (e[c] != 0 && a != 0) spent_ = fmaf(a * weight * e[c], costs[c], spent_);  // a forbidden pair costs nothing
    if (!pairs_.first()) return;
    p_.out.row[at] = real ? (row > kMaxRow ? kMaxRow : row) : 0.0f;
    if (a > 0) error_ = fmaf(a, fabsf(row - wanted(p_.rho_a, f)), error_);
  }

  __device__ void add(float a, float weight, const float (&e)[kWidth]) {
    if (a == 0) return;  // rows without weight may be near any column
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum_[c] = fmaf(a * weight, e[c], sum_[c]);
  }

  __device__ void store_f(int i, int64_t at, float f) const {
    p_.out.f[at] = f;
    if (p_.out.history_f != nullptr) p_.out.history_f[(int64_t(problem_) * p_.schedule.iterations + p_.t - 1) * p_.cost.rows + i] = f;
  }

  __device__ void store_parts() {
    const int64_t unit = int64_t(problem_) * p_.cost.parts + part_;
#pragma unroll
    for (int c = 0; c < kWidth; ++c)
      if (pairs_.column(c) < p_.cost.columns) p_.sums[unit * p_.cost.columns + pairs_.column(c)] = sum_[c];
    if constexpr (kMeasure) {
      for (int offset = 16; offset > 0; offset /= 2) spent_ += __shfl_xor_sync(~0u, spent_, offset);
      if (threadIdx.x % 32 == 0) p_.spent[unit * warps_of(p_.cost) + pairs_.warp()] = spent_;
      if (pairs_.first()) p_.errors[unit] = error_;
    }
  }
};

template <bool kMeasure>
__global__ void __launch_bounds__(RowPairs::kThreads, 1) stream_kernel(const SinkhornStreamed params) {
  Streamer<kMeasure>(params).run();
}

// g of a column from its own maxima.
__device__ float exact_g(const SinkhornStreamed& p, int problem, int j, float epsilon) {
  const float k = device::divide(kBitsPerNat, epsilon);
  const int rows = count_of(p.rows, problem, p.cost.rows);
  float most = -INFINITY, sum = 0;
  for (int i = 0; i < rows; ++i) {
    const int64_t row = problem * p.cost.rows + i;
    const float c = device::load_one(p.cost.data, problem * p.cost.batch_stride + i * p.cost.row_stride + j, p.cost.element);
    const float x = fmaf(-k, c, fmaf(k, p.out.f[row], log2f(p.a[row]))), larger = fmaxf(most, x), shift = shift_of(larger);
    sum = sum * device::exp2_fast(most - shift) + device::exp2_fast(x - shift);
    most = larger;
  }
  return sum == 0 ? alone(p.rho_b) : -damping(p.rho_b, epsilon) * (shift_of(most) + log2f(sum)) * (epsilon * kNatsPerBit);
}

// A column a thread: g from the parts of its sum.
__global__ void __launch_bounds__(256) columns_kernel(const SinkhornStreamed p) {
  const int64_t m = p.cost.columns, at = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (at >= p.batch * m) return;
  const int problem = int(at / m), j = int(at % m);
  const float epsilon = epsilon_at(p.schedule, p.t, p.epsilon[problem]);
  float sum = 0, g = 0;
  for (int part = 0; part < p.cost.parts; ++part) sum += p.sums[(int64_t(problem) * p.cost.parts + part) * m + j];
  if (j < count_of(p.columns, problem, m)) {
    const bool trusted = sum < kTrusted && sum > 1 / kTrusted;
    g = trusted ? damping(p.rho_b, epsilon) * (p.v[at] - log2f(sum)) * (epsilon * kNatsPerBit) : exact_g(p, problem, j, epsilon);
  }
  p.out.g[at] = g;
  if (p.out.history_g != nullptr) p.out.history_g[(int64_t(problem) * p.schedule.iterations + p.t - 1) * m + j] = g;
  store_v(p, problem, at, p.t < p.schedule.iterations ? p.t + 1 : p.t, g);
}

// A column a thread, and a problem's totals by its first.
__global__ void __launch_bounds__(256) totals_kernel(const SinkhornStreamed p) {
  const int64_t m = p.cost.columns, at = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (at >= p.batch * m) return;
  const int problem = int(at / m), j = int(at % m);
  const int64_t units = int64_t(problem) * p.cost.parts;
  float sum = 0;
  for (int part = 0; part < p.cost.parts; ++part) sum += p.sums[(units + part) * m + j];
  // of a column without weight what makes its g optimal: 1, or exp(-g/rho)
  const float most = wanted(p.rho_b, p.out.g[at]), optimal = most > kMaxRow ? kMaxRow : most;
  p.out.column[at] = j >= count_of(p.columns, problem, m) ? 0.0f : p.b[at] > 0 ? device::divide(sum, p.b[at]) : optimal;
  if (j > 0) return;
  float spent = 0, error = 0;
  const int share = warps_of(p.cost);
  for (int64_t i = units * share; i < (units + p.cost.parts) * share; ++i) spent += p.spent[i];
  for (int64_t part = units; part < units + p.cost.parts; ++part) error += p.errors[part];
  p.out.transport[problem] = spent, p.out.error[problem] = error, p.out.done[problem] = p.schedule.iterations;
}

}  // namespace

bool sinkhorn_streamed_plan(SinkhornStreamed& params) { return share_rows(params.cost, params.batch, stream_kernel<false>); }

const char* sinkhorn_streamed(SinkhornStreamed params, void* stream) {
  const SinkhornRows& cost = params.cost;
  const Launch rows{params.batch * cost.parts * cost.cluster, cost.threads, RowPairs::kSharedBytes, cost.cluster, stream};
  const Launch columns{(params.batch * cost.columns + 255) / 256, 256, 0, 1, stream};
  const char* error = launch(start_kernel, columns, params);
  for (params.t = 1; error == nullptr && params.t <= params.schedule.iterations; ++params.t) {
    error = launch(stream_kernel<false>, rows, params);
    if (error == nullptr) error = launch(columns_kernel, columns, params);
  }
  params.t = params.schedule.iterations;
  if (error == nullptr) error = launch(stream_kernel<true>, rows, params);
  return error != nullptr ? error : launch(totals_kernel, columns, params);
}

}  // namespace kdfast
