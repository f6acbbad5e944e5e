// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "info_nce/info_nce_second.inl"

namespace kdfast {
extern const InfoNceKernels KDFAST_UNIT(info_nce);
const InfoNceKernels KDFAST_UNIT(info_nce) = {
    .info_nce_rows = info_nce_rows,
    .info_nce_pull = info_nce_pull,
    .info_nce_grad_rows = info_nce_grad_rows,
    .info_nce_grad_candidates = info_nce_grad_candidates,
    .info_nce_direction = info_nce_direction,
    .info_nce_second_rows = info_nce_second_rows,
    .info_nce_second_candidates = info_nce_second_candidates,
};
}  // namespace kdfast
