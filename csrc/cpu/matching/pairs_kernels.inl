// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "matching/kept.inl"
#include "matching/row_statistics.inl"

namespace kdfast {
extern const PairsKernels KDFAST_UNIT(pairs);
const PairsKernels KDFAST_UNIT(pairs) = {
    .symmetric_workspace = symmetric_workspace,
    .symmetric = symmetric,
    .symmetric_grad_workspace = symmetric_grad_workspace,
    .symmetric_grad = symmetric_grad,
    .row_statistics_workspace = row_statistics_workspace,
    .row_statistics = row_statistics,
    .sigmoid_workspace = sigmoid_workspace,
    .sigmoid = sigmoid,
    .sigmoid_grad_workspace = sigmoid_grad_workspace,
    .sigmoid_grad = sigmoid_grad,
    .kept_symmetric_workspace = kept_symmetric_workspace,
    .kept_symmetric = kept_symmetric,
    .kept_sigmoid_workspace = kept_sigmoid_workspace,
    .kept_sigmoid = kept_sigmoid,
};
}  // namespace kdfast
