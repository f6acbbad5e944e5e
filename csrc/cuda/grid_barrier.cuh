// Where blocks of a cooperative launch wait for one another: a fixed set of them, so that others need not.
#pragma once

#include "device.h"

namespace kdfast {

struct GridBarrier {
  static constexpr int kApart = 32;  // counts of different sets, in numbers: each in a line of its own

  // By thread 0, of a number in shared memory.
  __device__ static void start(unsigned* signals) { *signals = 0; }

  // By all threads of all of the set's blocks: what any has written before is there for all after. `count` is 0 when the launch begins.
  __device__ static void wait(unsigned* count, unsigned* signals, int blocks) {
    __syncthreads();
    if (blocks == 1) return;
    if (threadIdx.x == 0) device::signal(count), device::await(count, *signals += unsigned(blocks));
    __syncthreads();
  }
};

}  // namespace kdfast
