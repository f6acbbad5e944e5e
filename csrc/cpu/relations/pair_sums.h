// What the kernels of pairs of rows are given: functions of distances summed over all pairs. Plain pointers, no torch.
#pragma once

#include "engine/element.h"

namespace kdfast {

// Rows x_i and columns y_j, fp32, moved by about their mean; squares are |x_i|^2, |y_j|^2.
struct PairSide {
  int64_t width;
  Matrix x, y;
  const float *x_square, *y_square;  // [rows], [columns]
};

// What is summed over j for each row i: a function of the distances d_ij, and with its derivative the gradient in x_i. [rows] each.
struct PairResults {
  double* value;
  double* second;   // what else the function counts; not of a kernel mean
  float* gradient;  // [rows, width]; null: not wanted
};

struct PairSumParams {
  int64_t rows, columns;
  bool same;  // the columns are the rows: d_ii is exactly 0
  PairSide side, teacher;
};

// One instruction set's.
struct PairSumsKernels {
  void (*row_squares)(const float* x, int64_t rows, int64_t width, float* to);
  int64_t (*pair_sums_workspace)(const PairSumParams&, bool gradient, int64_t rows);  // floats, for calls of at most so many rows
  void (*pair_gaussians)(const PairSumParams&, int64_t count, const float* rate, const float* weight, const PairResults&, int64_t begin,
                         int64_t end, float* workspace);
  void (*pair_distances)(const PairSumParams&, const PairResults&, int64_t begin, int64_t end, float* workspace);
  void (*pair_distance_losses)(const PairSumParams&, float inverse_mean, float teacher_inverse_mean, const PairResults&, int64_t begin,
                               int64_t end, float* workspace);
};

}  // namespace kdfast
