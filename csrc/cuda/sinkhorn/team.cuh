// Threads that hold a matrix in registers, and its sums along either side.
//
// A team is `Lanes` x `Warps` threads of a block (Lanes < 32: several teams to a warp), of each block of a cluster. Thread (lane, warp) of
// block `rank` holds rows (rank Warps + warp) R + r, r < R, and columns lane + Lanes c, c < C. Row i is owned by the lanes that row_sums
// leaves its sum in, column j by thread j of every block.
#pragma once

#include "device.h"

namespace kdfast {

struct Add {
  __device__ __forceinline__ float operator()(float x, float y) const { return x + y; }
  static constexpr float kNone = 0;
};
struct Larger {
  __device__ __forceinline__ float operator()(float x, float y) const { return fmaxf(x, y); }
  static constexpr float kNone = -INFINITY;
};

template <int Lanes, int Warps, int R, int C>
class Team {
 public:
  static constexpr int kLanes = Lanes, kThreadRows = R, kThreadColumns = C;
  static constexpr int kRows = Warps * R, kColumns = Lanes * C;  // of a block
  static constexpr int kThreads = Warps > 1 ? Lanes * Warps : 128, kTeams = Warps > 1 ? 1 : kThreads / Lanes;  // to a block
  // Shared memory in floats: partial sums of columns, with an error for each warp; two of what columns spread; two of what blocks share;
  // what columns have parked.
  static constexpr int kPartials = Warps * (kColumns + 1), kShared = kColumns + 2;
  static constexpr int64_t kSharedBytes = Warps > 1 ? int64_t(sizeof(float)) * (kPartials + 2 * kColumns + 2 * kShared + kColumns) : 0;
  static_assert(R <= Lanes && (Warps == 1 ? C == 1 : Lanes == 32 && kColumns <= kThreads), "");

  const int lane, warp, thread;
  const int rank, cluster;

  __device__ Team(int cluster_size)
      : lane(int(threadIdx.x) % Lanes), warp(Warps > 1 ? int(threadIdx.x) / Lanes : 0), thread(Warps > 1 ? int(threadIdx.x) : lane),
        rank(device::kClusters && Warps > 4 ? int(device::cluster_rank()) : 0), cluster(device::kClusters && Warps > 4 ? cluster_size : 1), mask_(mask()) {}

  __device__ int first_row() const { return (rank * Warps + warp) * R; }
  __device__ int own_row() const { return first_row() + lane / kShare; }
  __device__ bool first_owner() const { return lane % kShare == 0; }

  // x[r] of every lane -> the combination of the own row over all lanes.
  template <class Op>
  __device__ float row_total(float (&x)[R], Op op) const {
    return halve<R, Lanes / 2>(x, op);
  }

  // Own row's x -> that of row r of this thread.
  __device__ float of_row(float x, int r) const { return __shfl_sync(mask_, x, (int(threadIdx.x) % 32) / Lanes * Lanes + r * kShare); }

