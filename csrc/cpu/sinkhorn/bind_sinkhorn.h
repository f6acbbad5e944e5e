// What the bindings of the Sinkhorn family share: the problems of a call, schedules, division among threads.
#pragma once

#include <algorithm>
#include <optional>
#include <string>

#include "bind.h"
#include "dispatch.h"
#include "large_pages.h"
#include "workspace.h"

namespace {

using kdfast::SinkhornMethod;
using kdfast::SinkhornMetric;
using kdfast::SinkhornProblem;
using kdfast::SinkhornSchedule;
using kdfast::SinkhornTeam;

constexpr double kEntriesAThread = 2e5;   // exponentials of 20 us

inline void run_team(int64_t size, void (*body)(void* self, int64_t worker), void* self) {
  if (size == 1) return body(self, 0);  // a small problem's sweep is a few microseconds
  for_each_task(size, size, [&](int64_t, int64_t worker) { body(self, worker); });
}

inline SinkhornMetric metric_of(const std::string& name) {
  if (name == "given") return SinkhornMetric::kGiven;
  if (name == "sqeuclidean") return SinkhornMetric::kSquared;
  if (name == "euclidean") return SinkhornMetric::kEuclidean;
  STD_TORCH_CHECK(name == "dot", "unknown metric ", name);
  return SinkhornMetric::kDot;
}

// The batch of problems of one call.
template <class Real>
struct Problems {
  int64_t batch, n, m;
  SinkhornProblem<Real> first;
  int64_t cost_batch_stride = 0;  // in bytes
  const Real* epsilon;
  const int64_t *rows = nullptr, *cols = nullptr;

  Problems(const OptionalTensor& cost, const OptionalTensor& x, const OptionalTensor& y, const Tensor& a, const Tensor& b, const Tensor& eps,
           const OptionalTensor& row_counts, const OptionalTensor& col_counts, const std::string& metric, std::optional<double> rho_a,
           std::optional<double> rho_b) {
    STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2, "a and b must have 2 dimensions, got ", a.dim(), " and ", b.dim());
    batch = a.size(0), n = a.size(1), m = b.size(1);
    first.metric = metric_of(metric);
    first.a = packed<Real>("a", a, {batch, n});
    first.b = packed<Real>("b", b, {batch, m});
    epsilon = packed<Real>("epsilon", eps, {batch});
    first.rho_a = rho_a.value_or(0), first.rho_b = rho_b.value_or(0);
    first.x = first.y = nullptr, first.cost = nullptr, first.cost_stride = first.width = 0;
    first.type = kdfast::ElementType::kFloat32;
    STD_TORCH_CHECK(cost.has_value() == (first.metric == SinkhornMetric::kGiven), "a cost must be given, or points");
    if (cost.has_value()) {
      take_cost(*cost);
    } else {
      STD_TORCH_CHECK(x.has_value() && y.has_value(), "x and y must be given together");
      first.width = x->size(2);
      first.x = packed<Real>("x", *x, {batch, n, first.width});
      first.y = packed<Real>("y", *y, {batch, m, first.width});
    }
    if (!row_counts.has_value()) return;
    STD_TORCH_CHECK(col_counts.has_value(), "rows and cols must be given together");
    for (const Tensor* counts : {&*row_counts, &*col_counts}) {
      check("rows and cols", *counts, ScalarType::Long, {batch});
      STD_TORCH_CHECK(counts->is_contiguous(), "rows and cols must be contiguous");
    }
    rows = data<int64_t>(*row_counts), cols = data<int64_t>(*col_counts);
  }

  SinkhornProblem<Real> at(int64_t i) const {
    SinkhornProblem<Real> p = first;
    p.n = rows == nullptr ? n : std::clamp<int64_t>(rows[i], 0, n);
    p.m = cols == nullptr ? m : std::clamp<int64_t>(cols[i], 0, m);
    p.a += i * n, p.b += i * m;
    p.epsilon = double(epsilon[i]);
    if (p.cost != nullptr) p.cost = static_cast<const char*>(p.cost) + i * cost_batch_stride;
    if (p.x != nullptr) p.x += i * n * p.width, p.y += i * m * p.width;
    return p;
  }

  // As large as any of them.
  SinkhornProblem<Real> first_padded() const {
    SinkhornProblem<Real> p = first;
    p.n = n, p.m = m;
    return p;
  }

 private:
  void take_cost(const Tensor& cost) {
    const bool shared = cost.dim() == 2;
    if (shared) {
      check("cost", cost, cost.scalar_type(), {n, m});
    } else {
      check("cost", cost, cost.scalar_type(), {batch, n, m});
    }
    const int64_t d = cost.dim() - 2;
    STD_TORCH_CHECK(m <= 1 || cost.stride(d + 1) == 1, "rows of the cost must be contiguous");
    if (sizeof(Real) == 8) {
      STD_TORCH_CHECK(cost.scalar_type() == ScalarType::Double, "the cost of float64 problems must be float64");
    } else {
      first.type = element_type("sinkhorn_solve", cost.scalar_type());
    }
    first.cost = cost.const_data_ptr();
    first.cost_stride = cost.stride(d);
    cost_batch_stride = shared ? 0 : cost.stride(0) * int64_t(cost.element_size());
  }
};

// Many problems: one to a thread at a time. Few: one after another, each over all threads.
struct Division {
  int64_t workers, team;

  Division(int64_t batch, int64_t n, int64_t m, int64_t sweeps) {
    const int64_t threads = torch::stable::get_num_threads();
    const double entries = double(n) * double(m);
    team = batch >= threads ? 1 : std::clamp<int64_t>(int64_t(entries / kEntriesAThread), 1, std::min(threads, n));
    workers = team > 1 ? 1 : std::clamp<int64_t>(int64_t(entries * double(batch) * double(sweeps) / kEntriesAThread), 1, std::min(threads, batch));
  }
};

inline SinkhornSchedule schedule_of(int64_t iterations, std::optional<double> tol, const std::string& method, std::optional<double> anneal_start,
                                    std::optional<double> anneal_factor) {
  SinkhornSchedule schedule{SinkhornMethod::kLog, iterations, tol.value_or(-1), anneal_start.value_or(0), anneal_factor.value_or(1)};
  if (method == "kernel") schedule.method = SinkhornMethod::kKernel;
  if (method == "proximal") schedule.method = SinkhornMethod::kProximal;
  STD_TORCH_CHECK(method == "auto" || method == "log" || schedule.method != SinkhornMethod::kLog, "unknown method ", method);
  STD_TORCH_CHECK(iterations >= 1, "iterations must be >= 1, got ", iterations);
  return schedule;
}

template <class Real>
Real* values(Tensor& x) {
  return static_cast<Real*>(x.mutable_data_ptr());
}

}  // namespace
