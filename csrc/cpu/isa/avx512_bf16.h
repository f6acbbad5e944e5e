// AVX-512 with bf16 dot products (Zen 4 and later, Cooper Lake, Sapphire Rapids and later).
#include "isa/support.h"

#if KDFAST_HAS_X86

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,avx512bf16")
#endif

#define KDFAST_UNIT(unit) unit##_kernels_avx512_bf16
#define KDFAST_LANES 16
#define KDFAST_VECS 4
#define KDFAST_BF16_INSTRUCTIONS

#endif
