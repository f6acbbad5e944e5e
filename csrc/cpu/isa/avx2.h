// AVX2 with FMA (Haswell, Zen and later).
#include "isa/support.h"

#if KDFAST_HAS_X86

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define KDFAST_UNIT(unit) unit##_kernels_avx2
#define KDFAST_LANES 8
#define KDFAST_VECS 2

#endif
