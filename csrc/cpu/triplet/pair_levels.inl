// The triplets of a pair (a, p) with a block of columns: sums of their hinges, and the slopes of these.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/softplus.inl"
#include "triplet/dense_levels.inl"
#include "triplet/every_triplet.h"

namespace {

using kdfast::EveryTriplet;
using kdfast::kMostLayers;

// A pair (a, p): where its levels are in the space that mines, its distances and slopes in each layer.
struct PairLevels {
  const float* levels;
  Windows window;
  int64_t padded;
  float g;
  const float *anchor[kMostLayers], *positive[kMostLayers];    // distances
  float *anchor_slopes[kMostLayers];    // to which slopes are added
  float *positive_slopes[kMostLayers];  // and these times g
  float own[kMostLayers];    // d_ap
  double pull[kMostLayers];  // found: sums of the slopes
  double sum, mined, active;
};

// Whether one of a row's distances is NaN, in the space that mines.
inline bool any_lost(float farthest, const float* levels, int64_t padded) {
  Vec rest = {};
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec v = load(levels + j);
    rest += v == v ? Vec{} : v;
  }
  return farthest != farthest || total(rest) != 0;
}

template <bool kSoft, bool kWeights, bool kOne, bool kSwap>
void take_levels(const EveryTriplet& e, PairLevels* pair) {
  const int64_t layers = kOne ? 1 : e.layer_count;
  const Vec one = splat(1.0f), zero = {}, sign = splat(e.rule.sign), margin = splat(float(e.rule.margin)), g = splat(pair->g);
  const Windows window = pair->window;
  Vec sum = {}, mined = {}, active = {}, pull[kOne ? 1 : kMostLayers];
  for (int64_t l = 0; l < layers; ++l) pull[l] = zero;
  for (int64_t j = 0; j < pair->padded; j += kLanes) {
    const Mask inside = between(load(pair->levels + j), window.low, window.high);
    Mask found = {};
    for (int64_t l = 0; l < layers; ++l) {
      Vec d = load(pair->anchor[l] + j);
      Mask swapped = {};
      if constexpr (kSwap) {
        const Vec other = load(pair->positive[l] + j);
        swapped = below(other, d), d = choose(swapped, other, d);
      }
      const Vec hinge = multiply_add(sign, splat(pair->own[l]) - d, margin);
      Vec value = hinge, slope = one;
      if constexpr (kSoft) value = softplus_quick(hinge, &slope);
      const Mask counts = kSoft ? inside : Mask(inside & below(zero, hinge));
      sum = add_where(counts, sum, value);
      found |= counts;
      if constexpr (kWeights) {
        if constexpr (!(kOne && !kSoft)) pull[l] = add_where(counts, pull[l], slope);  // else as many as are active
        float* const to = pair->anchor_slopes[l] + j;
        store(to, add_where(kSwap ? Mask(counts & ~swapped) : counts, load(to), slope));
        if constexpr (kSwap) {
          float* const to_other = pair->positive_slopes[l] + j;
          store(to_other, add_where(counts & swapped, load(to_other), slope * g));
        }
      }
    }
    mined = add_where(inside, mined, one), active = add_where(found, active, one);
  }
  pair->sum = wide_total(sum), pair->mined = wide_total(mined), pair->active = wide_total(active);
  if constexpr (kWeights)
    for (int64_t l = 0; l < layers; ++l) pair->pull[l] = kOne && !kSoft ? pair->active : wide_total(pull[l]);
}

template <bool kSoft, bool kWeights>
void take_pair_as(const EveryTriplet& e, PairLevels* pair) {
  if (e.layer_count == 1) {
    e.swap ? take_levels<kSoft, kWeights, true, true>(e, pair) : take_levels<kSoft, kWeights, true, false>(e, pair);
  } else {
    e.swap ? take_levels<kSoft, kWeights, false, true>(e, pair) : take_levels<kSoft, kWeights, false, false>(e, pair);
  }
}

// `weighs`: slopes are wanted too.
inline void take_pair(const EveryTriplet& e, bool weighs, PairLevels* pair) {
  if (e.rule.soft) {
    weighs ? take_pair_as<true, true>(e, pair) : take_pair_as<true, false>(e, pair);
  } else {
    weighs ? take_pair_as<false, true>(e, pair) : take_pair_as<false, false>(e, pair);
  }
}

}  // namespace
