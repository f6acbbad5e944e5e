// kdfast::sinkhorn_assign, sinkhorn_codes and sinkhorn_normalize on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "kept_output.h"
#include "sinkhorn/bind_sinkhorn.h"

namespace {

using kdfast::SinkhornAssign;
using kdfast::SinkhornNormalize;

int64_t workers_of(double entries, int64_t most) { return workers_for(entries * (kMinWork / kEntriesAThread), std::max<int64_t>(most, 1)); }

int64_t assign_workspace(const SinkhornAssign<float>& p) { return kdfast::cpu_kernels().sinkhorn_assign_workspace(p); }
int64_t assign_workspace(const SinkhornAssign<double>& p) { return kdfast::cpu_kernels().sinkhorn_assign_workspace_double(p); }
void assign_part(const SinkhornAssign<float>& p, float* work) { kdfast::cpu_kernels().sinkhorn_assign(p, work); }
void assign_part(const SinkhornAssign<double>& p, double* work) { kdfast::cpu_kernels().sinkhorn_assign_double(p, work); }

constexpr int64_t kStoredBytes = 32 << 20;  // codes that an L3 holds; beyond,
constexpr int64_t kStoredWorkers = 4;       // more than these wait for memory, of which stored exponentials move more

// Passes over the scores [n, columns] of one entry, their rows divided among workers.
template <class Real>
class AssignPasses {
 public:
  AssignPasses(const SinkhornAssign<Real>& p, int64_t n)
      : p_(p),
        n_(n),
        padded_((p.columns + 15) / 16 * 16),
        workers_(workers_of(double(n) * double(p.columns), n)),
        space_(assign_workspace(p)),
        work_(workers_ * (space_ + 2 * padded_) + padded_) {}

  int64_t workers() const { return workers_; }
  // A pass's argument v, 0 past the columns.
  Real* v() { return work_.data() + workers_ * (space_ + 2 * padded_); }

  void run(const void* scores, const Real* v, bool sums, Real* codes, bool back = false) {
    for_each_task(workers_, workers_, [&](int64_t, int64_t w) {
      SinkhornAssign<Real> q = p_;
      q.scores = scores, q.v = v, q.codes = codes;
      q.begin = w * n_ / workers_, q.end = (w + 1) * n_ / workers_;
      if (back) std::swap(q.begin, q.end);
      q.largest = part(w), q.sums = sums ? part(w) + padded_ : nullptr;
      assign_part(q, work_.data() + w * space_);
    });
  }

  // Whether every row was, after a pass over stored exponentials.
  bool balanced() {
    bool all = true;
    for (int64_t w = 0; w < workers_; ++w) all &= part(w)[0] == 0;
    return all;
  }

  // Of a column, after a pass with sums.
  Real sum(int64_t j) {
    Real sum = 0;
    for (int64_t w = 0; w < workers_; ++w) sum += part(w)[padded_ + j];
    return sum;
  }

  // log sum_n 2^(factor s) in nats, after a pass without v.
  Real lse(int64_t j) {
    Real largest = part(0)[j], sum = 0;
    for (int64_t w = 1; w < workers_; ++w) largest = std::max(largest, part(w)[j]);
    for (int64_t w = 0; w < workers_; ++w) sum += part(w)[padded_ + j] * std::exp2(part(w)[j] - largest);
    return Real(0.6931471805599453) * largest + std::log(sum);
  }

 private:
  Real* part(int64_t w) { return work_.data() + workers_ * space_ + 2 * w * padded_; }

