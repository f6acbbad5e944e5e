// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "triplet/extrema_coarse.inl"
#include "triplet/extrema_triangle.inl"
#include "triplet/facenet.inl"
#include "triplet/weighted.inl"

namespace kdfast {
extern const MiningKernels KDFAST_UNIT(mining);
const MiningKernels KDFAST_UNIT(mining) = {
    .triplet_triangle_serves = triplet_triangle_serves,
    .triplet_triangle_workspace = triplet_triangle_workspace,
    .triplet_triangle = triplet_triangle,
    .triplet_extrema_workspace = triplet_extrema_workspace,
    .triplet_extrema = triplet_extrema,
    .triplet_facenet_workspace = triplet_facenet_workspace,
    .triplet_facenet = triplet_facenet,
    .triplet_weighted_workspace = triplet_weighted_workspace,
    .triplet_weighted = triplet_weighted,
};
}  // namespace kdfast
