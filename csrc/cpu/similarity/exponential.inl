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

// e^x for x <= about 0, relative error below 6.5e-8 from -1 on and 3e-7 at most; exactly 0 for x <= -88.1 (so for -inf), exactly 1 at 0, NaN for NaN.
//
// As exp2_nonpositive: x = n ln 2 + f with n = round(x log2e), whose bits make 2^n, and a minimax polynomial for e^f. The float ln 2 is 2e-9 off.
inline Vec exp_nonpositive(Vec x) {
  const float magic = 12582912.0f + 127.0f;
  x = larger(splat(-88.1f), x);
  const Vec shifted = multiply_add(x, splat(kLog2e), splat(magic));
  const Vec f = multiply_add(shifted - splat(magic), splat(-float(kLn2)), x);
  Vec p = multiply_add(f, splat(0x1.6a23cep-10f), splat(0x1.123a20p-7f));
  p = multiply_add(p, f, splat(0x1.5558f2p-5f));
  p = multiply_add(p, f, splat(0x1.555492p-3f));
  p = multiply_add(p, f, splat(0x1.fffffcp-2f));
  p = multiply_add(p, f, splat(1.0f));
  p = multiply_add(p, f, splat(1.0f));
  return p * (Vec)((IntVec)shifted << 23);
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
