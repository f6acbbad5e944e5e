// Checks of the tensors that kernels are handed: device, dtype, shape, contiguity. Included by the bind.h of each device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// USE_CUDA is set for the module that runs on GPUs; the CPU's bindings, and in the emulator CUDA's, take CPU tensors.
inline void check_device(const char* name, const Tensor& x) {
#ifdef USE_CUDA
  STD_TORCH_CHECK(x.is_cuda(), name, " must be a CUDA tensor");
#else
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU");
#endif
}

inline void check(const char* name, const Tensor& x, ScalarType type, std::initializer_list<int64_t> shape) {
  check_device(name, x);
  STD_TORCH_CHECK(x.scalar_type() == type, name, " has dtype ", int(x.scalar_type()), ", expected ", int(type));
  STD_TORCH_CHECK(x.dim() == int64_t(shape.size()), name, " must have ", shape.size(), " dimensions, got ", x.dim());
  int64_t d = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(x.size(d) == size, name, " has size ", x.size(d), " in dimension ", d, ", expected ", size);
    ++d;
  }
}

template <class T>
constexpr ScalarType scalar_type() {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, int64_t>);
  if (std::is_same_v<T, int64_t>) return ScalarType::Long;
  return std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// Of a call of the C ABI, which prints what went wrong. (The macro PyTorch has for this was renamed after 2.11.)
inline void require_success(const char* what, int32_t code) { STD_TORCH_CHECK(code == 0, what, " failed"); }

// The elements of a contiguous tensor of T.
template <class T>
const T* packed(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  check(name, x, scalar_type<T>(), shape);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
  return data<T>(x);
}

// Those that a kernel writes.
inline float* floats_of(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

}  // namespace
