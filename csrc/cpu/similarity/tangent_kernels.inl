// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "similarity/tangent.inl"

namespace kdfast {
extern const TangentKernels KDFAST_UNIT(tangent);
const TangentKernels KDFAST_UNIT(tangent) = {
    .tangent_workspace = tangent_workspace,
    .tangent = tangent,
    .tangent_finish_keys = tangent_finish_keys,
};
}  // namespace kdfast
