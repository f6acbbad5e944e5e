// The epsilon of an iteration, as kdfast/_ops/sinkhorn/portable.py has it.
#pragma once

#include "device.h"
#include "sinkhorn/sinkhorn.h"

namespace kdfast {

// Of iteration t >= 1 where the last one's is `last`.
__device__ __forceinline__ float epsilon_at(const SinkhornSchedule& schedule, int t, float last) {
  if (schedule.proximal) return device::divide(last, float(t));
  double now = t < schedule.iterations ? schedule.anneal_start : 0;
#pragma unroll 1
  for (int i = 1; i < t && now > double(last); ++i) now *= schedule.anneal_factor;
  return now > double(last) ? float(now) : last;
}

}  // namespace kdfast
