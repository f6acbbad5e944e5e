// Sums of columns, of which every range of rows has left its part: joined in order, columns shared by the blocks that have a problem.
//
// A warp adds up 128 columns over some of the parts, and a team of warps has all parts. What a sum cannot give, since it has over- or
// underflown or has nothing to do with what is wanted, is taken anew from all rows, with true maxima.
#pragma once

#include <math.h>

#include "element.h"
#include "sinkhorn/row_pairs.cuh"

namespace kdfast {

class ColumnJoin {
 public:
  static constexpr int kGroup = 128;  // columns of a team
  static constexpr int kFloats = 2 * kGroup;  // of shared memory, for each warp

  // `width`: of a part, a multiple of kGroup. Of `blocks` blocks this is number `block`.
  __device__ ColumnJoin(int parts, int width, int block, int blocks, int threads, float* shared)
      : parts_(device::known_here(parts)), width_(width), block_(block), blocks_(blocks), thread_(device::known_here(int(threadIdx.x))),
        shares_(threads / 32 < parts_ ? threads / 32 : parts_), teams_(threads / 32 / shares_), shared_(shared) {}

  // finish(j, sum) once for every column, and where it returns false again(j, level): log2 of the sum of 2^x[i], where exponents(i, j, out)
  // gives x of row i < `rows` and columns j ... j + 3.
  template <class Finish, class Exponents, class Again>
  __device__ void run(const float* sums, int rows, Finish finish, Exponents exponents, Again again) const {
    const int groups = width_ / kGroup;
#pragma unroll 1
    for (int begin = 0; begin < groups; begin += blocks_ * teams_) {
      const int group = team() < teams_ ? begin + block_ * teams_ + team() : groups, first = group * kGroup;
      if (group < groups) add_parts(sums + first);
      __syncthreads();
      unsigned left = 0;  // columns of this thread that `again` is for
      for (int c = thread_of_team(), n = 0; group < groups && c < kGroup; c += 32 * shares_, ++n) {
        float sum = 0;
        for (int q = 0; q < shares_; ++q) sum += of_warp(q)[c];
        if (!finish(first + c, sum)) left |= 1u << n;
      }
      if (__syncthreads_or(left != 0) == 0) continue;
      if (group < groups) add_rows(first, rows, exponents);
      __syncthreads();
      for (int c = thread_of_team(), n = 0; group < groups && c < kGroup; c += 32 * shares_, ++n)
        if (left >> n & 1) again(first + c, level(c));
      __syncthreads();
    }
  }

 private:
  const int parts_, width_, block_, blocks_, thread_, shares_, teams_;  // shares_: warps of a team
  float* const shared_;

  __device__ int lane() const { return thread_ % 32; }
  __device__ int team() const { return thread_ / 32 / shares_; }
  __device__ int share() const { return thread_ / 32 % shares_; }
  __device__ int thread_of_team() const { return share() * 32 + lane(); }
  // Of this team's: what it has added up, and behind it the levels of that.
  __device__ float* of_warp(int q) const { return shared_ + (team() * shares_ + q) * kFloats; }

  __device__ void add_parts(const float* sums) const {
    float sum[4] = {};
#pragma unroll 8
    for (int part = share(); part < parts_; part += shares_) {
      float x[4];
      device::load_four(sums, int64_t(part) * width_ + 4 * lane(), Element::kFloat32, true, 4, 0, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += x[i];
    }
    device::store_four(of_warp(share()) + 4 * lane(), true, 4, sum);
  }

  template <class Exponents>
  __device__ void add_rows(int first, int rows, Exponents exponents) const {
    float most[4], sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) most[i] = -INFINITY, sum[i] = 0;
#pragma unroll 4
    for (int row = share(); row < rows; row += shares_) {
      float x[4];
      exponents(row, first + 4 * lane(), x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float larger = fmaxf(most[i], x[i]), shift = shift_of(larger);
        sum[i] = sum[i] * device::exp2_fast(most[i] - shift) + device::exp2_fast(x[i] - shift);
        most[i] = larger;
      }
    }
    float* const to = of_warp(share()) + 4 * lane();
    device::store_four(to, true, 4, sum), device::store_four(to + kGroup, true, 4, most);
  }

  __device__ float level(int c) const {
    float most = -INFINITY, sum = 0;
    for (int q = 0; q < shares_; ++q) most = fmaxf(most, of_warp(q)[kGroup + c]);
    const float shift = shift_of(most);
    for (int q = 0; q < shares_; ++q) sum += of_warp(q)[c] * device::exp2_fast(of_warp(q)[kGroup + c] - shift);
    return sum == 0 ? -INFINITY : shift + log2f(sum);
  }
};

}  // namespace kdfast
