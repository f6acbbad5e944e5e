// What the losses of chosen triplets are given, and their gradient.
#pragma once

#include "triplet/metric.h"

namespace kdfast {

// Triplets (a, positive[a, k], negative[a, k]) for a < rows, k < each; -1 in either: none there.
struct ChosenParams {
  Metric metric;
  int64_t rows, columns, width, each;
  MetricRows x, y;            // not moved
  const int32_t* positive;    // [rows, each]
  const int32_t* negative;
  double margin, sign;        // z = sign (d_ap - d_an) + margin
  bool soft, swap;            // softplus(z) for max(z, 0); d_pn for d_an where it is less
  const float *x_scale, *y_scale;  // [rows], [columns]: what brings each row to the length it counts with; null: 1
  bool in_batch;              // y is x
};

// The derivative of a triplet's loss in each of its distances, as the factor c of the gradient c (u - v) in u (the cosine's: -c v). One
// of the last two is 0. `swap` false: there is no p_n.
struct ChosenLosses {
  float* loss;  // [rows, each]; 0 where there is no triplet
  float *a_p, *a_n, *p_n;  // [rows, each]
};

struct ChosenGradients {
  const float* g;  // [rows, each]
  const float *a_p, *a_n, *p_n;
  float* dx;       // [rows, width], in batch of both sides
  float* dy;       // [columns, width], not in batch
};

// One instruction set's.
struct ChosenKernels {
  void (*row_scales)(const MetricRows&, int64_t begin, int64_t end, float* scale);
  void (*triplet_chosen)(const ChosenParams&, const ChosenLosses&, int64_t begin, int64_t end);  // anchors
  void (*triplet_chosen_grad_x)(const ChosenParams&, const ChosenGradients&, int64_t begin, int64_t end);
  void (*triplet_chosen_grad_y)(const ChosenParams&, const ChosenGradients&, int64_t begin, int64_t end, bool* touched);
};

}  // namespace kdfast
