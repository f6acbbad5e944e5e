// Sinkhorn's iterations on costs too large for a chip, each of which reads them once. With k = log2(e)/epsilon and v_j = k g_j + log2 b_j,
//
//   S_i = sum_j 2^(v_j - k C_ij),  f_i = -lambda_a/k log2 S_i,  T_j = sum_i a_i 2^(k f_i) 2^(v_j - k C_ij),  g_j = lambda_b (v_j - log2 T_j)/k
//
// A row is weighed with its true maximum and added to the sums of the columns while it is in registers; then the blocks of a problem wait for
// one another, each makes its share of g from the parts of these sums, and they wait once more. Every pass begins with the rows the last one
// ended with: they are in registers, what came before them in cache.
#pragma once

#include "grid_barrier.cuh"
#include "sinkhorn/column_join.cuh"
#include "sinkhorn/relaxation.cuh"
#include "sinkhorn/row_pairs.cuh"
#include "sinkhorn/schedule.cuh"

namespace kdfast {
namespace {

constexpr float kMaxRow = 0x1p115f;  // rows and columns without weight may be near any others: their sums are reported as at most this
constexpr float kTrusted = 1e30f;    // sums beyond it, or below its inverse, may have over- or underflown

struct StreamerParams {
  SinkhornStreamed problems;
  // Scratch. Of a slot, where a problem is solved: [width]; [parts, width]; [parts, warps]; [2, parts], while there are iterations and after
  // them; [GridBarrier::kApart]. Of a problem, where there is a tolerance, f of every second iteration: [n].
  float *v, *sums, *spent, *errors;
  unsigned* counts;
  float* other_f;
  int width, warps;  // of columns, for ColumnJoin; that share a row
};

// Thread 0's numbers, in shared memory.
struct alignas(16) Notes {
  unsigned signals;
  float error;
};

class Streamer {
 public:
  static int64_t shared_bytes(int threads) { return RowPairs::kSharedBytes + int64_t(sizeof(Notes)) + int64_t(sizeof(float)) * ColumnJoin::kFloats * (threads / 32); }

  __device__ explicit Streamer(const StreamerParams& params)
      : all_(params), p_(params.problems), pairs_(p_.cost), slot_(int(blockIdx.x) / blocks()) {
    if (threadIdx.x == 0) GridBarrier::start(&notes().signals);
  }

  __device__ void run() {
#pragma unroll 1
    for (problem_ = slot_; problem_ < p_.batch; problem_ += p_.slots) solve();
  }

 private:
  static constexpr int kRows = RowPairs::kRows, kWidth = RowPairs::kWidth;

  const StreamerParams& all_;
  const SinkhornStreamed& p_;
  RowPairs pairs_;
  int slot_, problem_, columns_, end_;
  int step_;    // of rows, back or forth
  bool tests_;  // whether the last iteration's rows may be found to be near enough
  float k_, scale_, spent_;  // scale_: lambda_a/k
  float sum_[kWidth];
  RowPairs::Tile costs_, e_;

  // For the blocks of this problem. What has been derived from these numbers is not kept through the passes, which need the registers.
  __device__ void wait() {
    GridBarrier::wait(all_.counts + slot_ * GridBarrier::kApart, &notes().signals, blocks());
    slot_ = device::known_here(slot_), problem_ = device::known_here(problem_);
    columns_ = device::known_here(columns_), end_ = device::known_here(end_);
  }
  __device__ int blocks() const { return p_.cost.cluster * p_.cost.parts; }
  __device__ int part() const { return device::known_here(int(blockIdx.x)) / p_.cost.cluster % p_.cost.parts; }
  __device__ int block() const { return part() * p_.cost.cluster + pairs_.rank(); }
  // Of the slot.
  __device__ int64_t parts_before() const { return int64_t(device::known_here(slot_)) * p_.cost.parts; }
  __device__ float& v(int j) const { return all_.v[int64_t(device::known_here(slot_)) * all_.width + j]; }
  __device__ float* sums() const { return all_.sums + parts_before() * all_.width; }
  __device__ float* spent() const { return all_.spent + parts_before() * all_.warps; }
  __device__ float* errors() const { return all_.errors + 2 * parts_before(); }
  __device__ int64_t row(int i) const { return device::known_here(problem_) * p_.cost.rows + i; }
  __device__ int64_t column(int j) const { return device::known_here(problem_) * p_.cost.columns + j; }
  // With a tolerance an iteration may turn out to be one too many: it leaves the f before it.
  __device__ float* f_of(int t) const { return all_.other_f != nullptr && t % 2 != 0 ? all_.other_f : p_.out.f; }

