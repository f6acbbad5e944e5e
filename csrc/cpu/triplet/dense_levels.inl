// From a row of scores to distances, and which of them lie in the window of a positive.
//
// A hinge sign (d_ap - d_an) + margin is t - v with the level v = sign d_an; it is positive on an interval lo <= v < hi of levels, whatever
// the mining. A column that is no negative of the row has level +inf, above every window. A NaN lies in all windows, so that it reaches the loss.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/stream.inl"
#include "triplet/dense.h"
#include "triplet/metric.inl"

namespace {

using kdfast::DenseParams;
using kdfast::HingeRule;
using kdfast::kTileColumns;
using kdfast::Mining;
using kdfast::of_product;
using kdfast::tile_columns;

typedef double WideVec __attribute__((vector_size(8 * KDFAST_LANES)));  // kLanes doubles

constexpr int64_t kSlotRows = DenseParams::kSlotRows;
constexpr float kLargestFinite = 0x1.fffffep127f;

// ---- lanes that satisfy something --------------------------------------------------------------------------------------

#if KDFAST_LANES == 16
using Mask = __mmask16;
inline Mask below(Vec v, Vec high) { return _mm512_cmp_ps_mask((__m512)v, (__m512)high, _CMP_NGE_UQ); }
inline Mask between(Vec v, Vec low, Vec high) { return _mm512_mask_cmp_ps_mask(below(v, high), (__m512)v, (__m512)low, _CMP_NLT_UQ); }
inline Vec add_where(Mask mask, Vec sum, Vec x) { return (Vec)_mm512_mask_add_ps((__m512)sum, mask, (__m512)sum, (__m512)x); }
inline Vec choose(Mask mask, Vec x, Vec other) { return (Vec)_mm512_mask_mov_ps((__m512)other, mask, (__m512)x); }
inline int lanes_in(Mask mask) { return __builtin_popcount(mask); }
#else
using Mask = IntVec;
inline Mask below(Vec v, Vec high) { return ~(v >= high); }
inline Mask between(Vec v, Vec low, Vec high) { return below(v, high) & ~(v < low); }
inline Vec add_where(Mask mask, Vec sum, Vec x) { return sum + (Vec)(mask & (IntVec)x); }
inline Vec choose(Mask mask, Vec x, Vec other) { return mask ? x : other; }
inline int lanes_in(Mask mask) {
  int lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes -= mask[i];
  return lanes;
}
#endif

// ---- distances ------------------------------------------------------------------------------------------------------------

// sqrt(square), correctly rounded, so that distances from equal squares are equal, and about its inverse; both 0 where the square is 0.
inline Vec root(Vec square, Vec* inverse) {
#if KDFAST_LANES == 16
  const __mmask16 positive = _mm512_cmp_ps_mask((__m512)square, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  const Vec y = (Vec)_mm512_maskz_rsqrt14_ps(positive, (__m512)square), rough = square * y, half = y * splat(0.5f);
  const Vec error = multiply_add(-rough, half, splat(0.5f));
  const Vec d = multiply_add(rough, error, rough);
  *inverse = multiply_add(y, error, y);
  return multiply_add(multiply_add(-d, d, square), *inverse * splat(0.5f), d);
#else
#if KDFAST_LANES == 8
  const Vec d = (Vec)_mm256_sqrt_ps((__m256)square);
#else
  Vec d;
  for (int i = 0; i < kLanes; ++i) d[i] = __builtin_sqrtf(square[i]);
#endif
  *inverse = square == Vec{} ? Vec{} : splat(1.0f) / d;
  return d;
#endif
}

// Distance in the metric from an inner product, and the factor that makes a weight of a gradient in it: dx = weight (x - y), or -weight y.
template <Metric kMetric>
inline Vec distance_from(Vec score, Vec x_square, Vec y_square, Vec* factor) {
  if constexpr (of_product(kMetric)) {
    *factor = splat(1.0f);
    return splat(kMetric == Metric::kCosine ? 1.0f : 0.0f) - score;
  } else {
    const Vec square = lesser(splat(kLargestFinite), squared_distance(score, x_square, y_square));
    *factor = splat(2.0f);
    return kMetric == Metric::kEuclidean ? root(square, factor) : square;
  }
}

// That factor of distances that are known.
inline Vec weight_factors(Metric metric, Vec d) {
  if (metric == Metric::kEuclidean) return d == Vec{} ? Vec{} : splat(1.0f) / d;
  return splat(metric == Metric::kSquaredEuclidean ? 2.0f : 1.0f);
}

// f(a metric as a type) for the metric in force.
template <Metric kMetric>
struct MetricTag {
  static constexpr Metric kValue = kMetric;
};
template <class F>
inline void with_metric(Metric metric, const F& f) {
  switch (metric) {
    case Metric::kEuclidean:
      return f(MetricTag<Metric::kEuclidean>{});
    case Metric::kSquaredEuclidean:
      return f(MetricTag<Metric::kSquaredEuclidean>{});
    case Metric::kCosine:
      return f(MetricTag<Metric::kCosine>{});
    case Metric::kProduct:
      return f(MetricTag<Metric::kProduct>{});
  }
}

// The columns of a block that are no negatives of a row: those of its class, its own, those that do not exist.
struct LeftOut {
  int32_t first, last, own, end;

  LeftOut(const DenseParams& p, const Block& block, int64_t row)
      : first(relative(p.first[row] - block.first, block)), last(relative(p.last[row] - block.first, block)),
        own(relative(p.own[row] - block.first, block)), end(int32_t(block.columns)) {}

  // Clamped to just outside the block.
  static int32_t relative(int64_t column, const Block& block) {
    return int32_t(column < -1 ? -1 : column > block.padded ? block.padded : column);
  }
  bool any(const Block& block) const {
    return (last > 0 && first < block.padded && first < last) || (own >= 0 && own < block.padded) || block.columns < block.padded;
  }
  IntVec at(int64_t j) const {
    IntVec column;
    for (int i = 0; i < kLanes; ++i) column[i] = int32_t(j) + i;
    return ((column >= first) & (column < last)) | (column == own) | (column >= end);
  }
};

// Replaces a row's scores by sign d, +inf where the column is left out. factors [block]: as in distance_from; null: not wanted.
// `nearest` becomes the least distance of each lane.
template <Metric kMetric, bool kLeavesOut, bool kFactors, bool kNearest>
inline void levels(const DenseParams& p, const Block& block, int64_t row, float sign, float* scores, float* factors, Vec* nearest) {
  const LeftOut left_out(p, block, row);
  const float* const y_square = p.y_square + block.first;
  const Vec x_square = splat(p.x_square[row]), signs = splat(sign), out = splat(kInfinity);
  for (int64_t j = 0; j < block.padded; j += kLanes) {
    Vec factor;
    const Vec d = distance_from<kMetric>(load(scores + j), x_square, load(y_square + j), &factor);
    Vec level = d * signs;
    if constexpr (kNearest) *nearest = lesser(kLeavesOut ? (left_out.at(j) ? out : d) : d, *nearest);
    if constexpr (kLeavesOut) level = left_out.at(j) ? out : level;
    if constexpr (kFactors) store(factors + j, factor);
    store(scores + j, level);
  }
}

template <bool kFactors, bool kNearest>
inline void row_levels(const DenseParams& p, const Block& block, int64_t row, float sign, float* scores, float* factors, Vec* nearest) {
  const bool leaves_out = LeftOut(p, block, row).any(block);
  with_metric(p.metric, [&](auto metric) {
    constexpr Metric kMetric = decltype(metric)::kValue;
    if (leaves_out) {
      levels<kMetric, true, kFactors, kNearest>(p, block, row, sign, scores, factors, nearest);
    } else {
      levels<kMetric, false, kFactors, kNearest>(p, block, row, sign, scores, factors, nearest);
    }
  });
}

// ---- windows ----------------------------------------------------------------------------------------------------------------

// The next float above x.
inline Vec above(Vec x) {
  const IntVec bits = (IntVec)(x + Vec{});
  return (Vec)(x < Vec{} ? bits - 1 : bits + 1);
}

// The one below x.
inline float below(float x) { return -above(splat(-x))[0]; }

struct Windows {
  Vec t, low, high;
};

// Of positives at distance d, in the rows whose farthest positive is `farthest`.
inline Windows windows(const HingeRule& rule, Vec d, Vec farthest) {
  const bool cluster = rule.sign > 0;
  const Vec margin = splat(float(rule.margin)), t = cluster ? d + margin : margin - d, low = splat(-kInfinity);
  switch (rule.mining) {
    case Mining::kBatchAll:
      break;
    case Mining::kSemiHard:  // d_ap < d_an <= d_ap + margin
      if (cluster) return {t, above(d), t};
      return {t, -(d + margin), -d};
    case Mining::kMultiSimilarity: {  // d_an - epsilon < farthest
      const Vec limit = farthest + splat(rule.epsilon);
      if (cluster) return {t, low, t < limit ? t : limit};
      return {t, above(-limit), t};
    }
  }
  return {t, low, t};
}

// Levels that are mined with a positive at distance d: low <= v < high.
inline Windows mined_windows(const HingeRule& rule, Vec d, Vec farthest) {
  HingeRule whole = rule;
  if (rule.mining == Mining::kMultiSimilarity) whole.margin = double(kInfinity);
  Windows w = windows(whole, d, farthest);
  if (rule.mining == Mining::kBatchAll) w.high = splat(kInfinity);
  if (rule.mining == Mining::kSemiHard && rule.sign > 0) w.high = above(w.high);  // d_an = d_ap + margin is mined
  return w;
}

inline bool has_low_end(const HingeRule& rule) {
  return rule.mining == Mining::kSemiHard || (rule.mining == Mining::kMultiSimilarity && rule.sign < 0);
}

// The windows of each row: of its positives, by their slots, or the one that is given, by rows.
struct WindowTable {
  const DenseParams& p;
  const HingeRule& rule;

  bool given() const { return rule.threshold != nullptr; }
  int64_t count(int64_t row) const { return given() ? 1 : p.count(row); }
  int64_t slot(int64_t row, int64_t k) const { return given() ? row : p.slot(row, k); }
  const float* distance() const { return given() ? rule.threshold : p.distance; }
  // Of kLanes rows.
  Windows at(int64_t row, int64_t k) const { return windows(rule, load(distance() + slot(row, k)), load(p.farthest + row)); }
};

// Multi-similarity mining takes the positives that are not nearer than every negative.
inline bool takes(const HingeRule& rule, float d, float nearest) {
  return rule.mining != Mining::kMultiSimilarity || !(d + rule.epsilon <= nearest);
}

}  // namespace
