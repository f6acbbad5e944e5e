// The kernel that measures a core.
#pragma once

#include <stdint.h>

namespace kdfast {
// One instruction set's.
struct ProbeKernels {
  double (*fma_probe)(bool bfloat16, int64_t steps);  // returns the operations done
};

}  // namespace kdfast