  __device__ static int count_of(const int64_t* counts, int problem, int64_t most) {
    const int64_t given = counts == nullptr ? most : counts[problem];
    return int(given < 0 ? 0 : given > most ? most : given);
  }
  __device__ int rows() const { return count_of(p_.rows, device::known_here(problem_), p_.cost.rows); }
  // Of this part's rows, of which end_ is the end.
  __device__ int begin() const { return pairs_.first_row(part(), rows()); }
  __device__ float epsilon_of(int t) const { return epsilon_at(p_.schedule, t, p_.epsilon[problem_]); }
  __device__ void use(float epsilon) { k_ = device::divide(kBitsPerNat, epsilon), scale_ = damping(p_.rho_a, epsilon) * (epsilon * kNatsPerBit); }

  __device__ void solve() {
    const int steps = p_.schedule.iterations;
    columns_ = count_of(p_.columns, problem_, p_.cost.columns);
    end_ = pairs_.first_row(part() + 1, rows());
    step_ = kRows;
    load(begin());
    start();
    wait();
    int t = 1;
#pragma unroll 1
    for (; t <= steps; ++t) {
      tests_ = p_.schedule.tol >= 0 && t > 1 && epsilon_of(t - 1) == p_.epsilon[problem_];
      use(epsilon_of(t));
      pass<false>(t);
      wait();
      if (tests_ && total(errors(), p_.cost.parts) <= p_.schedule.tol) break;
      join(t);
      wait();
    }
    use(epsilon_of(t - 1));
    pass<true>(t - 1);
    wait();
    finish(t - 1);
  }

  // ---- a pass over this part's rows ---------------------------------------------------------------------------------------

  __device__ void load(int i) { pairs_.load(problem_, i, end_, columns_, INFINITY, costs_); }

  // Iteration t. kMeasure: f is known, and the sums are those of a_i b_j E_ij, with what the plan costs and its rows are off.
  template <bool kMeasure>
  __device__ void pass(int t) {
    const int first = begin(), pairs = (end_ - first + kRows - 1) / kRows;
    int i = step_ > 0 ? first : first + kRows * (pairs - 1);
    spent_ = 0;
    if (threadIdx.x == 0) notes().error = 0;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum_[c] = 0;
#pragma unroll 1
    for (int left = pairs; left > 0; --left, i += step_) {
      float a[kRows], f[kRows], most[kRows];  // f: the last iteration's, or with kMeasure this one's
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        a[r] = i + r < end_ ? p_.a[row(i + r)] : 0.0f;
        f[r] = (kMeasure || tests_) && i + r < end_ ? f_of(kMeasure ? t : t - 1)[row(i + r)] : 0.0f;
      }
      form_exponents();
      if (!kMeasure && left > 1) load(i + step_);
      pairs_.weigh(e_, most);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float level = pairs_.level(r), total = pairs_.total(r);
        if (i + r < end_) add_row<kMeasure>(t, i + r, a[r], f[r], most[r], level, total, e_[r], costs_[r]);
      }
      if (kMeasure && left > 1) load(i + step_);
    }
    step_ = -step_;
    store_parts<kMeasure>();
  }

