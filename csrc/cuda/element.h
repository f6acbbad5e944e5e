// Matrices of any of three element types, widened to float as they are read, four elements at a time.
#pragma once

#include "device.h"
#include "element_type.h"

namespace kdfast {
namespace device {

__device__ __forceinline__ float float_of(uint16_t bits, Element type) {
  if (type == Element::kFloat16) return float_of_half(bits);
  union {
    uint32_t bits;
    float value;
  } wide{uint32_t(bits) << 16};
  return wide.value;
}

__device__ __forceinline__ float load_one(const void* data, int64_t at, Element type) {
  return type == Element::kFloat32 ? static_cast<const float*>(data)[at] : float_of(static_cast<const uint16_t*>(data)[at], type);
}

struct alignas(16) Four {
  float x[4];
};
struct alignas(8) FourNarrow {
  uint16_t x[4];
};

// Elements `at` ... `at` + 3, of which `left` are there and the others `missing`. `aligned`: where all are, they are one load.
__device__ __forceinline__ void load_four(const void* data, int64_t at, Element type, bool aligned, int left, float missing, float* out) {
  const float* const wide = static_cast<const float*>(data) + at;
  const uint16_t* const narrow = static_cast<const uint16_t*>(data) + at;
  if (aligned && left >= 4 && type == Element::kFloat32) {
    const Four four = *reinterpret_cast<const Four*>(wide);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = four.x[i];
  } else if (aligned && left >= 4) {
    const FourNarrow four = *reinterpret_cast<const FourNarrow*>(narrow);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = float_of(four.x[i], type);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = i >= left ? missing : type == Element::kFloat32 ? wide[i] : float_of(narrow[i], type);
  }
}

// Of x[0] ... x[3] the first `left`.
__device__ __forceinline__ void store_four(float* to, bool aligned, int left, const float* x) {
  if (aligned && left >= 4) {
    *reinterpret_cast<Four*>(to) = Four{{x[0], x[1], x[2], x[3]}};
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < left) to[i] = x[i];
}

}  // namespace device
}  // namespace kdfast
