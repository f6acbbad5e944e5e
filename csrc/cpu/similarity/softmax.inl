// A softmax over a bank, from scores in blocks: running, while rows are queries and their keys pass by, and with a known lse,
// while rows are keys and queries pass by.
//
// Everything is in base 2: a logit is log2e scale score, plus log2e bias. Included by the passes, after the target pragma.
#pragma once

#include "engine/in_place.inl"
#include "similarity/similarity.h"

namespace {

using kdfast::SimilarityParams;

// with_sound_product and scratch_words of all products that a bank can pass by.
template <class F>
inline void with_similarity_product(Precision precision, const F& f) {
  if (precision == Precision::kFloat32Rows) return void(f(RowProduct{}));
  with_sound_product(precision, f);
}
template <class F>
inline int64_t similarity_words(Precision precision, const F& f) {
  return precision == Precision::kFloat32Rows ? f(RowProduct{}) : scratch_words(precision, f);
}

// ---- rows are queries -------------------------------------------------------------------------------------------------

inline bool has_terms(const SimilarityParams& p) {
  return p.bias != nullptr || p.key_labels != nullptr || p.key_index != nullptr || p.limit != nullptr;
}

// What the columns of a block bring to the logits of every row.
struct ColumnTerms {
  BlockLabels labels;
  float* bias;  // in base 2, -inf at columns that do not exist

  void plan(int64_t block, Arena& arena) {
    labels.plan(block, arena);
    bias = arena.take(block);
  }

  // Whether scores need anything done to them beside the factor.
  static bool mask(const SimilarityParams& p, const Block& block) { return has_terms(p) || block.columns != block.padded; }

  void pack(const SimilarityParams& p, int64_t batch, const Block& block) const {
    if (!mask(p, block)) return;
    for (int64_t j = 0; j < block.padded; ++j) bias[j] = j < block.columns ? 0.0f : -kInfinity;
    if (p.bias != nullptr)
      for (int64_t j = 0; j < block.columns; ++j) bias[j] = kLog2e * p.bias[batch * p.bias_batch_stride + block.first + j];
    if (p.key_labels != nullptr) labels.pack(p.key_labels + batch * p.key_labels_batch_stride + block.first, block);
  }

  // Excludes columns from the scores q.k (the sign of its scale already in q) of row `at`, whose logits are `multiplier` score. Returns the
  // multiplier from then on: 1 where bias, labels, indices or a limit have made them logits. Columns that do not exist need no such
  // rounding, lest their block differs from the gradient's; but -inf times a scale of 0 is not -inf.
  float exclude(const SimilarityParams& p, int64_t at, const Block& block, float* scores, float multiplier) const {
    if (has_terms(p) || (block.columns != block.padded && multiplier == 0)) {
      mask_row(p, at, block, scores);
      return 1;
    }
    for (int64_t j = block.columns; j < block.padded; ++j) scores[j] = -kInfinity;
    return multiplier;
  }

  // Replace scores by logits, -inf at the excluded columns.
  void mask_row(const SimilarityParams& p, int64_t at, const Block& block, float* scores) const {
    const bool limited = p.limit != nullptr;
    const SameTerm magnitude{splat(__builtin_fabsf(p.scale[at]))}, limit{splat(limited ? p.limit[at] : kInfinity)};
    const int64_t* const label = p.query_labels != nullptr ? p.query_labels + at : nullptr;
    mask_scores(labels, scores, block.padded, magnitude, limited, limit, ColumnTerm{bias}, label);
    for (int64_t e = 0; e < p.key_indices; ++e) {
      const int64_t index = p.key_index[at * p.key_indices + e] - block.first;
      if (index >= 0 && index < block.padded) scores[index] = -kInfinity;
    }
  }
};

constexpr double kLog2eExact = 0x1.71547652b82fep0;

// The state of every row: maximum m of its logits, sum l of 2^(logit - m), by lanes, and of the last block the correction 2^(m - m').
struct RunningSoftmax {
  float *maximum, *multiplier, *correction;
  float* sum;  // [rows][kLanes]

  void plan(int64_t rows, Arena& arena) {
    maximum = arena.take(rows), multiplier = arena.take(rows), correction = arena.take(rows);
    sum = arena.take(rows * kLanes);
  }

