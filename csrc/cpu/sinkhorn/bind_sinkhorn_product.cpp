// kdfast::sinkhorn_product on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "sinkhorn/bind_sinkhorn.h"

namespace {

using kdfast::SinkhornProduct;

int64_t product_workspace(const SinkhornProblem<float>& p) { return kdfast::cpu_kernels().sinkhorn_product_workspace(p); }
int64_t product_workspace(const SinkhornProblem<double>& p) { return kdfast::cpu_kernels().sinkhorn_product_workspace_double(p); }
void product_one(const SinkhornProblem<float>& p, const SinkhornProduct<float>& product, float* work) {
  kdfast::cpu_kernels().sinkhorn_product(p, product, work);
}
void product_one(const SinkhornProblem<double>& p, const SinkhornProduct<double>& product, double* work) {
  kdfast::cpu_kernels().sinkhorn_product_double(p, product, work);
}

// sum_i E_ij (plus_i + factor_i (E v)_i) [B, m], 0 at padding. Rows of few problems are divided, and their sums added in order.
template <class Real>
Tensor product(const Problems<Real>& problems, const Tensor& f, const Tensor& g, const Tensor& v, const Tensor& plus, const Tensor& factor) {
  const auto [batch, n, m] = std::tuple(problems.batch, problems.n, problems.m);
  SinkhornProduct<Real> first{};
  first.f = packed<Real>("f", f, {batch, n}), first.g = packed<Real>("g", g, {batch, m}), first.v = packed<Real>("v", v, {batch, m});
  first.plus = packed<Real>("plus", plus, {batch, n}), first.factor = packed<Real>("factor", factor, {batch, n});
  Tensor out = torch::stable::new_empty(v, {batch, m});
  torch::stable::zero_(out);
  if (out.numel() == 0) return out;
  const int64_t threads = torch::stable::get_num_threads();
  const double entries = double(n) * double(m) * double(batch);
  const int64_t workers = std::clamp<int64_t>(int64_t(entries / kEntriesAThread), 1, std::min(threads, batch * std::max<int64_t>(n, 1)));
  const int64_t parts = batch < workers ? std::min(n, workers) : 1, space = product_workspace(problems.first_padded());
  const Workspace<Real> work(workers * space + batch * parts * m);
  Real *const scratch = work.data(), *const sums = scratch + workers * space, *const to = values<Real>(out);
  for_each_task(workers, batch * parts, [&](int64_t worker, int64_t task) {
    const int64_t i = task / parts, part = task % parts;
    const SinkhornProblem<Real> p = problems.at(i);
    SinkhornProduct<Real> s = first;
    s.f += i * n, s.g += i * m, s.v += i * m, s.plus += i * n, s.factor += i * n;
    s.begin = part * p.n / parts, s.end = (part + 1) * p.n / parts, s.columns = sums + task * m;
    product_one(p, s, scratch + worker * space);
  });
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t columns = problems.at(i).m;
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t j = 0; j < columns; ++j) to[i * m + j] += sums[(i * parts + part) * m + j];
  }
  return out;
}

Tensor sinkhorn_product(const OptionalTensor& cost, const OptionalTensor& x, const OptionalTensor& y, const Tensor& a, const Tensor& b, const Tensor& epsilon,
                        const OptionalTensor& rows, const OptionalTensor& cols, std::string metric, std::optional<double> rho_a, std::optional<double> rho_b,
                        const Tensor& f, const Tensor& g, const Tensor& v, const Tensor& plus, const Tensor& factor) {
  if (a.scalar_type() == ScalarType::Double)
    return product<double>({cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b}, f, g, v, plus, factor);
  return product<float>({cost, x, y, a, b, epsilon, rows, cols, metric, rho_a, rho_b}, f, g, v, plus, factor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("sinkhorn_product", TORCH_BOX(&sinkhorn_product)); }
