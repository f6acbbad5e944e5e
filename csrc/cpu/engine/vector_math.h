// Beside simd.h, for floats and doubles alike: exp2 of any argument, log2, sums of lanes; vectors of doubles.
//
// exp2 is p(t - floor(t)) scaled by 2^floor(t), p(0) = 1 exactly. AVX-512 has an instruction for each of the two steps, and one that looks up 2^(i/32),
// which leaves p a remainder below 1/32 and a low degree. They, and products, are slow where results are denormal: kernels run with those
// flushed to zero (FlushDenormals).
#pragma once

#include "engine/simd.h"

namespace {

typedef double DoubleVec __attribute__((vector_size(4 * KDFAST_LANES), aligned(8), may_alias));
typedef int64_t LongVec __attribute__((vector_size(4 * KDFAST_LANES), aligned(8), may_alias));

template <class Real>
struct Wide;
template <>
struct Wide<float> {
  using Vector = Vec;
  using Integers = IntVec;
  using Bits = int32_t;
  static constexpr int kMantissa = 23, kBias = 127, kLogTerms = 5;
};
template <>
struct Wide<double> {
  using Vector = DoubleVec;
  using Integers = LongVec;
  using Bits = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023, kLogTerms = 12;
};

template <class Real>
using VecOf = typename Wide<Real>::Vector;
template <class Real>
constexpr int64_t kWidth = int64_t(sizeof(VecOf<Real>) / sizeof(Real));

// Denormal numbers count as zero on this thread while it lives; without AVX the conversion from half needs them.
class FlushDenormals {
#if defined(__x86_64__) && KDFAST_LANES >= 8
 public:
  FlushDenormals() { __builtin_ia32_ldmxcsr(saved_ | 0x8040); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  const unsigned saved_ = __builtin_ia32_stmxcsr();
#else
 public:
  FlushDenormals() {}
#endif
};

inline DoubleVec load(const double* p) { return *reinterpret_cast<const DoubleVec*>(p); }
inline void store(double* p, DoubleVec x) { *reinterpret_cast<DoubleVec*>(p) = x; }
inline DoubleVec splat(double x) { return x - DoubleVec{}; }
inline DoubleVec multiply_add(DoubleVec a, DoubleVec b, DoubleVec c) { return a * b + c; }
inline DoubleVec larger(DoubleVec a, DoubleVec b) { return a > b ? a : b; }

// `count` elements, as a vector; whole vectors where count says so, else zeros follow.
template <class Real, class T>
inline VecOf<Real> load_count(const T* p, int64_t count) {
  if (count == kWidth<Real>) return load(p);
#if KDFAST_LANES == 16
  if constexpr (sizeof(T) == 4) return (VecOf<Real>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  if constexpr (sizeof(T) == 8) return (VecOf<Real>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
#endif
  T copy[kWidth<Real>] = {};
  __builtin_memcpy(copy, p, size_t(count) * sizeof(T));
  return load(copy);
}

template <class Real>
inline void store_count(Real* p, VecOf<Real> x, int64_t count) {
  if (count == kWidth<Real>) return store(p, x);
#if KDFAST_LANES == 16
  if constexpr (sizeof(Real) == 4) _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)x);
  if constexpr (sizeof(Real) == 8) _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)x);
#else
  __builtin_memcpy(p, &x, size_t(count) * sizeof(Real));
#endif
}

#if KDFAST_LANES == 16

// 2^(i/32), and 2^(i/16). Eight of the floats are those above the nearest: with them and the polynomial the largest error is least.
alignas(64) constexpr float kPowers[32] = {
    0x1p+0f,        0x1.059b0ep+0f, 0x1.0b5588p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a8p+0f, 0x1.29e9ep+0f,
    0x1.306fe2p+0f, 0x1.371a74p+0f, 0x1.3dea66p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f, 0x1.6247ecp+0f,
    0x1.6a09e8p+0f, 0x1.71f76p+0f,  0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c491ap+0f, 0x1.a5503cp+0f,
    0x1.ae89fap+0f, 0x1.b7f77p+0f,  0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afcp+0f, 0x1.f50766p+0f};
