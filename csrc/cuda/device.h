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
template <class T>
__device__ __forceinline__ const T* known_here(const T* pointer) {
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

// Barriers in shared memory, from compute capability 9.0 on as they are here: a phase ends when `count` threads have arrived and all the bytes
// expected are there.
using Barrier = uint64_t;

__device__ __forceinline__ uint32_t shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

__device__ __forceinline__ void barrier_init(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// By the thread that made them, before it meets the others.
__device__ __forceinline__ void barriers_made_for_cluster() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces bytes that a copy will bring.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Until the phase of this parity has ended; the first phase has parity 0, and the one before it counts as ended. What other blocks send is
// in shared memory by then: to acquire in the cluster's scope is the same instruction, and empties the first-level cache as well.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, unsigned parity) {
  uint32_t ended = 0;
  while (!ended)
    asm volatile("{\n.reg .pred ended;\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\nselp.u32 %0, 1, 0, ended;\n}"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}

// Four numbers to the same place in the shared memory of another block of the cluster (a multiple of 16 bytes), where the barrier counts them.
__device__ __forceinline__ void send_four(float* to, Barrier* barrier, unsigned rank, float x0, float x1, float x2, float x3) {
  uint32_t there, bell;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(bell) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there), "f"(x0), "f"(x1), "f"(x2),
               "f"(x3), "r"(bell)
               : "memory");
}

__device__ __forceinline__ float* shared_memory() {
  extern __shared__ float kdfast_shared[];
  return kdfast_shared;
}

// Blocks of a grid, of which one thread each speaks: what its block has written before signal, a block reads after await. Counts go round.
__device__ __forceinline__ void signal(unsigned* count) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory"); }

// Until there have been as many signals.
__device__ __forceinline__ void await(const unsigned* count, unsigned signals) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(count) : "memory");
  } while (int(seen - signals) < 0);
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

// Whether blocks of a grid may wait for one another on it.
inline bool has_cooperative_launches() {
  int device = 0, has = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&has, cudaDevAttrCooperativeLaunch, device);
  return has != 0;
}

struct Launch {
  int64_t blocks;  // a multiple of `cluster`
  int threads;
  int64_t shared_bytes;
  int cluster;
  void* stream;
  bool cooperative = false;  // all blocks are at work at a time, or the launch fails
};

inline cudaLaunchConfig_t config_of(const Launch& how, cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(how.blocks)), config.blockDim = dim3(unsigned(how.threads));
  config.dynamicSmemBytes = size_t(how.shared_bytes), config.stream = static_cast<cudaStream_t>(how.stream);
  config.attrs = attributes;
  if (how.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(how.cluster), cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (how.cooperative) {
    cudaLaunchAttribute& cooperative = attributes[config.numAttrs++];
    cooperative.id = cudaLaunchAttributeCooperative, cooperative.val.cooperative = 1;
  }
  return config;
}

// How many clusters of such blocks the current device runs at a time, as registers, shared memory and its groups of multiprocessors allow.
template <class Params>
int resident(void (*kernel)(Params), const Launch& how) {
  int count = 0;
  cudaError_t error = cudaSuccess;
  if (how.cluster > 1) {
    cudaLaunchAttribute attributes[2] = {};
    const cudaLaunchConfig_t config = config_of(how, attributes);
    error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  } else {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, how.threads, size_t(how.shared_bytes));
    count *= processors();
  }
  if (error != cudaSuccess) cudaGetLastError();  // the launch will say what is wrong; PyTorch would report it of its next one too
  return error == cudaSuccess && count > 0 ? count : 1;
}

// Of an error: null where there is none.
inline const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or PyTorch would report it once more, of its next launch
  return cudaGetErrorString(error);
}

// Null, or what went wrong.
inline const char* fill_with_zeros(void* data, int64_t bytes, void* stream) {
  return text_of(cudaMemsetAsync(data, 0, size_t(bytes), static_cast<cudaStream_t>(stream)));
}

template <class Params>
const char* launch(void (*kernel)(Params), const Launch& how, const Params& params) {
  cudaError_t error = cudaSuccess;
  if (how.shared_bytes > (48 << 10)) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchAttribute attributes[2] = {};
    const cudaLaunchConfig_t config = config_of(how, attributes);
    error = cudaLaunchKernelEx(&config, kernel, params);
  }
  return text_of(error);
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
