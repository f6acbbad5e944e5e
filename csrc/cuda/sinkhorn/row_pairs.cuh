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
  // Shared memory in floats, twice: largest exponent and sum of each row, of every warp and of every block; and a barrier for those of blocks.
  static constexpr int kPairs = 2 * kRows * kWarps, kOfBlocks = 2 * kRows * kCluster, kBarrier = 4, kShared = kPairs + kOfBlocks + kBarrier;
  static constexpr int64_t kSharedBytes = int64_t(sizeof(float)) * 2 * kShared;
  using Tile = float[kRows][kWidth];

  __device__ RowPairs(const SinkhornRows& rows) : p_(rows), thread_(threadIdx.x), rank_(rows.cluster > 1 ? int(device::cluster_rank()) : 0) {
    if constexpr (device::kClusters) {
      if (rows.cluster == 1) return;
      if (thread_ == 0) device::barrier_init(barrier(0), 1), device::barrier_init(barrier(1), 1), device::barriers_made_for_cluster();
      device::cluster_barrier();
    }
  }

  // Of a range of `rows` rows.
  __device__ int first_row(int part, int rows) const {
    const int each = rows / p_.parts, more = rows % p_.parts;
    return part * each + (part < more ? part : more);
  }

  // Four next to one another to a group.
  __device__ int column(int c) const { return ((rank_ * kGroups + c / 4) * p_.threads + int(thread_)) * 4 + c % 4; }

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

  // What v [columns] has, from `begin` on, for columns c ... c + 3 of this thread, 0 beyond them.
  __device__ void load_columns(const float* v, int64_t begin, int columns, int c, float (&out)[4]) const {
    const int j = device::known_here(column(c));
    device::load_four(v, begin + j, Element::kFloat32, columns % 4 == 0, columns - j, 0, out);
  }

  // Exponents x, in bits, become 2^(x - most[r]), 0 where the warp has nothing and that is -infinity; level(r) is then the largest of all threads' and total(r) their sum of 2^(x - level(r)).
  __device__ void weigh(Tile& x, float (&most)[kRows]) {
    float* const pairs = shared(turn_ & 1);
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
    const int lane = int(thread_ % 32), warps = p_.threads / 32;
    most_ = lane % kWarps < warps ? pairs[2 * lane] : -INFINITY, sum_ = lane % kWarps < warps ? pairs[2 * lane + 1] : 0.0f;
    join(most_, sum_);
    if constexpr (device::kClusters) {
      if (p_.cluster > 1) join_blocks(pairs + kPairs, lane);
    }
    turn_ = (turn_ + 1) & 3;
  }

  __device__ float level(int r) const { return __shfl_sync(~0u, most_, r * kWarps); }
  __device__ float total(int r) const { return __shfl_sync(~0u, sum_, r * kWarps); }

  __device__ int rank() const { return rank_; }

  // Of those that share a row.
  __device__ int warp() const { return rank_ * (p_.threads / 32) + int(thread_ / 32); }

  // One thread of all that share a row.
  __device__ bool first() const { return thread_ == 0 && rank_ == 0; }

 private:
  const SinkhornRows& p_;
  const unsigned thread_;
  const int rank_;
  int turn_ = 0;  // of four: which half of shared memory is next, and the parity of its barrier
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

  __device__ static float* shared(int half) { return device::shared_memory() + half * kShared; }
  __device__ static device::Barrier* barrier(int half) { return reinterpret_cast<device::Barrier*>(shared(half) + kPairs + kOfBlocks); }

  // Blocks send each other what they have. A barrier of the cluster would wait for the rows that are on their way, and empty the cache of what
  // columns have. A block two pairs ahead cannot write what is still read: it has had this one's numbers of the pair between, which followed
  // the barrier of all of this one's threads; and one that leaves has had all that was sent to it.
  __device__ void join_blocks(float* all, int lane) {
    const int row = lane / kWarps, block = lane % kWarps;
    device::Barrier* const barrier = this->barrier(turn_ & 1);
    if (thread_ == 0) device::barrier_expect(barrier, 2 * kRows * int(sizeof(float)) * p_.cluster);
    if (thread_ < 32) {
      const float most[kRows] = {level(0), level(1)}, sum[kRows] = {total(0), total(1)};
      if (lane < p_.cluster) device::send_four(all + 2 * kRows * rank_, barrier, thread_, most[0], sum[0], most[1], sum[1]);
    }
    device::barrier_wait(barrier, unsigned(turn_) >> 1);
    const float* const theirs = all + 2 * (kRows * (block < p_.cluster ? block : 0) + row);
    most_ = block < p_.cluster ? theirs[0] : -INFINITY, sum_ = block < p_.cluster ? theirs[1] : 0.0f;
    join(most_, sum_);
  }
};

// Sets how blocks share a row. False where there are too many columns.
inline bool share_columns(SinkhornRows& rows) {
  const int64_t columns = rows.columns, of_block = int64_t(RowPairs::kThreads) * RowPairs::kWidth;
  rows.cluster = int((columns + of_block - 1) / of_block);
  if (rows.cluster > RowPairs::kCluster) return false;
  const int64_t share = (columns + rows.cluster - 1) / rows.cluster, threads = (share + RowPairs::kWidth - 1) / RowPairs::kWidth;
  rows.threads = int((threads + 31) / 32 * 32);
  return true;
}

inline int64_t pairs_of(int64_t rows) { return (rows + RowPairs::kRows - 1) / RowPairs::kRows; }

}  // namespace kdfast
