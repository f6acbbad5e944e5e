// kdfast::unit_length and kdfast::unit_length_grad on the CPU.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "bind.h"
#include "dispatch.h"

namespace {

constexpr double kWorkOfElement = 8;  // multiply-adds that reading, dividing and writing one takes as long as

template <class F>
void for_rows(int64_t rows, int64_t width, const F& f) {
  for_each_rows(workers_for(double(rows) * double(width) * kWorkOfElement), rows, [&](int64_t, int64_t begin, int64_t end) { f(begin, end); });
}

std::tuple<Tensor, Tensor> unit_length(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor y = output(x, {rows, width}, x.scalar_type()), norm = output(x, {rows});
  const kdfast::UnitLength u{rows, width, row_matrix("x", x, {rows, width}), y.mutable_data_ptr(), floats_of(norm)};
  for_rows(rows, width, [&](int64_t begin, int64_t end) { kdfast::cpu_kernels().unit_length(u, begin, end); });
  return {y, norm};
}

Tensor unit_length_grad(const Tensor& dy, const Tensor& x, const Tensor& norm) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy must have the dtype of x");
  const int64_t rows = x.size(0), width = x.size(1);
  const Tensor dx = output(x, {rows, width}, x.scalar_type());
  const kdfast::UnitLengthGradient u{rows,
                                     width,
                                     row_matrix("x", x, {rows, width}),
                                     row_matrix("dy", dy, {rows, width}),
                                     packed<float>("norm", norm, {rows}),
                                     dx.mutable_data_ptr()};
  for_rows(rows, width, [&](int64_t begin, int64_t end) { kdfast::cpu_kernels().unit_length_grad(u, begin, end); });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("unit_length", TORCH_BOX(&unit_length));
  m.impl("unit_length_grad", TORCH_BOX(&unit_length_grad));
}
