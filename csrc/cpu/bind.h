// What the PyTorch side of every CPU kernel shares: tensors as matrices, scratch, division among threads. Included by bind_*.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "../bind_tensors.h"
#include "engine/element.h"

namespace {

constexpr double kMinWork = 4e6;  // multiply-adds worth a thread: about 20 us

// ---- tensors, checked -----------------------------------------------------------------------------------------------------

inline kdfast::ElementType element_type(const char* op, ScalarType type) {
  if (type == ScalarType::Float) return kdfast::ElementType::kFloat32;
  if (type == ScalarType::BFloat16) return kdfast::ElementType::kBFloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, op, " on the CPU takes float32, bfloat16 or float16");
  return kdfast::ElementType::kFloat16;
}

inline kdfast::Matrix matrix(const char* op, const Tensor& x) { return {x.const_data_ptr(), element_type(op, x.scalar_type())}; }

// The elements of a contiguous tensor of T, to be written.
template <class T>
T* packed_output(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  packed<T>(name, x, shape);
  return static_cast<T*>(x.mutable_data_ptr());
}

// Contiguous, or a contiguous [...] expanded over the batch dimension; returns the batch stride in elements.
inline int64_t batch_stride(const char* name, const Tensor& x, bool may_be_shared) {
  int64_t expected = 1;
  bool inner = true;
  for (int64_t d = x.dim() - 1; d > 0; --d) {
    inner = inner && (x.size(d) == 1 || x.stride(d) == expected);
    expected *= x.size(d);
  }
  const bool shared = x.stride(0) == 0 && may_be_shared;
  STD_TORCH_CHECK(x.numel() == 0 || (inner && (x.size(0) == 1 || x.stride(0) == expected || shared)), name,
                  " must be contiguous", may_be_shared ? " (its batch stride may be 0)" : "");
  return shared || x.size(0) == 1 ? 0 : expected;
}

template <class T>
const T* row_data(const char* name, const OptionalTensor& x, std::initializer_list<int64_t> shape) {
  if (!x.has_value()) return nullptr;
  check(name, *x, scalar_type<T>(), shape);
  batch_stride(name, *x, false);
  return data<T>(*x);
}

template <class T>
const T* column_data(const char* name, const OptionalTensor& x, std::initializer_list<int64_t> shape, int64_t* stride) {
  if (!x.has_value()) return nullptr;
  check(name, *x, scalar_type<T>(), shape);
  *stride = batch_stride(name, *x, true);
  return data<T>(*x);
}

// Query-side and bank-side matrices, of any element type.
inline kdfast::Matrix row_matrix(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  check(name, x, x.scalar_type(), shape);
  batch_stride(name, x, false);
  return matrix(name, x);
}

inline kdfast::Matrix column_matrix(const char* name, const Tensor& x, std::initializer_list<int64_t> shape, int64_t* stride) {
  check(name, x, x.scalar_type(), shape);
  *stride = batch_stride(name, x, true);
  return matrix(name, x);
}

inline kdfast::Precision precision_of(int64_t precision) {
  STD_TORCH_CHECK(precision >= 0 && precision <= 2, "precision must be 0 (float), 1 (bf16x3) or 2 (bf16), got ", precision);
  return kdfast::Precision(precision);
}

// ---- results and scratch ----------------------------------------------------------------------------------------------------

// By the C functions where there are any: a call through the dispatcher by name takes a microsecond, and a small call makes a dozen tensors.
inline Tensor output(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type = ScalarType::Float) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  require_success("an allocation",
                  aoti_torch_aten_new_empty(like.get(), shape.data(), int64_t(shape.size()), &dtype, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

inline Tensor scratch(int64_t count, ScalarType type = ScalarType::Float) {
  static const Tensor* const any = new Tensor(torch::stable::empty({0}, type));
  return output(*any, {count}, type);
}

// Floats of `shape`, all of them `value`.
inline Tensor filled(const Tensor& like, const std::vector<int64_t>& shape, double value) {
  const Tensor made = output(like, shape);
  std::fill_n(floats_of(made), made.numel(), float(value));
  return made;
}

// A contiguous `x` as a batch of one, with `of_one` its elements as rows of one.
inline Tensor batch_of_one(const Tensor& x, bool of_one = false) {
  std::vector<int64_t> sizes{1}, strides{x.numel()};
  for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d)), strides.push_back(x.stride(d));
  if (of_one) sizes.push_back(1), strides.push_back(1);
  AtenTensorHandle view;
  require_success("a view",  // 0: it is added to the offset of x
                  aoti_torch__reinterpret_tensor(x.get(), int64_t(sizes.size()), sizes.data(), strides.data(), 0, &view));
  return Tensor(view);
}

// ---- threads -----------------------------------------------------------------------------------------------------------------

// Threads that so many multiply-adds are worth.
inline int64_t workers_for(double work, int64_t most = INT64_MAX) {
  return std::clamp<int64_t>(int64_t(work / kMinWork), 1, std::min<int64_t>(torch::stable::get_num_threads(), most));
}

// Called where a kernel hands over to code compiled for any machine. gcc leaves vector registers' upper halves set where a kernel's last call is of a
// function with vector arguments; older instructions, the mathematical library's and Python's, then wait for each other: up to ten times as long.
inline void leave_vectors() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx"))
    asm volatile("vzeroupper" ::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
                 "xmm13", "xmm14", "xmm15");
#endif
}

// f(worker, task) for every task, contiguous ranges of tasks to each worker.
template <class F>
void for_each_task(int64_t workers, int64_t tasks, const F& f) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t t = worker * tasks / workers; t < (worker + 1) * tasks / workers; ++t) f(worker, t);
    leave_vectors();
  });
}

constexpr int64_t kRowsApart = 32;  // rows a task begins at a multiple of: a chunk of every product

// f(worker, begin, end) for ranges of rows, one a worker.
template <class F>
void for_each_rows(int64_t workers, int64_t rows, const F& f) {
  const int64_t step = ((rows + workers - 1) / workers + kRowsApart - 1) / kRowsApart * kRowsApart;
  for_each_task(workers, workers, [&](int64_t worker, int64_t t) {
    const int64_t begin = std::min(rows, t * step), end = std::min(rows, begin + step);
    if (begin < end) f(worker, begin, end);
  });
}

}  // namespace
