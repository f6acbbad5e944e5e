// A pass of the assignment codes over scores [N, K]: softmax of each row of s/epsilon + v, as it is or summed down the columns; or, without
// v, the log-sum-exp of each column. One reading of the scores: a block holds two rows at a time in registers while the next two are on
// their way, and blocks of a cluster share rows of more columns than one has. Columns' parts are added up in a second launch, in order.
#include <math.h>

#include "element.h"
#include "sinkhorn/sinkhorn.h"

namespace kdfast {
namespace {

enum class Pass { kColumnLse, kColumnSums, kCodes };

constexpr int kThreads = 512, kWarps = kThreads / 32, kGroups = 4, kWidth = 4 * kGroups, kRows = 2;  // kWidth: columns of a thread
constexpr int kCluster = 8;
constexpr float kBitsPerNat = 1.4426950408889634f, kNatsPerBit = 0.6931471805599453f;
// Shared memory in floats, twice: largest exponent and sum of each row, of every warp and of the block.
constexpr int kPairs = 2 * kRows * kWarps, kOfBlock = 2 * kRows, kShared = kPairs + kOfBlock;

// -infinity is what nothing amounts to.
__device__ __forceinline__ float shift_of(float most) { return most == -INFINITY ? 0.0f : most; }

template <Pass kPass>
class Assigner {
 public:
  __device__ Assigner(const SinkhornAssign& params)
      : p_(params), thread_(int(threadIdx.x)), rank_(params.cluster > 1 ? int(device::cluster_rank()) : 0) {
    const int unit = int(blockIdx.x) / p_.cluster;
    problem_ = unit / p_.parts, part_ = unit % p_.parts;
    factor_ = kBitsPerNat * *p_.inverse_epsilon;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      v_[c] = kPass != Pass::kColumnLse && column(c) < p_.columns ? kBitsPerNat * p_.v[problem_ * p_.columns + column(c)] : 0.0f;
      sum_[c] = 0, top_[c] = -INFINITY;
    }
  }

  __device__ void run() {
    const int begin = int(part_ * p_.rows / p_.parts), end = int((part_ + 1) * p_.rows / p_.parts);
    float ahead[kRows][kWidth];
    load(begin, end, ahead);
#pragma unroll 1
    for (int i = begin; i < end; i += kRows) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kWidth; ++c) e_[r][c] = fmaf(factor_, ahead[r][c], v_[c]);
      load(i + kRows, end, ahead);
      if constexpr (kPass == Pass::kColumnLse) {
        add_columns();
      } else {
        weigh(i, end);
      }
    }
    if constexpr (kPass != Pass::kCodes) store_parts();
    if (p_.cluster > 1) device::cluster_barrier();
  }

 private:
  const SinkhornAssign& p_;
  const int thread_, rank_;
  int turn_ = 0;
  int64_t problem_, part_;
  float factor_;
  float v_[kWidth], sum_[kWidth], top_[kWidth], e_[kRows][kWidth];

  // Four next to one another to a group.
  __device__ int column(int c) const { return ((rank_ * kGroups + c / 4) * p_.threads + thread_) * 4 + c % 4; }

  // Rows from i on; -infinity beyond `end` and beyond the columns.
  __device__ void load(int i, int end, float (&out)[kRows][kWidth]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = problem_ * p_.batch_stride + (i + r) * p_.row_stride;
#pragma unroll
      for (int c = 0; c < kWidth; c += 4) {
        const int j = device::known_here(column(c)), left = i + r < end ? int(p_.columns) - j : 0;
        device::load_four(p_.scores, at + j, p_.element, p_.aligned, left, -INFINITY, &out[r][c]);
      }
    }
  }

  __device__ void add_columns() {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      float most = top_[c];
#pragma unroll
      for (int r = 0; r < kRows; ++r) most = fmaxf(most, e_[r][c]);
      const float shift = shift_of(most);
      sum_[c] *= device::exp2_fast(top_[c] - shift);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum_[c] += device::exp2_fast(e_[r][c] - shift);
      top_[c] = most;
    }
  }

  __device__ void weigh(int i, int end) {
    float* const pairs = device::shared_memory() + turn_ * kShared;
    turn_ ^= 1;
    float shift[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float most = -INFINITY, sum = 0;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) most = fmaxf(most, e_[r][c]);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
      shift[r] = shift_of(most);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) e_[r][c] = device::exp2_fast(e_[r][c] - shift[r]), sum += e_[r][c];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      if (thread_ % 32 == 0) pairs[2 * (r * kWarps + thread_ / 32)] = most, pairs[2 * (r * kWarps + thread_ / 32) + 1] = sum;
    }
    __syncthreads();
    // Half a warp joins the warps' parts of a row: every warp does, for itself.
    static_assert(kRows == 2 && kWarps == 16, "");
    const int lane = thread_ % 32, warps = p_.threads / 32;
    float most = lane % kWarps < warps ? pairs[2 * lane] : -INFINITY, sum = lane % kWarps < warps ? pairs[2 * lane + 1] : 0.0f;
    join(most, sum);
    if (p_.cluster > 1) join_blocks(pairs + kPairs, lane, most, sum);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float level = __shfl_sync(~0u, most, r * kWarps), total = __shfl_sync(~0u, sum, r * kWarps);
      const float scale = i + r < end ? device::divide(device::exp2_fast(shift[r] - level), total) : 0.0f;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) e_[r][c] *= scale, sum_[c] += e_[r][c];
      if constexpr (kPass == Pass::kCodes) store_row(i + r, end, e_[r]);
    }
  }

  // Over the lanes of half a warp.
  __device__ static void join(float& most, float& sum) {
    const float own = most;
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    sum *= device::exp2_fast(shift_of(own) - shift_of(most));
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  }

  __device__ void join_blocks(float* shared, int lane, float& most, float& sum) const {
    const int row = lane / kWarps;
    if (thread_ < 32 && lane % kWarps == 0) shared[2 * row] = most, shared[2 * row + 1] = sum;
    device::cluster_barrier();
    const int block = lane % kWarps;
    const float* const theirs = device::of_block(shared, unsigned(block < p_.cluster ? block : 0));
    most = block < p_.cluster ? theirs[2 * row] : -INFINITY, sum = block < p_.cluster ? theirs[2 * row + 1] : 0.0f;
    join(most, sum);
  }

  __device__ void store_row(int i, int end, const float (&row)[kWidth]) const {
    float* const to = p_.out + (problem_ * p_.rows + i) * p_.columns;
#pragma unroll
    for (int c = 0; c < kWidth; c += 4) device::store_four(to + column(c), p_.columns % 4 == 0, i < end ? int(p_.columns) - column(c) : 0, &row[c]);
  }

  __device__ void store_parts() const {
    const int64_t to = (problem_ * p_.parts + part_) * p_.columns;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      if (column(c) >= p_.columns) continue;
      p_.sums[to + column(c)] = sum_[c];
      if constexpr (kPass == Pass::kColumnLse) p_.tops[to + column(c)] = top_[c];
    }
  }
};

