// kdfast::multi_similarity and its gradient on the CPU: checks, registration.

#include <torch/csrc/stable/library.h>

#include "triplet/bind_dense.h"

namespace {

kdfast::MultiSimilarityRule rule_of(double alpha, double beta, double base, double epsilon) {
  STD_TORCH_CHECK(alpha > 0 && beta > 0, "alpha and beta must be > 0, got ", alpha, " and ", beta);
  return {alpha, beta, float(base), float(epsilon)};
}

Dense similarities(const Tensor& x, const OptionalTensor& y, const Tensor& first, const Tensor& last, const Tensor& own, const Tensor& columns) {
  return Dense(x, y, first, last, own, columns, int64_t(kdfast::Metric::kProduct), INT64_MAX);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> multi_similarity(const Tensor& x, const OptionalTensor& y, const Tensor& first,
                                                                            const Tensor& last, const Tensor& own, const Tensor& columns,
                                                                            double alpha, double beta, double base, double epsilon) {
  const Dense dense = similarities(x, y, first, last, own, columns);
  const kdfast::MultiSimilarityRule rule = rule_of(alpha, beta, base, epsilon);
  const int64_t rows = dense.rows();
  Tensor loss = output(x, {rows, 1}), nearest = output(x, {rows}), tiles = no_tiles(x, dense.p);
  Tensor positive_log = output(x, {rows}, ScalarType::Double), negative_log = output(x, {rows}, ScalarType::Double);
  const kdfast::MultiSimilarityResult out{memory<float>(loss), memory<float>(nearest), memory<double>(positive_log), memory<double>(negative_log),
                                          memory<uint8_t>(tiles)};
  dense.for_each_rows([&](int64_t n, int64_t) { return dense.kernels.multi_similarity_workspace(dense.p, n); },
                      [&](int64_t begin, int64_t end, int64_t, float* work) { dense.kernels.multi_similarity(dense.p, rule, out, begin, end, work); });
  return {loss, output(x, {rows, 0}, ScalarType::Long), nearest, positive_log, negative_log, tiles};
}

std::tuple<Tensor, Tensor> multi_similarity_grad(const Tensor& g, const Tensor& nearest, const Tensor& positive_log, const Tensor& negative_log,
                                                 const Tensor& tiles, const Tensor& x, const OptionalTensor& y, const Tensor& first,
                                                 const Tensor& last, const Tensor& own, const Tensor& columns, double alpha, double beta,
                                                 double base, double epsilon, bool want_x, bool want_y) {
  const Dense dense = similarities(x, y, first, last, own, columns);
  const kdfast::MultiSimilarityRule rule = rule_of(alpha, beta, base, epsilon);
  const int64_t rows = dense.rows();
  DenseGradients gradients(dense, x, want_x, want_y);
  const kdfast::MultiSimilarityUpstream upstream{packed<float>("g", g, {rows, 1}), packed<float>("nearest", nearest, {rows}),
                                                 packed<double>("positive_log", positive_log, {rows}),
                                                 packed<double>("negative_log", negative_log, {rows}), tiles_data(tiles, dense.p)};
  const PairSums& sums = gradients.sums;
  dense.for_each_rectangle(
      sums, [&](int64_t n, int64_t m) { return dense.kernels.multi_similarity_grad_workspace(dense.p, sums, n, m); },
      [&](const PairTask& task, float* work) { dense.kernels.multi_similarity_grad(dense.p, rule, upstream, task, sums, work); });
  return gradients.finish([&](int64_t begin, int64_t end, float* pull) {
    dense.kernels.multi_similarity_pull(dense.p, rule, upstream, pull, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("multi_similarity", TORCH_BOX(&multi_similarity));
  m.impl("multi_similarity_grad", TORCH_BOX(&multi_similarity_grad));
}
