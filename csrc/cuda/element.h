// Matrices of any of three element types, widened to float as they are read.
#pragma once

#include "device.h"

namespace kdfast {

enum class Element : int32_t { kFloat32, kBFloat16, kFloat16 };

namespace device {

// Element `at` of a matrix. `type` is the same for all threads.
__device__ __forceinline__ float load(const void* data, int64_t at, Element type) {
  if (type == Element::kFloat32) return static_cast<const float*>(data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  if (type == Element::kFloat16) return float_of_half(bits);
  union {
    uint32_t bits;
    float value;
  } wide{uint32_t(bits) << 16};
  return wide.value;
}

}  // namespace device
}  // namespace kdfast
