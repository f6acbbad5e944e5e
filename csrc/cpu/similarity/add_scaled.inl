// Sums of single rows.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/simd.h"

namespace {

// to += factor x
template <class T>
inline void add_scaled(float* to, float factor, const T* x, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes)
    store_row(to, d, width, multiply_add(splat(factor), load_row(x, d, width), load_row(to, d, width)));
}

// to += x
inline void add_row(float* to, const float* x, int64_t width) {
  for (int64_t d = 0; d < width; ++d) to[d] += x[d];
}

}  // namespace
