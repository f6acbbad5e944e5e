// Means and a covariance of numbers under weights, by blocks. What is made of differences from a mean vanishes where one candidate holds
// nearly all of its row, and only if the mean is, to more digits than a float has, one of the very numbers it is taken off.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/simd.h"
#include "similarity/pooled_second.h"

namespace {

using kdfast::RowMoments;

// Those of both together go to `all`.
inline void merge(RowMoments& all, const RowMoments& more) {
  const double mass = all.mass + more.mass, share = more.mass / mass, rest = all.mass / mass;
  const double rate = more.rate - all.rate, slope = more.slope - all.slope;
  all.covariance = rest * all.covariance + share * more.covariance + share * rest * rate * slope;
  all.rate = rest * all.rate + share * more.rate;
  all.slope = rest * all.slope + share * more.slope;
  all.eta = rest * all.eta + share * more.eta;
  all.mass = mass;
}

// Of `padded` weights p and their numbers; etas null: 0. First about means in floats, then by what the numbers less these miss 0 by.
inline RowMoments moments_of(const float* p, const float* rates, const float* slopes, const float* etas, int64_t padded) {
  Vec mass = {}, rate = {}, slope = {}, eta = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec weight = load(p + j);
    mass += weight;
    rate = multiply_add(weight, load(rates + j), rate);
    slope = multiply_add(weight, load(slopes + j), slope);
    if (etas != nullptr) eta = multiply_add(weight, load(etas + j), eta);
  }
  const float all = total(mass), inverse = 1 / all;
  const float rate0 = total(rate) * inverse, slope0 = total(slope) * inverse, eta0 = etas != nullptr ? total(eta) * inverse : 0;
  Vec rest = {}, other = {}, third = {}, both = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec weight = load(p + j), r = load(rates + j) - splat(rate0), w = load(slopes + j) - splat(slope0), moved = weight * r;
    rest += moved;
    other = multiply_add(weight, w, other);
    both = multiply_add(moved, w, both);
    if (etas != nullptr) third = multiply_add(weight, load(etas + j) - splat(eta0), third);
  }
  const double whole = 1 / double(all), of_rates = double(total(rest)) * whole, of_slopes = double(total(other)) * whole;
  const double of_etas = etas != nullptr ? double(total(third)) * whole : 0;
  return {all, rate0 + of_rates, slope0 + of_slopes, eta0 + of_etas, double(total(both)) * whole - of_rates * of_slopes};
}

}  // namespace
