// kdfast::sinkhorn_assign and sinkhorn_normalize on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "sinkhorn/bind_sinkhorn.h"

namespace {

using kdfast::SinkhornAssign;
using kdfast::SinkhornNormalize;

int64_t workers_of(double entries, int64_t most) { return workers_for(entries * (kMinWork / kEntriesAThread), std::max<int64_t>(most, 1)); }

int64_t assign_workspace(const SinkhornAssign<float>& p) { return kdfast::cpu_kernels().sinkhorn_assign_workspace(p); }
int64_t assign_workspace(const SinkhornAssign<double>& p) { return kdfast::cpu_kernels().sinkhorn_assign_workspace_double(p); }
void assign_part(const SinkhornAssign<float>& p, float* work) { kdfast::cpu_kernels().sinkhorn_assign(p, work); }
void assign_part(const SinkhornAssign<double>& p, double* work) { kdfast::cpu_kernels().sinkhorn_assign_double(p, work); }

// log sum_n 2^(factor s) of a column from each worker's largest and sum, in nats.
template <class Real>
Real joined_lse(const Real* parts, int64_t workers, int64_t padded, int64_t j) {
  Real largest = parts[j], sum = 0;
  for (int64_t w = 1; w < workers; ++w) largest = std::max(largest, parts[2 * w * padded + j]);
  for (int64_t w = 0; w < workers; ++w) sum += parts[(2 * w + 1) * padded + j] * std::exp2(parts[2 * w * padded + j] - largest);
  return Real(0.6931471805599453) * largest + std::log(sum);
}

// One pass over scores [B, N, K]: the columns' log-sum-exp [B, K], or with v their sums of softmax rows, or the rows.
template <class Real>
Tensor assign(const Tensor& scores, const OptionalTensor& v, const Tensor& inverse_epsilon, bool codes) {
  const int64_t batch = scores.size(0), n = scores.size(1), columns = scores.size(2);
  STD_TORCH_CHECK(columns <= 1 || scores.stride(2) == 1, "rows of the scores must be contiguous");
  check("inverse_epsilon", inverse_epsilon, scalar_type<Real>(), {});
  STD_TORCH_CHECK(v.has_value() || !codes, "codes need v");
  SinkhornAssign<Real> p{};
  if constexpr (sizeof(Real) == 4) p.type = element_type("sinkhorn_assign", scores.scalar_type());
  p.stride = scores.stride(1), p.columns = columns;
  p.factor = 1.4426950408889634 * double(*data<Real>(inverse_epsilon));
  if (v.has_value()) {
    check("v", *v, scalar_type<Real>(), {batch, columns});
    STD_TORCH_CHECK(v->is_contiguous(), "v must be contiguous");
  }
  const auto reals = [&](std::initializer_list<int64_t> shape) { return torch::stable::new_empty(scores, shape, scalar_type<Real>()); };
  Tensor out = on_large_pages(codes ? reals({batch, n, columns}) : reals({batch, columns}));
  if (out.numel() == 0) return out;

  const int64_t padded = (columns + 15) / 16 * 16, workers = workers_of(double(n) * double(columns), n);
  const int64_t space = assign_workspace(p);
  Tensor scratch = reals({workers * (space + 2 * padded)});
  Real *const work = values<Real>(scratch), *const parts = work + workers * space, *const to = values<Real>(out);
  for (int64_t i = 0; i < batch; ++i) {
    for_each_task(workers, workers, [&](int64_t, int64_t w) {
      SinkhornAssign<Real> q = p;
      q.scores = static_cast<const char*>(scores.const_data_ptr()) + i * scores.stride(0) * int64_t(scores.element_size());
      q.begin = w * n / workers, q.end = (w + 1) * n / workers;
      q.v = v.has_value() ? data<Real>(*v) + i * columns : nullptr;
      q.largest = parts + 2 * w * padded, q.sums = codes ? nullptr : q.largest + padded;
      q.codes = to + i * n * columns;
      assign_part(q, work + w * space);
    });
    for (int64_t j = 0; j < columns && !codes; ++j) {
      Real sum = 0;
      for (int64_t w = 0; w < workers; ++w) sum += parts[(2 * w + 1) * padded + j];
      to[i * columns + j] = v.has_value() ? sum : joined_lse(parts, workers, padded, j);
    }
  }
  return out;
}

Tensor sinkhorn_assign(const Tensor& scores, const OptionalTensor& v, const Tensor& inverse_epsilon, bool codes) {
  STD_TORCH_CHECK(scores.dim() == 3 && scores.is_cpu(), "scores must have 3 dimensions, on the CPU");
  return scores.scalar_type() == ScalarType::Double ? assign<double>(scores, v, inverse_epsilon, codes) : assign<float>(scores, v, inverse_epsilon, codes);
}

int64_t normalize_workspace(const SinkhornNormalize<float>& p) { return kdfast::cpu_kernels().sinkhorn_normalize_workspace(p); }
int64_t normalize_workspace(const SinkhornNormalize<double>& p) { return kdfast::cpu_kernels().sinkhorn_normalize_workspace_double(p); }
void normalize_part(const SinkhornNormalize<float>& p, int64_t begin, int64_t end, float* work) { kdfast::cpu_kernels().sinkhorn_normalize(p, begin, end, work); }
void normalize_part(const SinkhornNormalize<double>& p, int64_t begin, int64_t end, double* work) {
  kdfast::cpu_kernels().sinkhorn_normalize_double(p, begin, end, work);
}

template <class Real>
Tensor normalize(const Tensor& logits, const OptionalTensor& gradient, int64_t iterations, double eps) {
  const int64_t batch = logits.size(0), n = logits.size(1);
  check("logits", logits, scalar_type<Real>(), {batch, n, n});
  STD_TORCH_CHECK(logits.is_contiguous(), "logits must be contiguous");
  SinkhornNormalize<Real> p{n, iterations, eps, data<Real>(logits), nullptr, nullptr};
  if (gradient.has_value()) {
    check("gradient", *gradient, scalar_type<Real>(), {batch, n, n});
    STD_TORCH_CHECK(gradient->is_contiguous(), "gradient must be contiguous");
    p.gradient = data<Real>(*gradient);
  }
  Tensor out = torch::stable::new_empty(logits, {batch, n, n});
  if (out.numel() == 0) return out;
  p.out = values<Real>(out);
  constexpr int64_t kMatrices = 64;  // a multiple of every vector
  const int64_t tasks = (batch + kMatrices - 1) / kMatrices, workers = workers_of(double(batch) * double(n * n) * double(iterations), tasks);
  const int64_t space = normalize_workspace(p) + 16;
  Tensor scratch = torch::stable::new_empty(logits, {workers * space});
  Real* const work = values<Real>(scratch);
  for_each_task(workers, tasks, [&](int64_t worker, int64_t task) {
    normalize_part(p, task * kMatrices, std::min(batch, (task + 1) * kMatrices), work + worker * space);
  });
  return out;
}

Tensor sinkhorn_normalize(const Tensor& logits, const OptionalTensor& gradient, int64_t iterations, double eps) {
  STD_TORCH_CHECK(logits.dim() == 3, "logits must have 3 dimensions, got ", logits.dim());
  STD_TORCH_CHECK(iterations >= 1, "iterations must be >= 1, got ", iterations);
  return logits.scalar_type() == ScalarType::Double ? normalize<double>(logits, gradient, iterations, eps) : normalize<float>(logits, gradient, iterations, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("sinkhorn_assign", TORCH_BOX(&sinkhorn_assign));
  m.impl("sinkhorn_normalize", TORCH_BOX(&sinkhorn_normalize));
}
