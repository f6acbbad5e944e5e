// Vectors of one instruction set: loads with conversion, maximum, transpose, exp2.
//
// Included after an instruction set's header (isa/), which defines KDFAST_LANES and KDFAST_VECS. Everything is in an anonymous namespace,
// so each instruction set keeps its own copy, and no header of the C++ library is included here: the linker could keep an AVX-512 copy
// of one of its inline functions for everybody.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace {

constexpr int kLanes = KDFAST_LANES;  // floats in a vector
constexpr int kVecs = KDFAST_VECS;    // vectors across a panel

typedef float Vec __attribute__((vector_size(4 * KDFAST_LANES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * KDFAST_LANES), aligned(4), may_alias));
typedef uint32_t BitVec __attribute__((vector_size(4 * KDFAST_LANES), aligned(4), may_alias));
typedef uint16_t HalfBitVec __attribute__((vector_size(2 * KDFAST_LANES), aligned(2), may_alias));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline IntVec load_int(const int32_t* p) { return *reinterpret_cast<const IntVec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }

// x - 0 is x for every x, so the compiler is left with one broadcast (x + 0 is not: it turns -0 into +0).
inline Vec splat(float x) { return x - Vec{}; }

// A value the compiler must take as new: an equal computation is not merged with it, nor a product contracted into a sum.
inline Vec opaque(Vec x) {
#if defined(__x86_64__) && KDFAST_LANES == 16
  asm volatile("" : "+v"(x));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(x));
#else
  asm volatile("" : "+w"(x));
#endif
  return x;
}

// ---- what differs between instruction sets: maximum, conversion, transpose -------------------------------------

// larger(a, b) is b when either is NaN, on every instruction set.
#if KDFAST_LANES == 16

inline Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline float largest(Vec x) { return _mm512_reduce_max_ps((__m512)x); }
inline Vec load(const BFloat16* p) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline Vec load(const Half* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(Half* p, Vec x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT)); }

// Rows of 4-byte words: to[i * to_stride + j] = from[j * from_stride + i] for i, j < kLanes. Three rounds double the
// run of words that come from one column: pairs of words, pairs of pairs, then the 128-bit quarters.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) b[i] = _mm512_loadu_ps(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(b[i], b[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(b[i], b[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d low = (__m512d)a[i + half], high = (__m512d)a[i + half + 2];
      b[i + 2 * half] = (__m512)_mm512_unpacklo_pd(low, high);
      b[i + 2 * half + 1] = (__m512)_mm512_unpackhi_pd(low, high);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 even0 = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), even1 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd), odd1 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
    _mm512_storeu_ps(to + i * to_stride, _mm512_shuffle_f32x4(even0, even1, 0x88));
    _mm512_storeu_ps(to + (4 + i) * to_stride, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
    _mm512_storeu_ps(to + (8 + i) * to_stride, _mm512_shuffle_f32x4(even0, even1, 0xdd));
    _mm512_storeu_ps(to + (12 + i) * to_stride, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
  }
}

#elif KDFAST_LANES == 8