  // The sum over all lanes.
  __device__ float over_lanes(float x) const {
#pragma unroll
    for (int offset = Lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(mask_, x, offset);
    return x;
  }

  struct Total {
    float column;  // of the own column; meant for threads below kColumns
    float error;
    bool flag;
  };

  // Combines columns' parts over all rows of the problem, sums errors where they are wanted, and joins flags: two barriers at least between
  // two calls, of which one is this one's and another spread's.
  template <class Op>
  __device__ Total columns(const float (&part)[C], Op op, bool flag, bool with_error = false, float error = 0) {
    if (with_error) error = over_lanes(error);
    if constexpr (Warps == 1) return {part[0], error, __any_sync(mask_, flag) != 0};
    float *const partials = device::shared_memory(), *const errors = partials + Warps * kColumns;
#pragma unroll
    for (int c = 0; c < C; ++c) partials[warp * kColumns + lane + Lanes * c] = part[c];
    if (lane == 0) errors[warp] = error;
    Total out{Op::kNone, 0, __syncthreads_or(flag) != 0};
    if (thread < kColumns) {
#pragma unroll
      for (int w = 0; w < Warps; ++w) out.column = op(out.column, partials[w * kColumns + thread]);
    }
    for (int w = 0; with_error && w < Warps; ++w) out.error += errors[w];
    return cluster > 1 ? over_blocks(out, op) : out;
  }

  // Own columns' x -> those of this thread's columns; returns whether any flag is set.
  __device__ bool spread(float x, float (&out)[C], bool flag = false) {
    if constexpr (Warps == 1) {
      out[0] = x;
      return __any_sync(mask_, flag) != 0;
    }
    float* const shared = device::shared_memory() + kPartials + (turns_ & 1) * kColumns;
    turns_ ^= 1;
    if (thread < kColumns) shared[thread] = x;
    const bool any = __syncthreads_or(flag) != 0;
#pragma unroll
    for (int c = 0; c < C; ++c) out[c] = shared[lane + Lanes * c];
    return any;
  }

  // A number of the own column that is not worth a register.
  __device__ void park(float x) {
    if constexpr (Warps == 1) {
      parked_ = x;
    } else if (thread < kColumns) {
      device::shared_memory()[kPartials + 2 * kColumns + 2 * kShared + thread] = x;
    }
  }
  __device__ float parked() const {
    if constexpr (Warps == 1) return parked_;
    return thread < kColumns ? device::shared_memory()[kPartials + 2 * kColumns + 2 * kShared + thread] : 0.0f;
  }

  // No block of a cluster leaves while others read its memory.
  __device__ void leave() const {
    if (cluster > 1) device::cluster_barrier();
  }

 private:
  static constexpr int kShare = Lanes / R;  // lanes that own a row

  const unsigned mask_;
  int turns_ = 0;  // bits: which half of what is spread, of what blocks share, is next
  float parked_ = 0;

  __device__ static unsigned mask() {
    if (Lanes == 32) return 0xffffffffu;
    return ((1u << (Lanes % 32)) - 1u) << (int(threadIdx.x) % 32 / Lanes * Lanes);
  }

  // Half of the rows go to the other half of the lanes until one row is left, which the lanes that share it then add up.
  template <int Rows, int Offset, class Op>
  __device__ __forceinline__ float halve(float (&x)[R], Op op) const {
    if constexpr (Offset == 0) {
      return x[0];
    } else if constexpr (Rows == 1) {
      x[0] = op(x[0], __shfl_xor_sync(mask_, x[0], Offset));
    } else {
      const bool upper = lane & Offset;
#pragma unroll
      for (int r = 0; r < Rows / 2; ++r) {
        const float kept = upper ? x[r + Rows / 2] : x[r], sent = upper ? x[r] : x[r + Rows / 2];
        x[r] = op(kept, __shfl_xor_sync(mask_, sent, Offset));
      }
    }
    if constexpr (Offset > 0) return halve<(Rows > 1 ? Rows / 2 : 1), Offset / 2>(x, op);
  }

  // Every block adds up the same numbers in the same order. A block two calls ahead would write what is still read; the barrier of the
  // call between keeps it from that.
  template <class Op>
  __device__ Total over_blocks(Total mine, Op op) {
    float* const shared = device::shared_memory() + kPartials + 2 * kColumns + (turns_ >> 1) * kShared;
    turns_ ^= 2;
    if (thread < kColumns) shared[thread] = mine.column;
    if (thread == 0) shared[kColumns] = mine.error, shared[kColumns + 1] = mine.flag ? 1.0f : 0.0f;
    device::cluster_barrier();
    Total out{Op::kNone, 0, false};
    for (int q = 0; q < cluster; ++q) {
      const float* const theirs = device::of_block(shared, unsigned(q));
      if (thread < kColumns) out.column = op(out.column, theirs[thread]);
      out.error += theirs[kColumns];
      out.flag |= theirs[kColumns + 1] != 0;
    }
    return out;
  }
};

}  // namespace kdfast
