// What a row's mean was off by, known once the row is through, is taken off the gradients of the candidates that hold a large share of it.
//
// Included by the passes, after the target pragma.
#pragma once

#include "similarity/add_scaled.inl"
#include "similarity/large_shares.h"
#include "similarity/softmax.inl"

namespace {

using kdfast::kLargeShare;
using kdfast::kMostLargeShares;
using kdfast::LargeShares;

// Those among the shares of row `row` in a block, of which `most` are the largest by lanes.
inline void note_large(const LargeShares& large, int64_t row, const Block& block, const float* shares, Vec most) {
  if (!(largest(most) > kLargeShare)) return;
  kdfast::LargeShare* const found = large.found + row * kMostLargeShares;
  int32_t& count = large.count[row];
  for (int64_t j = 0; j < block.columns; j += kLanes) {
    if (!(largest(load(shares + j)) > kLargeShare)) continue;
    for (int64_t k = j; k < smaller(j + kLanes, block.columns); ++k)
      if (shares[k] > kLargeShare && count < kMostLargeShares) found[count++] = {int32_t(block.first + k), shares[k]};
  }
}

// Slopes that all of a row's candidates have too much of, `off` [batch, rows], taken off the gradients of keys `begin` .. `end` of a batch entry
// and of their biases (null: not wanted).
inline void take_off_keys(const SimilarityParams& p, const LargeShares& large, const float* off, int64_t batch, int64_t begin, int64_t end, float* dkeys,
                          float* dbias) {
  with_elements(p.query, [&](const auto* queries) {
    for (int64_t row = batch * p.rows; row < (batch + 1) * p.rows; ++row) {
      large.of_row(row, [&](int64_t column, float share) {
        if (column < begin || column >= end) return;
        const int64_t at = batch * p.columns + column;
        const float slope = -off[row] * share;
        if (dkeys != nullptr) add_scaled(dkeys + at * p.width, slope * p.scale[row], queries + row * p.width, p.width);
        if (dbias != nullptr) dbias[at] += slope;
      });
    }
  });
}

}  // namespace
