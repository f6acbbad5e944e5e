// kdfast::triplet_chosen and its gradient on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "triplet/bind_triplet.h"

namespace {

using kdfast::ChosenParams;

// In batch without y.
ChosenParams chosen_params(const Tensor& x, const OptionalTensor& y, const Tensor& positive, const Tensor& negative, bool normalize,
                           int64_t metric) {
  STD_TORCH_CHECK(positive.dim() == 2, "positive must have 2 dimensions, got ", positive.dim());
  const Tensor& refs = y.has_value() ? *y : x;
  ChosenParams p{};
  p.metric = metric_of(metric);
  p.x = metric_rows("x", x, normalize), p.y = metric_rows("y", refs, normalize);
  STD_TORCH_CHECK(p.x.width == p.y.width, "y must have the width of x, ", p.x.width, ", got ", p.y.width);
  p.rows = x.size(0), p.columns = refs.size(0), p.width = x.size(1), p.each = positive.size(1);
  p.in_batch = !y.has_value();
  for (const auto& [name, index] : {std::pair<const char*, const Tensor&>("positive", positive), {"negative", negative}}) {
    check(name, index, ScalarType::Int, {p.rows, p.each});
    STD_TORCH_CHECK(index.is_contiguous(), name, " must be contiguous");
    const int32_t* const at = data<int32_t>(index);
    const bool inside = std::all_of(at, at + p.rows * p.each, [&](int32_t i) { return i >= -1 && i < p.columns; });
    STD_TORCH_CHECK(inside, name, " must lie in [-1, ", p.columns, ")");
  }
  p.positive = data<int32_t>(positive), p.negative = data<int32_t>(negative);
  return p;
}

// Threads that so many distances are worth.
int64_t workers_for_pairs(const ChosenParams& p, double distances) { return workers_for(distances * double(p.width)); }

std::tuple<Tensor, Tensor, Tensor, Tensor> triplet_chosen(const Tensor& x, const OptionalTensor& y, const Tensor& positive,
                                                          const Tensor& negative, bool normalize, int64_t metric, double margin, double sign,
                                                          bool soft, bool swap) {
  ChosenParams p = chosen_params(x, y, positive, negative, normalize, metric);
  p.margin = margin, p.sign = sign, p.soft = soft, p.swap = swap;
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const auto scales = [&](const kdfast::MetricRows& m, int64_t rows) {
    Tensor scale = output(x, {normalize ? rows : 0});
    if (normalize)
      for_each_rows(workers_for_pairs(p, double(rows)), rows,
                    [&](int64_t, int64_t begin, int64_t end) { kernels.row_scales(m, begin, end, written<float>(scale)); });
    return scale;
  };
  Tensor x_scale = scales(p.x, p.rows), y_scale = scales(p.y, p.in_batch ? 0 : p.columns);
  p.x_scale = normalize ? data<float>(x_scale) : nullptr;
  p.y_scale = normalize ? data<float>(p.in_batch ? x_scale : y_scale) : nullptr;
  Tensor loss = output(x, {p.rows, p.each}), factors = output(x, {swap ? 3 : 2, p.rows, p.each});
  float* const factor = written<float>(factors);
  const int64_t triplets = p.rows * p.each;
  const kdfast::ChosenLosses out{written<float>(loss), factor, factor + triplets, swap ? factor + 2 * triplets : nullptr};
  for_each_rows(workers_for_pairs(p, 3.0 * double(triplets)), p.rows,
                [&](int64_t, int64_t begin, int64_t end) { kernels.triplet_chosen(p, out, begin, end); });
  return {loss, factors, x_scale, y_scale};
}

std::tuple<Tensor, Tensor> triplet_chosen_grad(const Tensor& g, const Tensor& factors, const Tensor& x_scale, const Tensor& y_scale,
                                               const Tensor& x, const OptionalTensor& y, const Tensor& positive, const Tensor& negative,
                                               bool normalize, int64_t metric, bool want_x, bool want_y) {
  ChosenParams p = chosen_params(x, y, positive, negative, normalize, metric);
  const int64_t triplets = p.rows * p.each, kinds = factors.dim() == 3 ? factors.size(0) : 0;
  STD_TORCH_CHECK(kinds == 2 || kinds == 3, "factors must have shape [2 or 3, rows, each]");
  STD_TORCH_CHECK(!(want_y && p.in_batch), "in batch the gradient is that of x");
  p.swap = kinds == 3;
  if (normalize) {
    p.x_scale = packed<float>("x_scale", x_scale, {p.rows});
    p.y_scale = p.in_batch ? p.x_scale : packed<float>("y_scale", y_scale, {p.columns});
  }
  const float* const factor = packed<float>("factors", factors, {kinds, p.rows, p.each});
  Tensor dx = output(x, {want_x ? p.rows : 0, p.width}), dy = output(x, {want_y ? p.columns : 0, p.width});
  const kdfast::ChosenGradients out{packed<float>("g", g, {p.rows, p.each}), factor, factor + triplets, factor + 2 * triplets,
                                    written<float>(dx), written<float>(dy)};
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  if (want_x)
    for_each_rows(workers_for_pairs(p, 4.0 * double(triplets)), p.rows,
                  [&](int64_t, int64_t begin, int64_t end) { kernels.triplet_chosen_grad_x(p, out, begin, end); });
  if (want_y) {
    const Tensor touched = scratch(p.columns, ScalarType::Bool);
    for_each_rows(workers_for_pairs(p, 4.0 * double(triplets) + double(p.columns)), p.columns, [&](int64_t, int64_t begin, int64_t end) {
      kernels.triplet_chosen_grad_y(p, out, begin, end, written<bool>(touched));
    });
  }
  return {dx, dy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("triplet_chosen", TORCH_BOX(&triplet_chosen));
  m.impl("triplet_chosen_grad", TORCH_BOX(&triplet_chosen_grad));
}
