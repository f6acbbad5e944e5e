// Candidates that hold a large share of a row: those whose gradients a mean that is a little off, multiplied by their share, would spoil.
#pragma once

#include <stdint.h>

namespace kdfast {

// Candidates of a row that hold at least this share of it; so there are at most as many as its inverse.
constexpr float kLargeShare = 1.0f / 32;
constexpr int64_t kMostLargeShares = 32;

// A candidate whose share of its row is large, and that share.
struct LargeShare {
  int32_t column;
  float share;
};

// Those of every row, [rows, kMostLargeShares], and how many.
struct LargeShares {
  LargeShare* found;
  int32_t* count;

  // f(column, share)
  template <class F>
  void of_row(int64_t row, const F& f) const {
    for (int32_t k = 0; k < count[row]; ++k) f(int64_t(found[row * kMostLargeShares + k].column), found[row * kMostLargeShares + k].share);
  }
  LargeShares from(int64_t row) const { return {found + row * kMostLargeShares, count + row}; }
};

}  // namespace kdfast
