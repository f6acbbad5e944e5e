// kdfast::sigmoid_pairs and kdfast::sigmoid_gradients on the CPU.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "similarity/bind_pairs.h"

namespace {

PairParams sigmoid_parameters(const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& shift, const Tensor& positive, int64_t precision) {
  PairParams p = pair_parameters(x, y, scale, std::nullopt, std::nullopt, precision);
  p.shift = row_data<float>("shift", shift, {p.batch, p.rows});
  p.positive = row_data<int64_t>("positive", positive, {p.batch, p.rows});
  return p;
}

Tensor sigmoid_pairs(const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& shift, const Tensor& positive, int64_t precision) {
  const PairParams p = sigmoid_parameters(x, y, scale, shift, positive, precision);
  const Tensor losses = output(x, {p.batch, p.rows});
  sigmoid_losses(p, floats_of(losses));
  return losses;
}

std::tuple<Tensor, Tensor, Tensor> sigmoid_gradients(const Tensor& g, const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& shift,
                                                     const Tensor& positive, bool want_x, bool want_y, int64_t precision) {
  const PairParams p = sigmoid_parameters(x, y, scale, shift, positive, precision);
  const float* const upstream = row_data<float>("g", g, {p.batch, p.rows});
  const Tensor x_sums = zeros(x, want_x, {p.batch, p.rows, p.width}), y_sums = zeros(x, want_y, {p.batch, p.columns, p.width});
  const Tensor weights = zeros(x, true, {p.batch, p.rows});
  sigmoid_sums(p, upstream, {want_x ? floats_of(x_sums) : nullptr, want_y ? floats_of(y_sums) : nullptr, floats_of(weights)});
  return {x_sums, y_sums, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("sigmoid_pairs", TORCH_BOX(&sigmoid_pairs));
  m.impl("sigmoid_gradients", TORCH_BOX(&sigmoid_gradients));
}