  __device__ void form_exponents() {
    const int64_t from = int64_t(device::known_here(slot_)) * all_.width;
#pragma unroll
    for (int c = 0; c < kWidth; c += 4) {
      float v[4];
      pairs_.load_columns(all_.v, from, all_.width, c, v);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) e_[r][c + i] = fmaf(-k_, costs_[r][c + i], v[i]);
    }
  }

  template <bool kMeasure>
  __device__ void add_row(int t, int i, float a, float f, float most, float level, float total, const float (&e)[kWidth], const float (&costs)[kWidth]) {
    const float sum = !kMeasure && !tests_ ? 0.0f : total == 0 ? 0.0f : total * device::exp2_fast(fmaf(k_, f, shift_of(level)));
    if (pairs_.first() && (kMeasure || tests_) && a > 0) notes().error = fmaf(a, fabsf(sum - wanted(p_.rho_a, f)), notes().error);
    if constexpr (!kMeasure) f = total == 0 ? alone(p_.rho_a) : -scale_ * (shift_of(level) + log2f(total));
    const float weight = a * device::exp2_fast(fmaf(k_, f, most));
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      if (a != 0) sum_[c] = fmaf(weight, e[c], sum_[c]);  // rows without weight may be near any column
      if (kMeasure && a != 0 && e[c] != 0) spent_ = fmaf(weight * e[c], costs[c], spent_);  // a forbidden pair costs nothing
    }
    if (!pairs_.first()) return;
    if constexpr (kMeasure) {
      p_.out.f[row(i)] = f, p_.out.row[row(i)] = sum > kMaxRow ? kMaxRow : sum;
    } else {
      f_of(t)[row(i)] = f;
      if (p_.out.history_f != nullptr) history_of_row(t, i) = f;
    }
  }

  __device__ float& history_of_row(int t, int i) const { return p_.out.history_f[(int64_t(problem_) * p_.schedule.iterations + t - 1) * p_.cost.rows + i]; }
  __device__ float& history_of_column(int t, int j) const {
    return p_.out.history_g[(int64_t(problem_) * p_.schedule.iterations + t - 1) * p_.cost.columns + j];
  }

  template <bool kMeasure>
  __device__ void store_parts() {
    const int part = this->part();
    float* const to = sums() + int64_t(part) * all_.width;
#pragma unroll
    for (int c = 0; c < kWidth; c += 4)
      if (const int j = pairs_.column(c); j < all_.width) device::store_four(to + j, true, 4, &sum_[c]);
    if (kMeasure) {
      for (int offset = 16; offset > 0; offset /= 2) spent_ += __shfl_xor_sync(~0u, spent_, offset);
      if (threadIdx.x % 32 == 0) spent()[part * all_.warps + pairs_.warp()] = spent_;
    }
    if (pairs_.first()) errors()[(kMeasure ? p_.cost.parts : 0) + part] = notes().error;
  }

  // ---- between two passes ---------------------------------------------------------------------------------------------------

  // By every warp, in the same order.
  __device__ static float total(const float* x, int count) {
    float sum = 0;
    for (int i = device::known_here(int(threadIdx.x) % 32); i < count; i += 32) sum += x[i];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    return sum;
  }

  __device__ static Notes& notes() { return *reinterpret_cast<Notes*>(device::shared_memory() + RowPairs::kSharedBytes / int64_t(sizeof(float))); }

  __device__ ColumnJoin columns() const {
    float* const shared = reinterpret_cast<float*>(&notes() + 1);
    return {p_.cost.parts, all_.width, block(), blocks(), p_.cost.threads, shared};
  }

  // What a column's sum takes from row i, in bits, from f of iteration t.
  __device__ void exponents(int t, int i, int j, float (&out)[4]) const {
    const int64_t at = problem_ * p_.cost.batch_stride + i * p_.cost.row_stride + j;
    const float x = fmaf(k_, f_of(t)[row(i)], log2f(p_.a[row(i)]));
    float c[4];
    device::load_four(p_.cost.data, at, p_.cost.element, p_.cost.aligned, columns_ - j, INFINITY, c);
#pragma unroll
    for (int n = 0; n < 4; ++n) out[n] = fmaf(-k_, c[n], x);
  }

  // lambda_b/k of iteration t.
  __device__ float scale_of_columns(int t) const {
    const float epsilon = epsilon_of(t);
    return damping(p_.rho_b, epsilon) * (epsilon * kNatsPerBit);
  }
  __device__ float potential(float scale, float level) const { return level == -INFINITY ? alone(p_.rho_b) : -scale * level; }

  // v where the next pass is at 1/k bits and column j starts from g; beyond the columns a number that forbidden pairs make nothing of.
  __device__ void store_v(int j, float k, float g) const { v(j) = j < columns_ ? fmaf(k, g, log2f(p_.b[column(j)])) : 0.0f; }

  __device__ void start() const {
    const float k = device::divide(kBitsPerNat, epsilon_of(1));
    for (int j = block() * p_.cost.threads + int(threadIdx.x); j < all_.width; j += blocks() * p_.cost.threads)
      store_v(j, k, j < columns_ ? p_.start_g[column(j)] : 0.0f);
  }

  // g of iteration t, and what the next starts from. Columns without weight have theirs made at the end, unless each is asked for.
  __device__ void join(int t) const {
    const bool more = t < p_.schedule.iterations;
    const float k = device::divide(kBitsPerNat, epsilon_of(more ? t + 1 : t)), scale = scale_of_columns(t);
    const auto put = [&](int j, float g) {
      float from = g;
      if (j < p_.cost.columns) {
        float& kept = p_.out.g[column(j)];
        if (p_.schedule.proximal && more && t > 1) from = device::divide(2 * float(t) * g - (float(t) - 1) * kept, float(t + 1));
        kept = g;
        if (p_.out.history_g != nullptr) history_of_column(t, j) = g;
      }
      store_v(j, k, from);
    };
    columns().run(
        sums(), rows(),
        [&](int j, float sum) {
          if (j >= columns_ || (p_.out.history_g == nullptr && p_.b[column(j)] == 0)) {
            put(j, 0);
          } else if (sum < kTrusted && sum > 1 / kTrusted) {
            put(j, scale * (v(j) - log2f(sum)));
          } else {
            return false;
          }
          return true;
        },
        [&](int i, int j, float(&out)[4]) { exponents(t, i, j, out); }, [&](int j, float level) { put(j, potential(scale, level)); });
  }

  // What there is beside f and the rows' sums, after `done` iterations: of padding 0, of iterations that were not needed what the last gave.
  __device__ void finish(int done) const {
    const auto put = [&](int j, float sum) {
      p_.out.column[column(j)] = sum;
      for (int t = done + 1; p_.out.history_g != nullptr && t <= p_.schedule.iterations; ++t) history_of_column(t, j) = p_.out.g[column(j)];
    };
    columns().run(
        sums(), rows(),
        [&](int j, float sum) {
          if (j >= p_.cost.columns) return true;
          const float b = j < columns_ ? p_.b[column(j)] : 0.0f;
          if (j < columns_ && !(b > 0)) return false;
          put(j, j < columns_ ? device::divide(sum, b) : 0.0f);
          return true;
        },
        [&](int i, int j, float(&out)[4]) { exponents(done, i, j, out); },
        [&](int j, float level) {
          const float g = potential(scale_of_columns(done), level), optimal = wanted(p_.rho_b, g);  // of a column without weight what makes its g optimal
          p_.out.g[column(j)] = g;
          put(j, optimal > kMaxRow ? kMaxRow : optimal);
        });
    if (pairs_.rank() != 0) return;
    finish_rows(done);
    if (part() != 0 || threadIdx.x >= 32) return;
    const float paid = total(spent(), p_.cost.parts * all_.warps), error = total(errors() + p_.cost.parts, p_.cost.parts);
    if (threadIdx.x == 0) p_.out.transport[problem_] = paid, p_.out.error[problem_] = error, p_.out.done[problem_] = done;
  }

  __device__ void finish_rows(int done) const {
    const int steps = p_.out.history_f == nullptr ? 0 : p_.schedule.iterations, n = int(p_.cost.rows), threads = p_.cost.threads;
    const int thread = device::known_here(int(threadIdx.x));
    for (int i = begin() + thread; i < end_; i += threads)
      for (int t = done + 1; t <= steps; ++t) history_of_row(t, i) = p_.out.f[row(i)];
    for (int i = rows() + part() * threads + thread; i < n; i += p_.cost.parts * threads) {
      p_.out.f[row(i)] = p_.out.row[row(i)] = 0;
      for (int t = 1; t <= steps; ++t) history_of_row(t, i) = 0;
    }
  }
};

}  // namespace
}  // namespace kdfast
