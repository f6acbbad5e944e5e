// Rows of a matrix, two at a time, in the registers of a block's threads or of a cluster's: what a pass needs that must know a whole row
// before it adds the row to sums over the columns, and reads it once.
#pragma once

#include <math.h>

#include "element.h"
#include "sinkhorn/sinkhorn.h"

namespace kdfast {

// -infinity is what nothing amounts to.
__device__ __forceinline__ float shift_of(float most) { return most == -INFINITY ? 0.0f : most; }

class RowPairs {
 public:
  static constexpr int kThreads = 512, kWarps = kThreads / 32, kGroups = 4, kWidth = 4 * kGroups, kRows = 2;  // kWidth: columns of a thread
  static constexpr int kCluster = 8;
  // Shared memory in floats, twice: largest exponent and sum of each row, of every warp and of the block.
  static constexpr int kPairs = 2 * kRows * kWarps, kOfBlock = 2 * kRows, kShared = kPairs + kOfBlock;
  static constexpr int64_t kSharedBytes = int64_t(sizeof(float)) * 2 * kShared;
  using Tile = float[kRows][kWidth];

  __device__ RowPairs(const SinkhornRows& rows) : p_(rows), thread_(int(threadIdx.x)), rank_(rows.cluster > 1 ? int(device::cluster_rank()) : 0) {}

  // Of a range of rows.
  __device__ int first_row(int part) const { return int(part * p_.rows / p_.parts); }

  // Four next to one another to a group.
  __device__ int column(int c) const { return ((rank_ * kGroups + c / 4) * p_.threads + thread_) * 4 + c % 4; }

  // Rows i and i + 1 of a problem; `missing` from row `end` and column `columns` on.
  __device__ void load(int problem, int i, int end, int columns, float missing, Tile& out) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = device::known_here(problem) * p_.batch_stride + device::known_here(i + r) * p_.row_stride;
#pragma unroll
      for (int c = 0; c < kWidth; c += 4) {
        const int j = device::known_here(column(c)), left = i + r < end ? columns - j : 0;
        device::load_four(p_.data, at + j, p_.element, p_.aligned, left, missing, &out[r][c]);
      }
    }
  }

  // What v [B, columns] has for columns c ... c + 3 of this thread, 0 beyond them.
  __device__ void load_columns(const float* v, int problem, int c, float (&out)[4]) const {
    const int columns = int(p_.columns), j = device::known_here(column(c));
    device::load_four(v, int64_t(problem) * columns + j, Element::kFloat32, columns % 4 == 0, columns - j, 0, out);
  }

  // Exponents x, in bits, become 2^(x - most[r]), 0 where the warp has nothing and that is -infinity; level(r) is then the largest of all threads' and total(r) their sum of 2^(x - level(r)).
  __device__ void weigh(Tile& x, float (&most)[kRows]) {
    float* const pairs = device::shared_memory() + turn_ * kShared;
    turn_ ^= 1;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float sum = 0;
      most[r] = -INFINITY;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) most[r] = fmaxf(most[r], x[r][c]);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], offset));
      const float shift = shift_of(most[r]);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) x[r][c] = device::exp2_fast(x[r][c] - shift), sum += x[r][c];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      if (thread_ % 32 == 0) pairs[2 * (r * kWarps + thread_ / 32)] = most[r], pairs[2 * (r * kWarps + thread_ / 32) + 1] = sum;
    }
    __syncthreads();
    // Half a warp joins the warps' parts of a row: every warp does, for itself.
    static_assert(kRows == 2 && kWarps == 16, "");
    const int lane = thread_ % 32, warps = p_.threads / 32;
    most_ = lane % kWarps < warps ? pairs[2 * lane] : -INFINITY, sum_ = lane % kWarps < warps ? pairs[2 * lane + 1] : 0.0f;
    join(most_, sum_);
    if (p_.cluster > 1) join_blocks(pairs + kPairs, lane);
  }

  __device__ float level(int r) const { return __shfl_sync(~0u, most_, r * kWarps); }
  __device__ float total(int r) const { return __shfl_sync(~0u, sum_, r * kWarps); }

  // No block of a cluster leaves while others read its memory.
  __device__ void leave() const {
    if (p_.cluster > 1) device::cluster_barrier();
  }

  // Of those that share a row.
  __device__ int warp() const { return rank_ * (p_.threads / 32) + thread_ / 32; }

  // One thread of all that share a row.
  __device__ bool first() const { return thread_ == 0 && rank_ == 0; }

 private:
  const SinkhornRows& p_;
  const int thread_, rank_;
  int turn_ = 0;
  float most_ = 0, sum_ = 0;  // of the row of this half of the warp

  // Over the lanes of half a warp.
  __device__ static void join(float& most, float& sum) {
    const float own = most;
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    sum *= device::exp2_fast(own - shift_of(most));
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  }

  __device__ void join_blocks(float* shared, int lane) {
    const int row = lane / kWarps;
    if (thread_ < 32 && lane % kWarps == 0) shared[2 * row] = most_, shared[2 * row + 1] = sum_;
    device::cluster_barrier();
    const int block = lane % kWarps;
    const float* const theirs = device::of_block(shared, unsigned(block < p_.cluster ? block : 0));
    most_ = block < p_.cluster ? theirs[2 * row] : -INFINITY, sum_ = block < p_.cluster ? theirs[2 * row + 1] : 0.0f;
    join(most_, sum_);
  }
};

// Sets how blocks share rows, and how many ranges of rows `kernel` has at work at a time, each to its end: more of them would be more sums to
// join, and a last round that leaves most of the GPU idle. False where there are too many columns.
template <class Params>
bool share_rows(SinkhornRows& rows, int64_t batch, void (*kernel)(Params)) {
  const int64_t columns = rows.columns, of_block = int64_t(RowPairs::kThreads) * RowPairs::kWidth;
  rows.cluster = int((columns + of_block - 1) / of_block);
  if (rows.cluster > RowPairs::kCluster) return false;
  const int64_t share = (columns + rows.cluster - 1) / rows.cluster, threads = (share + RowPairs::kWidth - 1) / RowPairs::kWidth;
  rows.threads = int((threads + 31) / 32 * 32);
  const int64_t pairs = (rows.rows + RowPairs::kRows - 1) / RowPairs::kRows;
  const int64_t wanted = resident(kernel, Launch{rows.cluster, rows.threads, RowPairs::kSharedBytes, rows.cluster, nullptr}) / batch;
  const int64_t parts = wanted < pairs ? wanted : pairs;
  rows.parts = int(parts < 1 ? 1 : parts);
  return true;
}

}  // namespace kdfast
