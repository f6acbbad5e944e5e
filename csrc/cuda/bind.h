// What the PyTorch side of every CUDA kernel shares: checks of tensors, the current stream, registration.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "element_type.h"

// USE_CUDA is set for the module that runs on GPUs; without it the same bindings serve the emulator, on CPU tensors.
#ifdef USE_CUDA
#define KDFAST_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m)
#else
#define KDFAST_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(kdfast_emulated, CPU, m)
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool on_device(const Tensor& x) {
#ifdef USE_CUDA
  return x.is_cuda();
#else
  return x.is_cpu();
#endif
}

inline void check(const char* name, const Tensor& x, ScalarType type, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(on_device(x), name, " must be a CUDA tensor");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " has dtype ", int(x.scalar_type()), ", expected ", int(type));
  STD_TORCH_CHECK(x.dim() == int64_t(shape.size()), name, " must have ", shape.size(), " dimensions, got ", x.dim());
  int64_t d = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(x.size(d) == size, name, " has size ", x.size(d), " in dimension ", d, ", expected ", size);
    ++d;
  }
}

// A contiguous tensor's elements.
template <class T>
const T* packed(const char* name, const Tensor& x, ScalarType type, std::initializer_list<int64_t> shape) {
  check(name, x, type, shape);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  return static_cast<const T*>(x.const_data_ptr());
}

inline const float* floats(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  return packed<float>(name, x, ScalarType::Float, shape);
}

inline kdfast::Element element_of(const char* name, const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return kdfast::Element::kFloat32;
  if (x.scalar_type() == ScalarType::BFloat16) return kdfast::Element::kBFloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, name, " must be float32, bfloat16 or float16");
  return kdfast::Element::kFloat16;
}

inline float* written(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// run(stream) on the device of `x`, in its current stream; what it returns is an error's text or null.
template <class Run>
void on_device_of(const Tensor& x, const Run& run) {
  void* stream = nullptr;
#ifdef USE_CUDA
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
#endif
  const char* const error = run(stream);
  STD_TORCH_CHECK(error == nullptr, "CUDA: ", error);
}

}  // namespace