template <Pass kPass>
__global__ void __launch_bounds__(kThreads, 1) assign_kernel(const SinkhornAssign params) {
  Assigner<kPass>(params).run();
}

// A column's parts, a thread each.
__global__ void __launch_bounds__(256) merge_kernel(const SinkhornAssign p) {
  const int64_t at = int64_t(blockIdx.x) * 256 + threadIdx.x, problem = at / p.columns, from = problem * (p.parts - 1) * p.columns + at;
  if (at >= p.batch * p.columns) return;
  float sum = 0, most = -INFINITY;
  for (int64_t part = 0; p.v == nullptr && part < p.parts; ++part) most = fmaxf(most, p.tops[from + part * p.columns]);
  for (int64_t part = 0; part < p.parts; ++part) {
    const int64_t i = from + part * p.columns;
    sum += p.v == nullptr ? p.sums[i] * device::exp2_fast(shift_of(p.tops[i]) - shift_of(most)) : p.sums[i];
  }
  p.out[at] = p.v == nullptr ? kNatsPerBit * (shift_of(most) + log2f(sum)) : sum;
}

}  // namespace

bool sinkhorn_assign_plan(SinkhornAssign& params) {
  const int64_t columns = params.columns, of_block = int64_t(kThreads) * kWidth;
  params.cluster = int((columns + of_block - 1) / of_block);
  const int64_t share = (columns + params.cluster - 1) / params.cluster, threads = (share + kWidth - 1) / kWidth;
  params.threads = int((threads + 31) / 32 * 32);
  const int64_t blocks = 2048 / params.threads * int64_t(processors()) / params.cluster, rows = (params.rows + kRows - 1) / kRows;
  const int64_t wanted = blocks / params.batch, parts = wanted < rows ? wanted : rows;
  params.parts = parts < 1 ? 1 : parts;
  return params.cluster <= kCluster;
}

const char* sinkhorn_assign(const SinkhornAssign& params, void* stream) {
  const int64_t blocks = params.batch * params.parts * params.cluster;
  const Launch how{blocks, params.threads, int64_t(sizeof(float)) * 2 * kShared, params.cluster, stream};
  if (params.codes) return launch(assign_kernel<Pass::kCodes>, how, params);
  const char* const error = params.v == nullptr ? launch(assign_kernel<Pass::kColumnLse>, how, params) : launch(assign_kernel<Pass::kColumnSums>, how, params);
  return error != nullptr ? error : launch(merge_kernel, Launch{(params.batch * params.columns + 255) / 256, 256, 0, 1, stream}, params);
}

}  // namespace kdfast
