// What the losses of matching pairs (CLIP, NT-Xent) are given beside their log-sum-exps. Plain pointers, 64-bit sizes, no torch.
#pragma once

#include "engine/element.h"

namespace kdfast {

// Row i of x matches row partner(i) of y: i, or, where x and y are one matrix of two views, the sample's row in the other half. Row-major,
// contiguous, of one element type.
struct Matching {
  int64_t rows, width;
  Matrix x, y;  // [rows, width]
  float scale;
  bool views;

  // Label smoothing: its share, 0 for none, and the means of the rows of x and of y, each times the share of the columns' and of the rows' side.
  float smoothing;
  const float *x_mean, *y_mean;  // [width]

  int64_t partner(int64_t i) const { return !views ? i : i < rows / 2 ? i + rows / 2 : i - rows / 2; }
};

// loss_i: the mean over sides of log(1 + e^(lse_i + low_i - scale x_i.y_partner)) or, the match not in its denominator, of the exponent; with
// smoothing, what this adds; slopes: its derivatives in the lse_i. [rows] each.
struct MatchingLosses {
  bool include;
  int64_t sides;  // 1 or 2
  const float *lse[2], *low[2];
  float* losses;
  float* slopes[2];
};

// With pull_i = -dloss / d(scale x_i.y_partner) and sums over the other pairs as symmetric_grad leaves them, gradients of x and y,
// and what the rows add to that of the scale. Null: not wanted.
struct MatchingGradients {
  const float* pull;             // [rows]
  const float* scores;           // [rows], less this level; for dscale
  float level;
  const float *x_sums, *y_sums;  // [rows, width]
  void *dx, *dy;                 // [rows, width], which may be the sums
  float* dscale;                 // [rows]
  bool floats;                   // dx and dy are; else of the elements' type

  // With smoothing, else null: what the means are times of in row i, and what every row of the other side is given by all, the share of the
  // columns' side of the mean of spread_i y_i, and that of the rows' of spread_i x_i.
  const float* spread;               // [rows]
  const float *x_common, *y_common;  // [width]
};

// One instruction set's.
struct MatchingKernels {
  void (*matching_losses)(const Matching&, const MatchingLosses&);
  void (*matching_gradients)(const Matching&, const MatchingGradients&, int64_t begin, int64_t end);
};

}  // namespace kdfast
