// What every triplet kernel is given: rows as distances see them, and who is whose positive. Plain pointers, no torch.
#pragma once

#include "engine/element.h"

namespace kdfast {

// The cosine's distance is 1 - cos, that of kProduct -x.y.
enum class Metric : int32_t { kEuclidean, kSquaredEuclidean, kCosine, kProduct };

// Whether distances are formed from the inner product alone: their gradient in x is then along y, not x - y.
constexpr bool of_product(Metric metric) { return metric == Metric::kCosine || metric == Metric::kProduct; }

// Rows [count, width], contiguous, before they are brought to unit length (where asked for) and moved by -centre.
struct MetricRows {
  Matrix matrix;
  int64_t width;
  bool normalize;
  const float* centre;  // [width]; null: not moved
};

// Anchors and references by class (kdfast/_ops/triplet/classes.py). The references of an anchor's class are order[first] and on: `count`
// positives, and its own row among them if skip is less than the number of references.
struct Classes {
  int64_t rows, columns;
  const int64_t* label;      // [rows]
  const int64_t* own;        // [rows]: its own reference, -1 for none
  const int64_t* first;      // [rows]
  const int64_t* skip;       // [rows]: position of the own row in its class
  const int64_t* count;      // [rows]
  const int64_t* ref_label;  // [columns]
  const int64_t* order;      // [columns]: references by label, ties by index; those that do not exist come last
  const bool* exists;        // [columns]

  int64_t size(int64_t row) const { return count[row] + (skip[row] < columns ? 1 : 0); }  // of the class, the own row included
  bool admitted(int64_t row, int64_t column) const { return column != own[row] && exists[column]; }
};

}  // namespace kdfast
