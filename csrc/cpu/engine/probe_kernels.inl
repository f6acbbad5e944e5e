// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "engine/probe.h"
#include "engine/probe.inl"

namespace kdfast {
extern const ProbeKernels KDFAST_UNIT(probe);
const ProbeKernels KDFAST_UNIT(probe) = {
    .fma_probe = fma_probe,
};
}  // namespace kdfast
