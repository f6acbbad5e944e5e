// softplus and its derivative on vectors.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/stream.inl"

namespace {

// 2 artanh(s), relative error below 2e-7 for |s| <= 1/3: a polynomial in s^2.
inline Vec twice_artanh(Vec s) {
  const Vec x = s * s;
  Vec p = multiply_add(x, splat(0x1.1f00c6p-3f), splat(0x1.1eb388p-3f));
  p = multiply_add(p, x, splat(0x1.99d2bap-3f));
  p = multiply_add(p, x, splat(0x1.555500p-2f));
  return multiply_add(p, x, splat(1.0f)) * (s + s);
}

// log(1 + e) for 0 <= e <= 1.
inline Vec log1p_unit(Vec e) { return twice_artanh(e / (e + splat(2.0f))); }

// 1 / x of finite x > 0 whose inverse is a normal number, relative error below 2e-7.
inline Vec reciprocal(Vec x) {
#if KDFAST_LANES == 16
  const Vec y = (Vec)_mm512_rcp14_ps((__m512)x);
  return multiply_add(y, multiply_add(-x, y, splat(1.0f)), y);
#else
  return splat(1.0f) / x;
#endif
}

// log(1 + x) for 0 <= x < 2^126: of 1 + x = 2^n m, 1/sqrt 2 <= m < sqrt 2, and what the sum was rounded by.
inline Vec log1p_nonnegative(Vec x) {
  const Vec one = splat(1.0f), u = x + one, lost = x > one ? one - (u - x) : x - (u - one);
  const IntVec exponent = ((IntVec)u - 0x3f3504f3) >> 23;
  const Vec m = (Vec)((IntVec)u - (exponent << 23)), scale = (Vec)((127 - exponent) << 23);
  const Vec e = multiply_add(lost, scale, m - one);
  return multiply_add(__builtin_convertvector(exponent, Vec), splat(float(kLn2)), twice_artanh(e * reciprocal(e + splat(2.0f))));
}

// softplus(u) = log(1 + exp(u)) and its derivative: both from exp(-|u|), which cannot overflow.
inline Vec softplus(Vec u, Vec* derivative) {
  const Vec e = exp2_nonpositive(splat(-kLog2e) * (u < Vec{} ? -u : u)), one = splat(1.0f);
  *derivative = (u < Vec{} ? e : one) / (one + e);
  return larger(Vec{}, u) + log1p_unit(e);
}

// The same without divisions, an error of 1e-7 more of each: where it is most of the work.
inline Vec softplus_quick(Vec u, Vec* derivative) {
  const Vec e = exp2_nonpositive(splat(-kLog2e) * (u < Vec{} ? -u : u)), one = splat(1.0f);
  *derivative = (u < Vec{} ? e : one) * reciprocal(one + e);
  return larger(Vec{}, u) + twice_artanh(e * reciprocal(e + splat(2.0f)));
}

}  // namespace
