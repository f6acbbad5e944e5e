// AVX-512 with tile registers, AMX (Sapphire Rapids and later); floats as in avx512_bf16.h.
#include "isa/support.h"

#if KDFAST_HAS_AMX

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,avx512bf16,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,avx512bf16,amx-tile,amx-bf16")
#endif

#define KDFAST_UNIT(unit) unit##_kernels_avx512_amx
#define KDFAST_LANES 16
#define KDFAST_VECS 4
#define KDFAST_BF16_INSTRUCTIONS
#define KDFAST_TILE_INSTRUCTIONS

#endif
