// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "triplet/every_triplet.inl"

namespace kdfast {
extern const EveryTripletKernels KDFAST_UNIT(every_triplet);
const EveryTripletKernels KDFAST_UNIT(every_triplet) = {
    .every_triplet_chunk = every_triplet_chunk,
    .every_triplet_workspace = every_triplet_workspace,
    .every_triplet = every_triplet,
    .every_triplet_finish = every_triplet_finish,
    .every_triplet_pull = every_triplet_pull,
};
}  // namespace kdfast
