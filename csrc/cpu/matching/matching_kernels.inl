// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "matching/matching.inl"

namespace kdfast {
extern const MatchingKernels KDFAST_UNIT(matching);
const MatchingKernels KDFAST_UNIT(matching) = {
    .matching_losses = matching_losses,
    .matching_gradients = matching_gradients,
};
}  // namespace kdfast
