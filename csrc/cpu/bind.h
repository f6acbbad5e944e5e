// What the PyTorch side of every kernel shares: checks of tensors, division among threads. Included by bind_*.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>

#include "engine/element.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kMinWork = 4e6;  // multiply-adds worth a thread: about 20 us

inline void check(const char* name, const Tensor& x, ScalarType type, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " has dtype ", int(x.scalar_type()), ", expected ", int(type));
  STD_TORCH_CHECK(x.dim() == int64_t(shape.size()), name, " must have ", shape.size(), " dimensions, got ", x.dim());
  int64_t d = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(x.size(d) == size, name, " has size ", x.size(d), " in dimension ", d, ", expected ", size);
    ++d;
  }
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

inline kdfast::ElementType element_type(const char* op, ScalarType type) {
  if (type == ScalarType::Float) return kdfast::ElementType::kFloat32;
  if (type == ScalarType::BFloat16) return kdfast::ElementType::kBFloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, op, " on the CPU takes float32, bfloat16 or float16");
  return kdfast::ElementType::kFloat16;
}

inline kdfast::Matrix matrix(const char* op, const Tensor& x) { return {x.const_data_ptr(), element_type(op, x.scalar_type())}; }

// f(worker, task) for every task, contiguous ranges of tasks to each worker.
template <class F>
void for_each_task(int64_t workers, int64_t tasks, const F& f) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t t = worker * tasks / workers; t < (worker + 1) * tasks / workers; ++t) f(worker, t);
  });
}

}  // namespace