  const SinkhornAssign<Real> p_;
  const int64_t n_, padded_, workers_, space_;
  const Workspace<Real> work_;
};

template <class Real>
SinkhornAssign<Real> assign_call(const Tensor& scores, const Tensor& inverse_epsilon) {
  STD_TORCH_CHECK(scores.dim() == 3 && scores.is_cpu(), "scores must have 3 dimensions, on the CPU");
  STD_TORCH_CHECK(scores.numel() == 0 || scores.size(2) == 1 || scores.stride(2) == 1, "rows of the scores must be contiguous");
  check("inverse_epsilon", inverse_epsilon, scalar_type<Real>(), {});
  SinkhornAssign<Real> p{};
  if constexpr (sizeof(Real) == 4) p.type = element_type("sinkhorn_assign", scores.scalar_type());
  p.stride = scores.stride(1), p.columns = scores.size(2);
  p.factor = 1.4426950408889634 * double(*data<Real>(inverse_epsilon));
  return p;
}

const void* entry(const Tensor& scores, int64_t i) {
  return static_cast<const char*>(scores.const_data_ptr()) + i * scores.stride(0) * int64_t(scores.element_size());
}

// One pass over scores [B, N, K]: the columns' log-sum-exp [B, K], or with v their sums of softmax rows, or the rows.
template <class Real>
Tensor assign(const Tensor& scores, const OptionalTensor& v, const Tensor& inverse_epsilon, bool codes) {
  const SinkhornAssign<Real> p = assign_call<Real>(scores, inverse_epsilon);
  const int64_t batch = scores.size(0), n = scores.size(1), columns = p.columns;
  STD_TORCH_CHECK(v.has_value() || !codes, "codes need v");
  if (v.has_value()) {
    check("v", *v, scalar_type<Real>(), {batch, columns});
    STD_TORCH_CHECK(v->is_contiguous(), "v must be contiguous");
  }
  Tensor out = codes ? kept_output(scores, {batch, n, columns}, scalar_type<Real>()) : output(scores, {batch, columns}, scalar_type<Real>());
  if (out.numel() == 0) return out;
  AssignPasses<Real> passes(p, n);
  Real* const to = values<Real>(out);
  for (int64_t i = 0; i < batch; ++i) {
    passes.run(entry(scores, i), v.has_value() ? data<Real>(*v) + i * columns : nullptr, !codes, codes ? to + i * n * columns : nullptr);
    for (int64_t j = 0; j < columns && !codes; ++j) to[i * columns + j] = v.has_value() ? passes.sum(j) : passes.lse(j);
  }
  return out;
}

Tensor sinkhorn_assign(const Tensor& scores, const OptionalTensor& v, const Tensor& inverse_epsilon, bool codes) {
  return scores.scalar_type() == ScalarType::Double ? assign<double>(scores, v, inverse_epsilon, codes) : assign<float>(scores, v, inverse_epsilon, codes);
}

// The codes of one entry by stored exponentials; false where they are not balanced. A column's share of the rows, in its factor, keeps sums where
// they are: without it they grow columns / n times an iteration. Each pass begins where the one before ended, whose rows are in the caches.
template <class Real>
bool stored_codes(AssignPasses<Real>& passes, const void* scores, int64_t iterations, int64_t n, int64_t columns, Real* codes) {
  Real* const factor = passes.v();
  const Real share = Real(n) / Real(columns);
  for (int64_t t = 0; t < iterations; ++t) {
    passes.run(t == 0 ? scores : nullptr, t == 0 ? nullptr : factor, true, codes, t % 2 != 0);
    bool balanced = passes.balanced();
    for (int64_t j = 0; j < columns; ++j) {
      const Real sum = passes.sum(j);
      balanced &= sum >= Real(1 / kdfast::kBalancedCodes) && sum <= Real(kdfast::kBalancedCodes);
      factor[j] = share / sum;
    }
    if (!balanced) return false;
  }
  passes.run(nullptr, factor, false, codes, iterations % 2 != 0);
  return passes.balanced();
}

// And by a pass of exponentials an iteration, whatever the scores: v = -log-sum-exp, then v - log of the column sums. Its mean is free: without it
// v is as small, and as exact, as columns differ.
template <class Real>
void plain_codes(AssignPasses<Real>& passes, const void* scores, int64_t iterations, int64_t columns, Real* codes) {
  Real* const v = passes.v();
  for (int64_t t = 0; t < iterations; ++t) {
    passes.run(scores, t == 0 ? nullptr : v, true, nullptr);
    double mean = 0;
    for (int64_t j = 0; j < columns; ++j) {
      v[j] = t == 0 ? -passes.lse(j) : v[j] - std::log(passes.sum(j));
      mean += double(v[j]) / double(columns);
    }
    for (int64_t j = 0; j < columns; ++j) v[j] -= Real(mean);
  }
  passes.run(scores, v, false, codes);
}

template <class Real>
Tensor codes_of(const Tensor& scores, const Tensor& inverse_epsilon, int64_t iterations) {
  const SinkhornAssign<Real> p = assign_call<Real>(scores, inverse_epsilon);
  STD_TORCH_CHECK(iterations >= 1, "iterations must be >= 1, got ", iterations);
  const int64_t batch = scores.size(0), n = scores.size(1), columns = p.columns;
  Tensor out = kept_output(scores, {batch, n, columns}, scalar_type<Real>());
  if (out.numel() == 0) return out;
  AssignPasses<Real> passes(p, n);
  std::fill_n(passes.v(), (columns + 15) / 16 * 16, Real(0));
  const bool store = n * columns * int64_t(sizeof(Real)) <= kStoredBytes || passes.workers() <= kStoredWorkers;
  for (int64_t i = 0; i < batch; ++i) {
    Real* const codes = values<Real>(out) + i * n * columns;
    if (!store || !stored_codes(passes, entry(scores, i), iterations, n, columns, codes)) plain_codes(passes, entry(scores, i), iterations, columns, codes);
  }
  return out;
}

Tensor sinkhorn_codes(const Tensor& scores, const Tensor& inverse_epsilon, int64_t iterations) {
  if (scores.scalar_type() == ScalarType::Double) return codes_of<double>(scores, inverse_epsilon, iterations);
  return codes_of<float>(scores, inverse_epsilon, iterations);
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
  m.impl("sinkhorn_codes", TORCH_BOX(&sinkhorn_codes));
  m.impl("sinkhorn_normalize", TORCH_BOX(&sinkhorn_normalize));
}
