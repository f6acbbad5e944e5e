// What the kernels of pairs are given: every score x_i.y_j serves its row and its column. Plain pointers, 64-bit sizes, no torch.
#pragma once

#include "engine/element.h"

namespace kdfast {

// One call over the logits z_ij = scale_i x_i.y_j + shift_i. Everything is row-major and contiguous. Null: not given.
struct PairParams {
  Precision precision;
  int64_t batch, rows, columns, width;
  Matrix x;                  // [batch, rows, width]
  Matrix y;                  // [batch, columns, width]
  const float* scale;        // [batch, rows]; null: 1, in gradients of weights that need none
  const float* shift;        // [batch, rows]
  const int64_t* x_labels;   // [batch, rows]: pairs of equal labels are left out
  const int64_t* y_labels;   // [batch, columns]
  const int64_t* positive;   // [batch, rows]: the row's positive column, -1 for none
};

// A rectangle of one batch entry, computed by one thread.
struct PairTask {
  int64_t batch;
  int64_t row_begin, row_end;
  int64_t column_begin, column_end;
};

// Maxima, in two floats, and sums of e^(z - maximum - low) over the rectangle, to be merged by similarity_merge. Each from the task's own first
// row or column on.
struct SymmetricStatistics {
  float *row_maximum, *row_low, *row_sum;           // [task rows]
  float *column_maximum, *column_low, *column_sum;  // [task columns]; null: not wanted
};

// What row_statistics finds in the task's columns for one row, where every row of the batch entry is a column too, left out for itself by its
// label: maximum and sum as above, and of its class, with the row itself, the sum of the logits (its own as 0) and the number of rows.
struct BatchStatistic {
  double sum = 0, same_sum = 0;
  float maximum = -__builtin_inff(), low = 0, same_count = 0;
};

// Upstream gradients g of the log-sum-exps L of rows and columns: W_ij = g^r_i exp(z_ij - L^r_i) + g^c_j exp(z_ij - L^c_j). L is lse + low.
// Whole arrays; those of the columns null: 0.
struct SymmetricUpstream {
  const float *row_g, *row_lse, *row_low;           // [batch, rows]
  const float *column_g, *column_lse, *column_low;  // [batch, columns]

  // Null, or classes that attract: W_ij is pull^r_i + pull^c_j less where i and j are of one class. A pair left out still weighs 0.
  const int64_t *row_class, *column_class;  // [batch, rows], [batch, columns]
  const float *row_pull, *column_pull;
};

// What weights W_ij of the pairs are summed into: a rectangle's sums are added to these. Whole arrays; null: not wanted.
struct PairSums {
  float* x_sums;   // [batch, rows, width], sum_j W_ij y_j
  float* y_sums;   // [batch, columns, width], sum_i W_ij scale_i x_i
  float* weights;  // [batch, rows], sum_j W_ij; for the sigmoid pair loss alone
  float* scores;   // [batch, rows], sum_j W_ij (x_i.y_j - level): what the gradient of a scale is made of
  float level;
};

// A step that the caller takes in the middle of a kernel.
struct Step {
  void (*take)(void* context);
  void* context;
};

// Pairs whose scores are kept from the loss to the gradient: a table of 256 KB, beside 1 MB of operands, and products that one thread does in
// a fifth of a millisecond. At most 512 a side: all of them go in one pass, and sums of more exponentials in one float each cost the gradient its
// digits (InfoNCE against 1000 columns: 2.6 times the error of the plain formula).
inline bool few_pairs(int64_t rows, int64_t columns, int64_t width) {
  return rows > 0 && columns > 0 && rows <= 512 && columns <= 512 && rows * columns <= int64_t(1) << 16 &&
         (rows + columns) * width <= int64_t(1) << 18 && rows * columns * width <= int64_t(1) << 23;
}

// One instruction set's.
struct PairsKernels {
  int64_t (*symmetric_workspace)(const PairParams&, int64_t rows, int64_t columns);  // floats, for tasks up to this size
  void (*symmetric)(const PairParams&, const PairTask&, const SymmetricStatistics&, float* workspace);
  int64_t (*symmetric_grad_workspace)(const PairParams&, const PairSums&, int64_t rows, int64_t columns);
  void (*symmetric_grad)(const PairParams&, const PairTask&, const SymmetricUpstream&, const PairSums&, float* workspace);
  int64_t (*row_statistics_workspace)(const PairParams&, int64_t rows, int64_t columns);
  // classes [batch, rows] (null: none), out [task rows]
  void (*row_statistics)(const PairParams&, const PairTask&, const int64_t* classes, BatchStatistic* out, float* workspace);
  int64_t (*sigmoid_workspace)(const PairParams&, int64_t rows, int64_t columns);
  void (*sigmoid)(const PairParams&, const PairTask&, float* loss, float* workspace);  // loss [task rows]
  int64_t (*sigmoid_grad_workspace)(const PairParams&, const PairSums&, int64_t rows, int64_t columns);
  void (*sigmoid_grad)(const PairParams&, const PairTask&, const float* g, const PairSums&, float* workspace);  // g [batch, rows]

  // Statistics and sums of few_pairs, all of the one batch entry, from the same scores; `between` makes the upstream gradients. Sums of rows and
  // columns are written, not added to.
  int64_t (*kept_symmetric_workspace)(const PairParams&, const PairSums&);
  void (*kept_symmetric)(const PairParams&, const SymmetricStatistics&, const Step& between, const SymmetricUpstream&, const PairSums&,
                         float* workspace);
  int64_t (*kept_sigmoid_workspace)(const PairParams&, const PairSums&);
  void (*kept_sigmoid)(const PairParams&, float* loss, const float* g, const PairSums&, float* workspace);
};

}  // namespace kdfast
