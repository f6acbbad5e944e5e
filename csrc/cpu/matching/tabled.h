// What the kernels of few_pairs are given whose backward pass needs the weights of all pairs: losses that are not reduced. Plain pointers, 64-bit
// sizes, no torch.
#pragma once

#include "similarity/pairs.h"

namespace kdfast {

// One instruction set's. As kept_symmetric and kept_sigmoid, of which x_sums alone, and the table of weights W_ij [rows, columns] in place of y_sums;
// tabled_sums has these of the table, with a factor for each row: sum_i g_i W_ij scale_i x_i, for every column [columns, width].
struct TabledKernels {
  int64_t (*tabled_workspace)(const PairParams&);
  void (*tabled_symmetric)(const PairParams&, const SymmetricStatistics&, const Step& between, const SymmetricUpstream&, const PairSums&, float* table,
                           float* workspace);
  void (*tabled_sigmoid)(const PairParams&, float* loss, const float* g, const PairSums&, float* table, float* workspace);
  void (*tabled_sums)(const PairParams&, const float* table, const float* g, float* y_sums, float* workspace);
};

}  // namespace kdfast
