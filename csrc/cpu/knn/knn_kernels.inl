// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "knn/knn.inl"

namespace kdfast {
extern const KnnKernels KDFAST_UNIT(knn);
const KnnKernels KDFAST_UNIT(knn) = {
    .knn_workspace = knn_workspace,
    .knn_scan = knn_scan,
    .knn_refine = knn_refine,
};
}  // namespace kdfast
