// What compute capability 9.0 has beyond device.h, each a function: copies of tiles by the tensor memory accelerator (TMA), barriers in shared
// memory that count its bytes, products of a warpgroup (wgmma), registers that move between warpgroups. docs/gpu-kernels.md derives the layout
// of tiles. Other compilers than nvcc take these from the emulator, which reads descriptors and swizzled memory as the hardware does.
#pragma once

#include "device.h"
#include "element_type.h"

#ifndef __CUDACC__
#include "hopper_emulator.h"
#else
#include <cuda.h>

namespace kdfast {
namespace device {

// These instructions are of sm_90a alone: neither of earlier GPUs nor of later ones.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

// In place of a kernel where it is not compiled for them: nothing done must not pass for a result.
__device__ __forceinline__ void stop() { asm volatile("trap;"); }

using TensorMap = CUtensorMap;

// By the thread that made them, before the block's barrier: the copy engine sees them.
__device__ __forceinline__ void barriers_made() {
  barriers_made_for_cluster();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// After ordinary writes to shared memory that products or copies come upon, by those who wrote, before they meet the others.
__device__ __forceinline__ void shared_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// `threads` of the block, whole warps, meet at number `id`; those that arrive do not wait.
__device__ __forceinline__ void named_barrier_wait(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- copies -----------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// The box of `map` at (column, row, entry) into shared memory, its bytes counted by the barrier; what lies outside the tensor is 0.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, int column, int row, int entry, Barrier* barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
               "l"(reinterpret_cast<uint64_t>(map)), "r"(column), "r"(row), "r"(entry), "r"(shared_address(barrier))
               : "memory");
}

// ---- products of a warpgroup ------------------------------------------------------------------------------------------------

// Before the first of a series, after ordinary instructions have touched its registers.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `kPending` committed groups are under way. `sums` of the others are there from here on.
template <int kPending, int kCount>
__device__ __forceinline__ void products_wait(float (&sums)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#define KDFAST_NUMBERS_32                                                                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, " \
  "%31"
#define KDFAST_NUMBERS_40 KDFAST_NUMBERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define KDFAST_NUMBERS_64 KDFAST_NUMBERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KDFAST_SUMS_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define KDFAST_SUMS_32 KDFAST_SUMS_8(0), KDFAST_SUMS_8(8), KDFAST_SUMS_8(16), KDFAST_SUMS_8(24)
#define KDFAST_SUMS_40 KDFAST_SUMS_32, KDFAST_SUMS_8(32)
#define KDFAST_SUMS_64 KDFAST_SUMS_40, KDFAST_SUMS_8(40), KDFAST_SUMS_8(48), KDFAST_SUMS_8(56)

// Two overloads for a number of columns: both matrices in shared memory, or the first in registers. I0 ... I4: numbers of the asm operands
// after the sums.
#define KDFAST_PRODUCTS(COLUMNS, COUNT, TYPE, NAME, I0, I1, I2, I3, I4)                                                                                \
  template <bool kAdd>                                                                                                                                 \
  __device__ __forceinline__ void multiply_##TYPE(float (&d)[COUNT], uint64_t a, uint64_t b) {                                                         \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" I2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME               \
                 " {" KDFAST_NUMBERS_##COUNT "}, %" I0 ", %" I1 ", add, 1, 1, 0, 0;\n}"                                                                \
                 : KDFAST_SUMS_##COUNT                                                                                                                 \
                 : "l"(a), "l"(b), "n"(int(kAdd)));                                                                                                    \
  }                                                                                                                                                    \
  __device__ __forceinline__ void multiply_##TYPE(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b) {                                             \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME                  \
                 " {" KDFAST_NUMBERS_##COUNT "}, {%" I0 ", %" I1 ", %" I2 ", %" I3 "}, %" I4 ", add, 1, 1, 1;\n}"                                     \
                 : KDFAST_SUMS_##COUNT                                                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                                \
  }