alignas(64) constexpr double kDoublePowers[16] = {0x1p+0,               0x1.0b5586cf9890fp+0, 0x1.172b83c7d517bp+0, 0x1.2387a6e756238p+0,
                                                  0x1.306fe0a31b715p+0, 0x1.3dea64c123422p+0, 0x1.4bfdad5362a27p+0, 0x1.5ab07dd485429p+0,
                                                  0x1.6a09e667f3bcdp+0, 0x1.7a11473eb0187p+0, 0x1.8ace5422aa0dbp+0, 0x1.9c49182a3f09p+0,
                                                  0x1.ae89f995ad3adp+0, 0x1.c199bdd85529cp+0, 0x1.d5818dcfba487p+0, 0x1.ea4afa2a490dap+0};

// What the table has for t: a sum whose unit is 1/32 (1/16), rounded down, ends in the index.
inline Vec table_power(Vec t) {
  const __m512 sum = _mm512_add_round_ps((__m512)t, (__m512)splat(0x1.8p18f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return (Vec)_mm512_permutex2var_ps(_mm512_load_ps(kPowers), (__m512i)sum, _mm512_load_ps(kPowers + 16));
}
inline DoubleVec table_power(DoubleVec t) {
  const __m512d sum = _mm512_add_round_pd((__m512d)t, (__m512d)splat(0x1.8p48), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return (DoubleVec)_mm512_permutex2var_pd(_mm512_load_pd(kDoublePowers), (__m512i)sum, _mm512_load_pd(kDoublePowers + 8));
}

// What is left: t less a multiple of 1/32 (1/16), not negative; 0 for infinities.
inline Vec remainder(Vec t) { return (Vec)_mm512_reduce_ps((__m512)t, 0x59); }
inline DoubleVec remainder(DoubleVec t) { return (DoubleVec)_mm512_reduce_pd((__m512d)t, 0x49); }

// (2^f - 1) / f of a remainder
inline Vec rise(Vec f) { return multiply_add(f, splat(0x1.f130c4p-3f), splat(0x1.62e088p-1f)); }
inline DoubleVec rise(DoubleVec f) {
  DoubleVec q = multiply_add(f, splat(0x1.4a038641bdb8cp-13), splat(0x1.5d7518cb71143p-10));
  q = multiply_add(q, f, splat(0x1.3b2ad01947922p-7));
  q = multiply_add(q, f, splat(0x1.c6b08d4e940f0p-5));
  q = multiply_add(q, f, splat(0x1.ebfbdff84120ep-3));
  return multiply_add(q, f, splat(0x1.62e42fefa39abp-1));
}

inline Vec times_power(Vec p, Vec t) { return (Vec)_mm512_scalef_ps((__m512)p, (__m512)t); }
inline DoubleVec times_power(DoubleVec p, DoubleVec t) { return (DoubleVec)_mm512_scalef_pd((__m512d)p, (__m512d)t); }

// To an aligned address, without reading the line into the caches; store_fence() before others look there.
inline void store_far(float* p, Vec x) { _mm512_stream_ps(p, (__m512)x); }
inline void store_far(double* p, DoubleVec x) { _mm512_stream_pd(p, (__m512d)x); }
inline void store_fence() { _mm_sfence(); }
inline Vec root(Vec x) { return (Vec)_mm512_sqrt_ps((__m512)x); }
inline DoubleVec root(DoubleVec x) { return (DoubleVec)_mm512_sqrt_pd((__m512d)x); }
inline float largest_lane(Vec x) { return largest(x); }
inline double largest_lane(DoubleVec x) { return _mm512_reduce_max_pd((__m512d)x); }
inline float sum_lanes(Vec x) { return _mm512_reduce_add_ps((__m512)x); }
inline double sum_lanes(DoubleVec x) { return _mm512_reduce_add_pd((__m512d)x); }

#else

template <class V>
using RealOf = decltype(V{}[0] + V{}[0]);

// t within [-bias, bias + 1], where 2^t runs from 0 to infinity; NaN stays.
template <class V>
inline V bounded(V t) {
  const V low = splat(RealOf<V>(-Wide<RealOf<V>>::kBias)), high = splat(RealOf<V>(Wide<RealOf<V>>::kBias + 1));
  t = t < low ? low : t;
  return t > high ? high : t;
}
// floor(t) + bias in the low bits of the sum: its unit is 1.
template <class V>
inline V shifted(V t) {
  using Real = RealOf<V>;
  constexpr Real kUnit = Real(3ll << (Wide<Real>::kMantissa - 1)) + Real(Wide<Real>::kBias);
  return (t - splat(Real(0.5))) + splat(kUnit);
}
template <class V>
inline V fraction(V t) {
  using Real = RealOf<V>;
  constexpr Real kUnit = Real(3ll << (Wide<Real>::kMantissa - 1)) + Real(Wide<Real>::kBias);
  return t - (shifted(t) - splat(kUnit));
}
template <class V>
inline V times_power(V p, V t) {
  using W = Wide<RealOf<V>>;
  return p * (V)((typename W::Integers)shifted(t) << W::kMantissa);
}
inline Vec power_of_fraction(Vec f) {
  Vec p = multiply_add(f, splat(0x1.e974f8p-10f), splat(0x1.277856p-7f));
  p = multiply_add(p, f, splat(0x1.c91ce6p-5f));
  p = multiply_add(p, f, splat(0x1.ebdb56p-3f));
  p = multiply_add(p, f, splat(0x1.62e4bap-1f));
  return multiply_add(p, f, splat(1.0f));
}

inline DoubleVec power_of_fraction(DoubleVec f) {
  constexpr double kCoefficients[] = {0x1.509edf2ecfdf8p-31, 0x1.c7ea67ee59ebfp-28, 0x1.b7a2459dca29cp-24, 0x1.629e703ac7f08p-20,
                                      0x1.ffce434c232f0p-17, 0x1.4309065c8357ap-13, 0x1.5d87fecf83f7bp-10, 0x1.3b2ab6fa48563p-7,
                                      0x1.c6b08d704fa4fp-5,  0x1.ebfbdff82c4ffp-3,  0x1.62e42fefa39efp-1,  1.0};
  DoubleVec p = splat(kCoefficients[0]);
#pragma GCC unroll 12
  for (int i = 1; i < 12; ++i) p = multiply_add(p, f, splat(kCoefficients[i]));
  return p;
}

template <class Real, class V>
inline void store_far(Real* p, V x) {
  store(p, x);
}
inline void store_fence() {}
template <class V>
inline V root(V x) {
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = sizeof(x[0]) == 4 ? __builtin_sqrtf(float(x[i])) : __builtin_sqrt(x[i]);
  return x;
}
template <class V>
inline RealOf<V> largest_lane(V x) {
  RealOf<V> most = x[0];
  for (size_t i = 1; i < sizeof(V) / sizeof(most); ++i) most = x[i] > most ? x[i] : most;
  return most;
}
template <class V>
inline RealOf<V> sum_lanes(V x) {
  RealOf<V> sum = 0;
  for (size_t i = 0; i < sizeof(V) / sizeof(sum); ++i) sum += x[i];
  return sum;
}

#endif

// sums_i = the sum of x_i's lanes for i < count; sums has a vector's room. Not for any V: a deduced vector type loses its alignment of one
// number, which vectors on the stack may have.
template <class Real>
inline void sum_lanes_of(const VecOf<Real>* x, int64_t count, Real* sums) {
#if KDFAST_LANES == 16
  if constexpr (sizeof(Real) == 4) {
    // pairs of vectors become one of half sums: halves of quarters, quarters, then within quarters
    __m512 y[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) y[i] = i < count ? _mm512_loadu_ps(&x[i]) : _mm512_setzero_ps();
    __m512 half[8], quarter[4], pair[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {  // y_i and y_{i + 4} of each half: [i, i + 4]
      const __m512 a = y[i / 4 * 8 + i % 4], b = y[i / 4 * 8 + i % 4 + 4];
      half[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) quarter[i] = _mm512_shuffle_f32x4(half[i], half[i + 4], 0x88) + _mm512_shuffle_f32x4(half[i], half[i + 4], 0xdd);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) pair[i] = _mm512_shuffle_ps(quarter[2 * i], quarter[2 * i + 1], 0x44) + _mm512_shuffle_ps(quarter[2 * i], quarter[2 * i + 1], 0xee);
    _mm512_storeu_ps(sums, _mm512_shuffle_ps(pair[0], pair[1], 0x88) + _mm512_shuffle_ps(pair[0], pair[1], 0xdd));
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) sums[i] = sum_lanes(x[i]);
}

// The same for a few vectors, without a detour through memory.
template <int kCount, class Real>
inline __attribute__((always_inline)) void sum_rows_of(const VecOf<Real>* x, Real* sums) {
#if KDFAST_LANES == 16
  if constexpr (kCount == 4 && sizeof(Real) == 4) {
    __m256 half[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)x[i]), _mm512_extractf32x8_ps((__m512)x[i], 1));
    const __m256 quarter = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(quarter), _mm256_extractf128_ps(quarter, 1)));
    return;
  }
  if constexpr (kCount == 4 && sizeof(Real) == 8) {
    __m256d half[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) half[i] = _mm256_add_pd(_mm512_castpd512_pd256((__m512d)x[i]), _mm512_extractf64x4_pd((__m512d)x[i], 1));
    const __m256d low = _mm256_hadd_pd(half[0], half[1]), high = _mm256_hadd_pd(half[2], half[3]);
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20), _mm256_permute2f128_pd(low, high, 0x31)));
    return;
  }
