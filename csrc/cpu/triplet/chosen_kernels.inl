// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "triplet/chosen.inl"

namespace kdfast {
extern const ChosenKernels KDFAST_UNIT(chosen);
const ChosenKernels KDFAST_UNIT(chosen) = {
    .row_scales = row_scales,
    .triplet_chosen = triplet_chosen,
    .triplet_chosen_grad_x = triplet_chosen_grad_x,
    .triplet_chosen_grad_y = triplet_chosen_grad_y,
};
}  // namespace kdfast
