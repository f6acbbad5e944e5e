// What the kernels that scale rows to unit length are given. Plain pointers, 64-bit sizes, no torch.
#pragma once

#include "engine/element.h"

namespace kdfast {

// y_i = x_i / |x_i|. Row-major and contiguous, x, y, dy and dx of one element type.
struct UnitLength {
  int64_t rows, width;
  Matrix x;
  void* y;      // [rows, width]
  float* norm;  // [rows]
};

struct UnitLengthGradient {
  int64_t rows, width;
  Matrix x, dy;
  const float* norm;
  void* dx;
};

// One instruction set's. Rows begin .. end.
struct UnitLengthKernels {
  void (*unit_length)(const UnitLength&, int64_t begin, int64_t end);
  void (*unit_length_grad)(const UnitLengthGradient&, int64_t begin, int64_t end);
};

}  // namespace kdfast