  void begin(int64_t i, float scale) const {
    maximum[i] = -kInfinity;
    multiplier[i] = kLog2e * __builtin_fabsf(scale);
    __builtin_memset(sum + i * kLanes, 0, 4 * kLanes);
  }

  // A first candidate with this logit, in base e; returns its weight, 2 to the power of what the maximum rounds off.
  float start(int64_t i, float logit) const {
    if (logit == -kInfinity) return 0;
    const double exact = kLog2eExact * double(logit);
    maximum[i] = float(exact);
    const float weight = __builtin_fabsf(maximum[i]) < kInfinity ? float(__builtin_exp2(exact - double(maximum[i]))) : 1;
    sum[i * kLanes] = weight;
    return weight;
  }
};

inline float largest_score(const float* scores, int64_t padded) {
  Vec best0 = splat(-kInfinity), best1 = best0;
  for (int64_t j = 0; j < padded; j += 2 * kLanes) {
    best0 = larger(load(scores + j), best0);
    best1 = larger(load(scores + j + kLanes), best1);
  }
  return largest(larger(best0, best1));
}

// Weights 2^(logit - shift) of logits factor * score; returns their sums by lane. `weights` null: only these.
template <class Product>
inline Vec weigh_row(const float* scores, float* weights, int64_t padded, float factor, float shift) {
  const Vec f = splat(factor), s = splat(-shift);
  Vec sum0 = {}, sum1 = {};
  for (int64_t j = 0; j < padded; j += 2 * kLanes) {
    const Vec p0 = exp2_nonpositive(multiply_add(load(scores + j), f, s));
    const Vec p1 = exp2_nonpositive(multiply_add(load(scores + j + kLanes), f, s));
    sum0 += p0;
    sum1 += p1;
    if (weights != nullptr) Packing<Product>::store_weights(weights, j, p0, p1);
  }
  return sum0 + sum1;
}

// A block's scores `tile` of `rows` rows from `row` on, the first `count` rows being rows `first` on of the call: with z a row's logits,
// m' = max(m, max z), weights 2^(z - m'), correction 2^(m - m'), l' = correction l + sum of weights. weigh(i, scores, factor, shift) makes the
// weights of row i, once its correction is known, and returns their sums by lane. A row with nothing admitted yet keeps m = -inf and is
// shifted by 0, so that nothing becomes inf - inf.
//
// Maxima are settled kLanes rows together, half as many rows before the first of them is weighed, from scores looked at before that: what
// they wait for, L2 and each other, passes under the exponentials of other rows.
template <class Weigh>
inline void weigh_rows(const RunningSoftmax& s, const ColumnTerms& terms, const Tile& tile, const SimilarityParams& p, int64_t first,
                       int64_t count, const Block& block, int64_t row, int64_t rows, const Prefetch& next, const Weigh& weigh) {
  constexpr int64_t kLag = kLanes / 2, kRing = 2 * kLanes;
  float best[kRing] = {}, factor[kRing] = {}, shift[kRing];
  const auto look = [&](int64_t at) {
    if (at >= rows) return;
    const int64_t i = row + at;
    float* const scores = tile.scores(at);
    factor[at % kRing] = i < count ? terms.exclude(p, first + i, block, scores, s.multiplier[i]) : 0;
    best[at % kRing] = largest_score(scores, block.padded);
    next.fetch(i);
  };
  const auto settle = [&](int64_t at) {
    if (at >= rows) return;
    const int64_t slot = at % kRing;
    float* const maximum = s.maximum + row + at;
    const Vec before = load(maximum), after = larger(load(factor + slot) * load(best + slot), before);
    const Vec finite = after == splat(-kInfinity) ? Vec{} : after;
    store(shift + slot, finite);
    store(maximum, after);
    store(s.correction + row + at, exp2_nonpositive(before - finite));
  };
  for (int64_t at = 0; at < kLanes + kLag; ++at) look(at);
  settle(0);
  for (int64_t at = 0; at < rows; ++at) {
    if (at % kLanes == kLag) settle(at + kLag);
    look(at + kLanes + kLag);
    const int64_t i = row + at;
    const Vec sum = weigh(i, tile.scores(at), factor[at % kRing], shift[at % kRing]);
    float* const l = s.sum + i * kLanes;
    store(l, multiply_add(load(l), splat(s.correction[i]), sum));
  }
}

// sum_j e^z = sum 2^maximum; in double, where a maximum of thousands costs no digit.
inline double log_sum(float maximum, float sum) { return 0x1.62e42fefa39efp-1 * double(maximum) + __builtin_log(double(sum)); }

// x = high + low in two floats; low is 0 where x is infinite or NaN.
inline void store_log_sum(double x, float* high, float* low) {
  *high = float(x);
  const double rest = x - double(*high);
  *low = rest == rest ? float(rest) : 0;
}

// What takes a base-2 logit to its probability, correction 2^(logit - shift): shift = log2e (lse + low), its last digits in the correction.
struct Level {
  float shift, correction;
};
inline Level level_of(float lse, float low) {
  const double exact = 0x1.71547652b82fep0 * (double(lse) + double(low));
  const float shift = float(exact), rest = float(exact - double(shift));
  return {shift == -kInfinity ? kInfinity : shift, rest == rest ? 1 - 0x1.62e43p-1f * rest : 1};
}

// ---- rows are keys ----------------------------------------------------------------------------------------------------

// What each query of a block brings: correction p with p = 2^(multiplier score - shift) and shift = log2e lse, g p (upstream) and g s p (factor),
// both corrected. A query that admits nothing, or does not exist, has shift inf, so that p is 0.
struct KnownSoftmax {
  BlockLabels labels;
  float *scale, *multiplier, *shift, *limit, *correction, *upstream, *factor;

