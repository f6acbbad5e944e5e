// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "matching/tabled.inl"

namespace kdfast {
extern const TabledKernels KDFAST_UNIT(tabled);
const TabledKernels KDFAST_UNIT(tabled) = {
    .tabled_workspace = tabled_workspace,
    .tabled_symmetric = tabled_symmetric,
    .tabled_sigmoid = tabled_sigmoid,
    .tabled_sums = tabled_sums,
};
}  // namespace kdfast
