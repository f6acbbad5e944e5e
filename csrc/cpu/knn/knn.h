// What the nearest-neighbour kernels are given: plain pointers, 64-bit sizes, no torch.
#pragma once

#include "engine/element.h"

namespace kdfast {

// Candidates among columns `first` to `first + columns` of a bank for every row: those of the smallest
// rank_ij = factor_j q_i.k_j + offset_j, an inf in `offset` leaving a column out. Matrices are contiguous. Null: not given.
struct KnnScanParams {
  Precision precision;
  int64_t rows, columns, width, first;
  Matrix query;             // [rows, width]
  Matrix keys;              // [columns, width]
  const float* factor;      // [columns]
  const float* offset;      // [columns]
  const int64_t* query_labels;  // [rows]; a column of the row's label is left out, or with `only_same` every other
  const int64_t* key_labels;    // [columns]
  bool only_same;
  const int64_t* own;       // [rows]: this column of the bank is left out; -1 for none

  // The state between calls, a row's best `kept` and then those not yet compared with them.
  int64_t kept, capacity;   // capacity >= kept + 32
  float* rank;              // [rows, capacity]
  int64_t* index;           // [rows, capacity]
  int64_t* count;           // [rows]
  float* threshold;         // [rows]: nothing from here on is kept
};

enum class KnnMetric : int32_t { kCosine, kEuclidean, kSquaredEuclidean };

// The k nearest of the candidates that a scan left, by distances from the rows themselves.
struct KnnRefineParams {
  KnnMetric metric;
  int64_t rows, width, k;
  Matrix query;        // [rows, width]
  Matrix bank;         // [columns, width]
  int64_t kept, capacity;
  float* rank;         // the scan's state
  int64_t* index;
  int64_t* count;
  float* threshold;
  const float* base;   // [rows]: ||q||^2; a squared distance is the rank plus this, up to rounding
  float product_error; // of q.k, relative to ||q|| ||k||
  float float_error;   // of sums of floats, relative to what they add
  float* distance;     // [rows, k]
  int64_t* neighbour;  // [rows, k]
  bool* doubtful;      // [rows]: a column that was not kept could be nearer
};

// One instruction set's.
struct KnnKernels {
  int64_t (*knn_workspace)(const KnnScanParams&, int64_t rows);  // floats, for tasks up to this size
  void (*knn_scan)(const KnnScanParams&, int64_t begin, int64_t end, float* workspace);
  void (*knn_refine)(const KnnRefineParams&, int64_t begin, int64_t end);
};

}  // namespace kdfast
