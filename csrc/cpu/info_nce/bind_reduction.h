// From the losses of rows to what an op returns: kdfast/_core/reduction.py, inside the op.
#pragma once

#include <vector>

#include "similarity/bind_similarity.h"

namespace {

struct Reduction {
  bool mean, sum;        // their mean over the rows that count or, with `sum` too, their sum; else not at all
  const float* weights;  // [rows], of the losses; null: 1

  // What makes each row's loss its part of a mean over all rows, 0 for those that do not count; none where that is 1 for all.
  template <class Counts>
  std::vector<float> factors(int64_t rows, const Counts& counts) const {
    std::vector<float> found(rows);
    double total = 0;
    int64_t counted = 0;
    for (int64_t i = 0; i < rows; ++i) {
      found[i] = !counts(i) ? 0 : weights != nullptr ? weights[i] : 1;
      total += found[i], counted += counts(i);
    }
    if (weights == nullptr && !sum && counted == rows) return {};
    const double share = !mean ? 1 : sum || !(total > 0) ? double(rows) : double(rows) / total;
    for (float& factor : found) factor = float(share * double(factor));
    return found;
  }
};

}  // namespace
