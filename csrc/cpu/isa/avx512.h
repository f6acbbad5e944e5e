// AVX-512 without bf16 instructions (Skylake-X and later).
#include "isa/support.h"

#if KDFAST_HAS_X86

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#endif

#define KDFAST_UNIT(unit) unit##_kernels_avx512
#define KDFAST_LANES 16
#define KDFAST_VECS 4

#endif
