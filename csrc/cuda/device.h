// The words kernels are written in, beyond those CUDA has itself. nvcc takes them from the hardware; any other compiler takes them, and
// CUDA's own, from an emulator of the device on the CPU (tests/cuda_emulator), so that the same source runs without a GPU.
#pragma once

#include <stdint.h>

#ifndef __CUDACC__
#include "emulator.h"
#else
#include <cuda_runtime.h>

namespace kdfast {
namespace device {

// Two units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// One unit in the last place; 0 of what is beyond 2^126.
__device__ __forceinline__ float reciprocal(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

__device__ __forceinline__ float float_of_half(uint16_t bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
}

// What the compiler derives nothing from in advance: addresses and logarithms kept through a loop are registers that the loop lacks.
__device__ __forceinline__ const float* known_here(const float* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}
__device__ __forceinline__ int known_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ float known_here(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

// Blocks of a cluster.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif

__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return __clusterRelativeBlockRank();
#else
  return 0;
#endif
}

__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#endif
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ const float* of_block(const float* shared, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<const float*>(__cluster_map_shared_rank(shared, rank));
#else
  return shared;
#endif
}

__device__ __forceinline__ float* shared_memory() {
  extern __shared__ float kdfast_shared[];
  return kdfast_shared;
}

}  // namespace device

// Multiprocessors of the current device.
inline int processors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Whether blocks of a cluster can run on it.
inline bool has_clusters() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

struct Launch {
  int64_t blocks;  // a multiple of `cluster`
  int threads;
  int64_t shared_bytes;
  int cluster;
  void* stream;
};

inline cudaLaunchConfig_t config_of(const Launch& how, cudaLaunchAttribute& cluster) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(how.cluster), cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(how.blocks)), config.blockDim = dim3(unsigned(how.threads));
  config.dynamicSmemBytes = size_t(how.shared_bytes), config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = &cluster, config.numAttrs = how.cluster > 1 ? 1 : 0;
  return config;
}

// How many clusters of such blocks the current device runs at a time, as registers, shared memory and its groups of multiprocessors allow.
template <class Params>
int resident(void (*kernel)(Params), const Launch& how) {
  int count = 0;
  cudaError_t error = cudaSuccess;
  if (how.cluster > 1) {
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = config_of(how, cluster);
    error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  } else {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, how.threads, size_t(how.shared_bytes));
    count *= processors();
  }
  if (error != cudaSuccess) cudaGetLastError();  // the launch will say what is wrong; PyTorch would report it of its next one too
  return error == cudaSuccess && count > 0 ? count : 1;
}

// Null, or what went wrong.
template <class Params>
const char* launch(void (*kernel)(Params), const Launch& how, const Params& params) {
  cudaError_t error = cudaSuccess;
  if (how.shared_bytes > (48 << 10)) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = config_of(how, cluster);
    error = cudaLaunchKernelEx(&config, kernel, params);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or PyTorch would report it once more, of its next launch
  return cudaGetErrorString(error);
}

}  // namespace kdfast
#endif

namespace kdfast {

constexpr float kBitsPerNat = 1.4426950408889634f, kNatsPerBit = 0.6931471805599453f;  // log2 e, ln 2: exponentials are in base 2

namespace device {

// To the last place or next to it, without the branch that IEEE's division takes for the largest and least of numbers.
__device__ __forceinline__ float divide(float x, float y) {
  const float inverse = reciprocal(y), quotient = x * inverse;
  return fmaf(fmaf(-quotient, y, x), inverse, quotient);
}

}  // namespace device
}  // namespace kdfast
