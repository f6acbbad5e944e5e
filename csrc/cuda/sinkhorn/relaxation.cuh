// What rho KL in place of a fixed marginal (rho 0) makes of its potentials, as kdfast/_ops/sinkhorn/geometry.py and portable.py have it.
#pragma once

#include "device.h"

namespace kdfast {

constexpr float kAlone = 40;  // times rho, a potential that stands for infinity: geometry.py, ALONE

// lambda.
__device__ __forceinline__ float damping(float rho, float epsilon) { return rho > 0 ? device::divide(rho, rho + epsilon) : 1.0f; }

// The potential where nothing is summed.
__device__ __forceinline__ float alone(float rho) { return rho > 0 ? kAlone * rho : 0.0f; }

// What optimality asks of a marginal, over its weight.
__device__ __forceinline__ float wanted(float rho, float potential) {
  return rho > 0 ? device::exp2_fast(device::divide(-kBitsPerNat * potential, rho)) : 1.0f;
}

}  // namespace kdfast
