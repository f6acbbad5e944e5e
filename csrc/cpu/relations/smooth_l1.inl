// The smooth L1 loss and its derivative on vectors.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/simd.h"

namespace {

// x within [-1, 1]; NaN stays NaN.
inline Vec within_unit(Vec x) {
#if KDFAST_LANES == 16
  return (Vec)_mm512_min_ps(_mm512_set1_ps(1), _mm512_max_ps(_mm512_set1_ps(-1), (__m512)x));
#elif KDFAST_LANES == 8
  return (Vec)_mm256_min_ps(_mm256_set1_ps(1), _mm256_max_ps(_mm256_set1_ps(-1), (__m256)x));
#else
  const Vec one = splat(1.0f), below = x > one ? one : x;
  return below < -one ? -one : below;
#endif
}

// x^2 / 2 where |x| < 1, else |x| - 1/2; with the slope s = x within [-1, 1] it is s (x - s / 2).
inline Vec smooth_l1(Vec x, Vec* slope) {
  *slope = within_unit(x);
  return *slope * multiply_add(splat(-0.5f), *slope, x);
}

}  // namespace