KDFAST_PRODUCTS(64, 32, bfloat16, "bf16", "32", "33", "34", "35", "36")
KDFAST_PRODUCTS(80, 40, bfloat16, "bf16", "40", "41", "42", "43", "44")
KDFAST_PRODUCTS(128, 64, bfloat16, "bf16", "64", "65", "66", "67", "68")
KDFAST_PRODUCTS(64, 32, float16, "f16", "32", "33", "34", "35", "36")
KDFAST_PRODUCTS(80, 40, float16, "f16", "40", "41", "42", "43", "44")
KDFAST_PRODUCTS(128, 64, float16, "f16", "64", "65", "66", "67", "68")

#undef KDFAST_PRODUCTS
#undef KDFAST_SUMS_64
#undef KDFAST_SUMS_40
#undef KDFAST_SUMS_32
#undef KDFAST_SUMS_8
#undef KDFAST_NUMBERS_64
#undef KDFAST_NUMBERS_40
#undef KDFAST_NUMBERS_32

// A warpgroup's 64 x 2 kCount tile: d = A B^T + (kAdd ? d : 0), both of 16 columns and K-major in shared memory.
template <Element kType, bool kAdd, int kCount>
__device__ __forceinline__ void multiply(float (&d)[kCount], uint64_t a, uint64_t b) {
  if constexpr (kType == Element::kBFloat16) {
    multiply_bfloat16<kAdd>(d, a, b);
  } else {
    multiply_float16<kAdd>(d, a, b);
  }
}

// d += A B, A of 16 columns in registers, the 16 rows of B in shared memory (MN-major).
template <Element kType, int kCount>
__device__ __forceinline__ void multiply(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (kType == Element::kBFloat16) {
    multiply_bfloat16(d, a, b);
  } else {
    multiply_float16(d, a, b);
  }
}

// Two numbers rounded to 16 bits, the first in the low half.
template <Element kType>
__device__ __forceinline__ uint32_t pair_of(float low, float high) {
  uint32_t out;
  if constexpr (kType == Element::kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  }
  return out;
}

// ---- registers of a thread, by all threads of a warpgroup ---------------------------------------------------------------------

template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace device

// Boxes of `box_rows` x 64 of a tensor [entries, rows, width] of 16-bit numbers, in shared memory with the 128-byte swizzle. Null, or what
// went wrong.
inline const char* encode_map(device::TensorMap& map, const void* data, Element type, int64_t entries, int64_t rows, int64_t width, int64_t entry_stride,
                              int box_rows) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (found != cudaDriverEntryPointSuccess || function == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  const cuuint64_t sizes[3] = {cuuint64_t(width), cuuint64_t(rows), cuuint64_t(entries)};
  const cuuint64_t strides[2] = {cuuint64_t(2 * width), cuuint64_t(2 * entry_stride)};  // bytes
  const cuuint32_t box[3] = {64, cuuint32_t(box_rows), 1}, steps[3] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, type == Element::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, const_cast<void*>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the tensor";
}

}  // namespace kdfast
#endif

namespace kdfast {
namespace device {

// Tiles of R rows are cut into slices of 64 columns, [R, 64] each: a row of a slice is 128 bytes, eight rows are one pattern of the swizzle.
constexpr int kSlice = 64, kSliceRow = 128, kPattern = 1024;  // columns; bytes

// Of a matrix in shared memory for wgmma: 14 bits each of its address, the distance of slices and that of patterns, in units of 16 bytes;
// bits 62 and 63 are the 128-byte swizzle.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int slice_bytes) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(slice_bytes >> 4 & 0x3fff) << 16 | uint64_t(kPattern >> 4) << 32 | uint64_t(1) << 62;
}

// Shared memory from its first multiple of 1024 bytes: where patterns begin.
__device__ __forceinline__ char* patterned_memory() {
  char* const memory = reinterpret_cast<char*>(shared_memory());
  return memory + (-shared_address(memory) & (kPattern - 1));
}

}  // namespace device
}  // namespace kdfast
