// Exponentials of logits, factor * score, relative to a level of two floats, high + low.
//
// In base e: a factor log2e would have to be rounded, and of logits that share many digits, as after a large inner product, those in which they
// differ would be lost.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/stream.inl"

namespace {

// factor score - high - low
inline Vec exponent(Vec score, Vec factor, Vec high, Vec low) { return multiply_add(score, factor, -high) - low; }

// Logits in two floats.
struct Logits {
  Vec high, low;
};

inline Logits logits(Vec score, Vec factor) {
  const Vec z = factor * score, rest = multiply_add(factor, score, -z);
  return {z, z - z == Vec{} ? rest : Vec{}};
}
inline Logits larger(Logits a, Logits b) {
  const IntVec higher = (a.high > b.high) | ((a.high == b.high) & (a.low > b.low));
  return {higher ? a.high : b.high, higher ? a.low : b.low};
}
inline Vec gap(Logits a, Logits b) { return (a.high - b.high) + (a.low - b.low); }

// 0 for the maximum of nothing: so that nothing becomes inf - inf.
inline Vec finite_shift(Vec maximum) { return maximum == splat(-kInfinity) ? Vec{} : maximum; }

// x_i = value(i) for all i, and whatever is computed next waits for all of them.
//
// A chain of operations waits four cycles at each, and a processor looks ahead no further than some six chains written one after the other, which
// is what the compiler makes of independent vectors; so these are taken through a chain in step.
template <int kCount, class F>
inline void in_step(Vec (&x)[kCount], const F& value) {
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) x[i] = value(i);
  if (kCount == 1) return;
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) x[i] = opaque(x[i]);
}

// e^x for x <= about 0, relative error below 6.5e-8 from -1 on and 3e-7 at most; exactly 0 for x <= -88.1 (so for -inf), exactly 1 at 0, NaN for NaN.
//
// As exp2_nonpositive: x = n ln 2 + f with n = round(x log2e), whose bits make 2^n, and a minimax polynomial for e^f. The float ln 2 is 2e-9 off.
template <int kCount>
inline void exp_nonpositive(const Vec (&x)[kCount], Vec (&e)[kCount]) {
  const float magic = 12582912.0f + 127.0f;
  Vec clamped[kCount], shifted[kCount], f[kCount], p[kCount];
  in_step(clamped, [&](int i) { return larger(splat(-88.1f), x[i]); });
  in_step(shifted, [&](int i) { return multiply_add(clamped[i], splat(kLog2e), splat(magic)); });
  in_step(f, [&](int i) { return shifted[i] - splat(magic); });
  in_step(f, [&](int i) { return multiply_add(f[i], splat(-float(kLn2)), clamped[i]); });
  in_step(p, [&](int i) { return multiply_add(f[i], splat(0x1.6a23cep-10f), splat(0x1.123a20p-7f)); });
  in_step(p, [&](int i) { return multiply_add(p[i], f[i], splat(0x1.5558f2p-5f)); });
  in_step(p, [&](int i) { return multiply_add(p[i], f[i], splat(0x1.555492p-3f)); });
  in_step(p, [&](int i) { return multiply_add(p[i], f[i], splat(0x1.fffffcp-2f)); });
  in_step(p, [&](int i) { return multiply_add(p[i], f[i], splat(1.0f)); });
  in_step(p, [&](int i) { return multiply_add(p[i], f[i], splat(1.0f)); });
  in_step(e, [&](int i) { return p[i] * (Vec)((IntVec)shifted[i] << 23); });
}

inline Vec exp_nonpositive(Vec x) {
  const Vec in[1] = {x};
  Vec out[1];
  exp_nonpositive(in, out);
  return out[0];
}

// sum_j e^z = sum e^maximum
inline double log_sum(double maximum, float sum) { return maximum + __builtin_log(double(sum)); }

// x = high + low in two floats; low is 0 where x is infinite or NaN.
inline void store_log_sum(double x, float* high, float* low) {
  *high = float(x);
  const double rest = x - double(*high);
  *low = rest == rest ? float(rest) : 0;
}

}  // namespace
