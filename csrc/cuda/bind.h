// What the PyTorch side of every CUDA kernel shares: tensors' elements, the current stream, registration.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../bind_tensors.h"
#include "element_type.h"

// USE_CUDA is set for the module that runs on GPUs; without it the same bindings serve the emulator, on CPU tensors.
#ifdef USE_CUDA
#define KDFAST_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m)
#else
#define KDFAST_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(kdfast_emulated, CPU, m)
#endif

namespace {

inline kdfast::Element element_of(const char* name, const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return kdfast::Element::kFloat32;
  if (x.scalar_type() == ScalarType::BFloat16) return kdfast::Element::kBFloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, name, " must be float32, bfloat16 or float16");
  return kdfast::Element::kFloat16;
}

// run(stream) on the device of `x`, in its current stream; what it returns is an error's text or null.
template <class Run>
void on_device_of(const Tensor& x, const Run& run) {
  void* stream = nullptr;
#ifdef USE_CUDA
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  require_success("the current stream", aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
#endif
  const char* const error = run(stream);
  STD_TORCH_CHECK(error == nullptr, "CUDA: ", error);
}

}  // namespace
