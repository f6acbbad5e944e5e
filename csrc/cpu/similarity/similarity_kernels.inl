// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "similarity/similarity.inl"
#include "similarity/similarity_grad.inl"
#include "similarity/similarity_grad_rows.inl"

namespace kdfast {
extern const SimilarityKernels KDFAST_UNIT(similarity);
const SimilarityKernels KDFAST_UNIT(similarity) = {
    .similarity_workspace = similarity_workspace,
    .similarity = similarity,
    .similarity_merge = similarity_merge,
    .similarity_grad_workspace = similarity_grad_workspace,
    .similarity_grad = similarity_grad,
    .similarity_grad_rows_workspace = similarity_grad_rows_workspace,
    .similarity_grad_rows = similarity_grad_rows,
};
}  // namespace kdfast
