// softplus and its derivative on vectors.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/stream.inl"

namespace {

// log(1 + e) for 0 <= e <= 1, relative error below 2e-7: 2 artanh(s), s = e / (2 + e) <= 1/3, by a polynomial in s^2.
inline Vec log1p_unit(Vec e) {
  const Vec s = e / (e + splat(2.0f)), x = s * s;
  Vec p = multiply_add(x, splat(0x1.1f00c6p-3f), splat(0x1.1eb388p-3f));
  p = multiply_add(p, x, splat(0x1.99d2bap-3f));
  p = multiply_add(p, x, splat(0x1.555500p-2f));
  return multiply_add(p, x, splat(1.0f)) * (s + s);
}


// softplus(u) = log(1 + exp(u)) and its derivative: both from exp(-|u|), which cannot overflow.
inline Vec softplus(Vec u, Vec* derivative) {
  const Vec e = exp2_nonpositive(splat(-kLog2e) * (u < Vec{} ? -u : u)), one = splat(1.0f);
  *derivative = (u < Vec{} ? e : one) / (one + e);
  return larger(Vec{}, u) + log1p_unit(e);
}

}  // namespace
