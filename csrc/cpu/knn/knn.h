// What the nearest-neighbour kernels are given: plain pointers, 64-bit sizes, no torch.
#pragma once

#include "engine/element.h"

namespace kdfast {

enum class KnnMetric : int32_t { kCosine, kEuclidean, kSquaredEuclidean };

// What is known of each row's nearest columns: candidates by rank_ij = factor_j q_i.k_j + offset_j, at least the k of the smallest.
struct KnnLists {
  int64_t k, kept, capacity;  // a list is cut to `kept` at most; capacity >= kept + 32
  float* rank;                // [rows, capacity]
  int64_t* index;             // [rows, capacity]
  int64_t* count;             // [rows]
  int64_t* room;              // [rows]: a longer list is cut
  float* threshold;           // [rows]: every column that is not listed ranks here or beyond
  // How far a rank can be from the distance less what is the same for the whole row (knn.inl, slack).
  KnnMetric metric;
  const float* base;          // [rows]: ||q||^2 of the rows that the products see
  float product_error;        // of q.k, relative to ||q|| ||k||
  float float_error;          // of sums of floats, relative to what they add
};

// Every row past columns `first` to `first + columns` of a bank; an inf in `offset` leaves a column out. Matrices are contiguous. Null: not given.
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
  KnnLists lists;
};

// The k nearest of the candidates that a scan left, by distances from the rows themselves.
struct KnnRefineParams {
  int64_t rows, width;
  Matrix query;        // [rows, width]
  Matrix bank;         // [columns, width]
  KnnLists lists;
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