#endif
  for (int i = 0; i < kCount; ++i) sums[i] = sum_lanes(x[i]);
}

// 2^t for any t, relative error below 1.5e-7 (float) or 3e-16; 0 for t < -126 (-1022), infinity where it overflows, NaN for NaN.
template <class V>
inline V exp2(V t) {
#if KDFAST_LANES == 16
  const V f = remainder(t), power = table_power(t);
  return times_power(multiply_add(rise(f), f * power, power), t);
#else
  t = bounded(t);
  return times_power(power_of_fraction(fraction(t)), t);
#endif
}

// log2 x for normal x > 0, within an ulp or two of max(1, |log2 x|); x = 2^e m, m in [3/4, 3/2), and with z = (m - 1)/(m + 1)
// log2 m = 2/ln 2 (z + z^3/3 + z^5/5 + ...). -infinity for 0, NaN for NaN.
template <class Real>
inline VecOf<Real> log2(VecOf<Real> x) {
  using W = Wide<Real>;
  using V = VecOf<Real>;
  using I = typename W::Integers;
  using Bits = typename W::Bits;
  constexpr Real kTerms[] = {0x1.71547652b82fep+1,  0x1.ec709dc3a03fdp-1, 0x1.2776c50ef9bfep-1, 0x1.a61762a7aded9p-2, 0x1.484b13d7c02a9p-2, 0x1.0c9a84994022dp-2,
                             0x1.c68f568d31760p-3, 0x1.89f3b1694cffep-3, 0x1.5b9ac9b743f0dp-3, 0x1.3703c1f4d0ffep-3, 0x1.1964ec6fc9491p-3, 0x1.00ecd7e080215p-3};
  constexpr Bits kThreeQuarters = (Bits(W::kBias - 1) << W::kMantissa) | (Bits(1) << (W::kMantissa - 1));
  const I exponent = ((I)x - kThreeQuarters) >> W::kMantissa;
  const V m = (V)((I)x - (exponent << W::kMantissa));
  const V z = (m - 1) / (m + 1), square = z * z;
  V p = splat(kTerms[W::kLogTerms - 1]);
#pragma GCC unroll 12
  for (int k = W::kLogTerms - 2; k >= 0; --k) p = multiply_add(p, square, splat(kTerms[k]));
  const V out = multiply_add(p, z, __builtin_convertvector(exponent, V));
  const V zero = splat(Real(-__builtin_inf()));
  return x == 0 ? zero : (x == x ? out : x);
}

// f(j, lane, count): the vectors of 0 .. m in turn, `count` elements at j; `lane` < kUnroll spreads sums over registers.
// Always inlined: sums would live in memory otherwise.
template <class Real, int kUnroll = 4, class F>
inline __attribute__((always_inline)) void each_vector(int64_t m, const F& f) {
  constexpr int64_t kW = kWidth<Real>;
  int64_t j = 0;
  for (; j + kUnroll * kW <= m; j += kUnroll * kW) {
#pragma GCC unroll 4
    for (int v = 0; v < kUnroll; ++v) f(j + v * kW, v, kW);
  }
  for (; j + kW <= m; j += kW) f(j, 0, kW);
  if (j < m) f(j, kUnroll > 1, m - j);
}

}  // namespace