inline Vec larger(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline float largest(Vec x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}
inline Vec load(const BFloat16* p) {
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline Vec load(const Half* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store(Half* p, Vec x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT)); }

inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) b[i] = _mm256_loadu_ps(from + i * from_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(b[i], b[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(b[i], b[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m256d low = (__m256d)a[i + half], high = (__m256d)a[i + half + 2];
      b[i + 2 * half] = (__m256)_mm256_unpacklo_pd(low, high);
      b[i + 2 * half + 1] = (__m256)_mm256_unpackhi_pd(low, high);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(b[i], b[4 + i], 0x20));
    _mm256_storeu_ps(to + (4 + i) * to_stride, _mm256_permute2f128_ps(b[i], b[4 + i], 0x31));
  }
}

#else  // any processor: vectors the compiler splits as it needs, and plain loops

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
inline float largest(Vec x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
}
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
// Half to float: move exponent and mantissa into place, then multiply by 2^112 to correct the exponent's bias
// (subnormals come out right); an exponent of all ones stays all ones.
inline float widen(Half x) {
  uint32_t bits = uint32_t(x.bits & 0x7fff) << 13;
  float out;
  __builtin_memcpy(&out, &bits, 4);
  out *= 0x1p112f;
  __builtin_memcpy(&bits, &out, 4);
  bits |= (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  bits |= uint32_t(x.bits & 0x8000) << 16;
  __builtin_memcpy(&out, &bits, 4);
  return out;
}
template <class T>
inline Vec load(const T* p) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = widen(p[i]);
  return out;
}
// Float to half, to the nearest, ties to even. Below 2^-14 the sum with 1/2 rounds to half's unit there, 2^-24.
inline Half narrow(float x) {
  const float magnitude = __builtin_fabsf(x), shifted = magnitude + 0.5f;
  uint32_t signed_bits, bits, low;
  __builtin_memcpy(&signed_bits, &x, 4);
  __builtin_memcpy(&bits, &magnitude, 4);
  __builtin_memcpy(&low, &shifted, 4);
  uint32_t out;
  if (x != x) {
    out = 0x7e00;
  } else if (magnitude >= 65536.0f) {
    out = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    out = low - 0x3f000000u;
  } else {
    out = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1)) >> 13;
  }
  return {uint16_t(out | (signed_bits >> 16 & 0x8000))};
}
inline void store(Half* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = narrow(x[i]);
}
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) __builtin_memcpy(to + i * to_stride + j, from + j * from_stride + i, 4);
}

#endif

// ---- the same everywhere ----------------------------------------------------------------------------------------

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

// Bits of the lanes where a >= b; not where either is NaN.
inline uint32_t lanes_at_least(Vec a, Vec b) {
#if KDFAST_LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif KDFAST_LANES == 8
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t(a[lane] >= b[lane]) << lane;
  return bits;
#endif
}

// To the nearest, ties to even; NaN stays NaN.
inline void store(BFloat16* p, Vec x) {
  const BitVec bits = (BitVec)x, rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const BitVec kept = x == x ? rounded : bits | 0x400000u;
  *reinterpret_cast<HalfBitVec*>(p) = __builtin_convertvector(kept >> 16, HalfBitVec);
}

// The first `count` < kLanes elements, then zeros; nothing beyond them is read.
template <class T>
inline Vec load_partial(const T* p, int64_t count) {
  T copy[kLanes] = {};
  __builtin_memcpy(copy, p, size_t(count) * sizeof(T));
  return load(copy);
}

// Elements d to d + kLanes of a row, zeros beyond its `width`.
template <class T>
inline Vec load_row(const T* row, int64_t d, int64_t width) {
  if (d + kLanes <= width) return load(row + d);
  return d < width ? load_partial(row + d, width - d) : Vec{};
}

// Stores elements d to d + kLanes of a row, none beyond its `width`.
template <class T>
inline void store_row(T* row, int64_t d, int64_t width, Vec x) {
  if (d + kLanes <= width) return store(row + d, x);
  T copy[kLanes];
  store(copy, x);
  __builtin_memcpy(row + d, copy, size_t(width - d) * sizeof(T));
}

inline float total(Vec x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// 2^t for t <= about 0, relative error below 1.6e-7; exactly 0 for t <= -127 (so for -inf), exactly 1 at 0, NaN for NaN.
//
// t = n + f with n = round(t), |f| <= 1/2, found by adding 1.5 * 2^23 + 127: the sum's unit is 1, so its low bits are
// n + 127, which shifted left by 23 are the float 2^n. 2^f is a minimax polynomial whose constant term is exactly 1.
inline Vec exp2_nonpositive(Vec t) {
  const float magic = 12582912.0f + 127.0f;
  t = larger(splat(-127.0f), t);
  const Vec shifted = t + splat(magic);
  const Vec f = t - (shifted - splat(magic));
  Vec p = multiply_add(f, splat(0x1.5bba14p-10f), splat(0x1.3cea88p-7f));
  p = multiply_add(p, f, splat(0x1.c6b752p-5f));
  p = multiply_add(p, f, splat(0x1.ebf9bcp-3f));
  p = multiply_add(p, f, splat(0x1.62e42ap-1f));
  p = multiply_add(p, f, splat(1.0f));
  return p * (Vec)((IntVec)shifted << 23);
}

}  // namespace