  void plan(int64_t block, Arena& arena) {
    labels.plan(block, arena);
    scale = arena.take(block), multiplier = arena.take(block), shift = arena.take(block);
    limit = arena.take(block), correction = arena.take(block), upstream = arena.take(block), factor = arena.take(block);
  }

  // Upstream gradients g and the log-sum lse + low (null: 0) are the call's.
  void pack(const SimilarityParams& p, const float* g, const float* lse, const float* low, int64_t batch, const Block& block) const {
    for (int64_t i = 0; i < block.padded; ++i) {
      const int64_t at = batch * p.rows + block.first + i;
      const bool exists = i < block.columns;
      const Level level = exists ? level_of(lse[at], low != nullptr ? low[at] : 0) : Level{kInfinity, 1};
      scale[i] = exists ? p.scale[at] : 0;
      multiplier[i] = kLog2e * scale[i];
      shift[i] = level.shift, correction[i] = level.correction;
      upstream[i] = exists ? g[at] * level.correction : 0;
      factor[i] = upstream[i] * scale[i];
      limit[i] = exists && p.limit != nullptr ? p.limit[at] : kInfinity;
    }
    if (p.query_labels != nullptr) labels.pack(p.query_labels + batch * p.rows + block.first, block);
  }

  // Replace the scores of the keys `row` to `end`, counted from `first`, by logits, -inf where excluded. The tile begins at key `row`.
  void mask_rows(const SimilarityParams& p, int64_t batch, int64_t first, const Block& block, int64_t row, int64_t end, const Tile& tile) const {
    for (int64_t i = row; i < end; ++i) {
      const float bias = p.bias != nullptr ? kLog2e * p.bias[batch * p.bias_batch_stride + first + i] : 0;
      const int64_t* const label = p.key_labels != nullptr ? p.key_labels + batch * p.key_labels_batch_stride + first + i : nullptr;
      mask_scores(labels, tile.scores(i - row), block.padded, ColumnTerm{scale}, p.limit != nullptr, ColumnTerm{limit},
                  SameTerm{splat(bias)}, label);
    }
    if (p.key_indices == 0) return;
    const int64_t* index = p.key_index + (batch * p.rows + block.first) * p.key_indices;
    for (int64_t column = 0; column < block.columns; ++column) {
      for (int64_t e = 0; e < p.key_indices; ++e, ++index) {
        const int64_t i = *index - first;
        if (i >= row && i < end) tile.scores(i - row)[column] = -kInfinity;
      }
    }
  }

  // p at columns j to j + kLanes of a row of scores, or with `kLogits` of logits.
  template <bool kLogits>
  inline Vec probability(const float* scores, int64_t j) const {
    const Vec level = load(shift + j), x = load(scores + j);
    return exp2_nonpositive(kLogits ? x - level : multiply_add(x, load(multiplier + j), -level));
  }
};

}  // namespace
