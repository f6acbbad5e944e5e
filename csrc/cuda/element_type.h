// The element types of matrices that kernels widen to float as they read.
#pragma once

#include <stdint.h>

namespace kdfast {

enum class Element : int32_t { kFloat32, kBFloat16, kFloat16 };

}  // namespace kdfast
