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

}  // namespace kdfast
