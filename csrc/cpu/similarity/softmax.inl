// A softmax over a bank, from scores in blocks: running, while rows are queries and their keys pass by, and with a known lse,
// while rows are keys and queries pass by.
//
// Included by the passes, after the target pragma.
#pragma once

#include "engine/in_place.inl"
#include "similarity/exponential.inl"
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
  float* bias;  // -inf at columns that do not exist

  void plan(int64_t block, Arena& arena) {
    labels.plan(block, arena);
    bias = arena.take(block);
  }

  // Whether scores need anything done to them beside the factor.
  static bool mask(const SimilarityParams& p, const Block& block) { return has_terms(p) || block.columns != block.padded; }

  void pack(const SimilarityParams& p, int64_t batch, const Block& block) const {
    if (!mask(p, block)) return;
    for (int64_t j = 0; j < block.padded; ++j) bias[j] = j < block.columns ? 0.0f : -kInfinity;
    if (p.bias != nullptr) __builtin_memcpy(bias, p.bias + batch * p.bias_batch_stride + block.first, size_t(4 * block.columns));
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

// sum' = factor sum + more for a sum of very many blocks in two floats, by lanes: `rest` is what its additions have rounded off (Kahan). One
// float would lose of every later block what is less than half a unit of a candidate that dominates: of 10^7 keys 1e-4 of a log-sum-exp.
inline void grow(float* sum, float* rest, Vec factor, Vec more) {
  const Vec before = factor * load(sum), added = multiply_add(factor, load(rest), more), after = before + added;
  store(sum, after);
  store(rest, after - after == Vec{} ? added - (after - before) : Vec{});
}

// The state of every row: maximum m of its logits, in two floats, sum l of e^(logit - m), in two floats by lanes, and of the last block the
// correction e^(m - m') and its exponent.
struct RunningSoftmax {
  float *maximum, *low, *multiplier, *step, *correction;
  float *sum, *rest;  // [rows][kLanes]

  void plan(int64_t rows, Arena& arena) {
    maximum = arena.take(rows), low = arena.take(rows), multiplier = arena.take(rows), step = arena.take(rows), correction = arena.take(rows);
    sum = arena.take(rows * kLanes), rest = arena.take(rows * kLanes);
  }

  void begin(int64_t i, float scale) const {
    maximum[i] = -kInfinity, low[i] = 0;
    multiplier[i] = __builtin_fabsf(scale);
    __builtin_memset(sum + i * kLanes, 0, 4 * kLanes);
    __builtin_memset(rest + i * kLanes, 0, 4 * kLanes);
  }

  // A first candidate with this logit; returns its weight.
  float start(int64_t i, float logit) const {
    if (logit == -kInfinity) return 0;
    maximum[i] = logit;
    sum[i * kLanes] = 1;
    return 1;
  }

  double top(int64_t i) const { return double(maximum[i]) + double(low[i]); }
};

inline float largest_score(const float* scores, int64_t padded) {
  Vec best0 = splat(-kInfinity), best1 = best0;
  for (int64_t j = 0; j < padded; j += 2 * kLanes) {
    best0 = larger(load(scores + j), best0);
    best1 = larger(load(scores + j + kLanes), best1);
  }
  return largest(larger(best0, best1));
}

// What one row's logits are made with, and taken relative to.
struct RowLevel {
  float factor, high, low;

  // Of the kPanel scores from `scores` on.
  void exponents_of(const float* scores, Vec (&x)[kVecs]) const {
    in_step(x, [&](int v) { return exponent(load(scores + v * kLanes), splat(factor), splat(high), splat(low)); });
  }
};

// Weights e^(logit - level); returns their sums by lane. `weights` null: only these.
template <class Product>
inline Vec weigh_row(const float* scores, float* weights, int64_t padded, RowLevel level) {
  Vec sum0 = {}, sum1 = {};
  for (int64_t j = 0; j < padded; j += kPanel) {
    Vec p[kVecs];
    level.exponents_of(scores + j, p);
    exp_nonpositive(p, p);
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; v += 2) {
      sum0 += p[v];
      sum1 += p[v + 1];
      if (weights != nullptr) Packing<Product>::store_weights(weights, j + v * kLanes, p[v], p[v + 1]);
    }
  }
  return sum0 + sum1;
}

// A block's scores `tile` of `rows` rows from `row` on, the first `count` rows being rows `first` on of the call: with z a row's logits,
// m' = max(m, max z), weights e^(z - m'), correction e^(m - m'), l' = correction l + sum of weights. weigh(i, scores, level) makes the
// weights of row i, once its correction is known, and returns their sums by lane. A row with nothing admitted yet keeps m = -inf and has
// level 0, so that nothing becomes inf - inf.
//
// Maxima are settled kLanes rows together, half as many rows before the first of them is weighed, from scores looked at before that: what
// they wait for, L2 and each other, passes under the exponentials of other rows.
template <class Weigh>
inline void weigh_rows(const RunningSoftmax& s, const ColumnTerms& terms, const Tile& tile, const SimilarityParams& p, int64_t first,
                       int64_t count, const Block& block, int64_t row, int64_t rows, const Prefetch& next, const Weigh& weigh) {
  constexpr int64_t kLag = kLanes / 2, kRing = 2 * kLanes;
  float best[kRing] = {}, factor[kRing] = {}, high[kRing], low[kRing];
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
    const Logits before{load(s.maximum + row + at), load(s.low + row + at)};
    const Logits after = larger(logits(load(best + slot), load(factor + slot)), before);
    const Vec finite = finite_shift(after.high), step = gap(before, {finite, after.low});
    store(high + slot, finite);
    store(low + slot, after.low);
    store(s.maximum + row + at, after.high);
    store(s.low + row + at, after.low);
    store(s.step + row + at, step);
    store(s.correction + row + at, exp_nonpositive(step));
  };
  for (int64_t at = 0; at < kLanes + kLag; ++at) look(at);
  settle(0);
  for (int64_t at = 0; at < rows; ++at) {
    if (at % kLanes == kLag) settle(at + kLag);
    look(at + kLanes + kLag);
    const int64_t i = row + at;
    const Vec sum = weigh(i, tile.scores(at), RowLevel{factor[at % kRing], high[at % kRing], low[at % kRing]});
    grow(s.sum + i * kLanes, s.rest + i * kLanes, splat(s.correction[i]), sum);
  }
}

// The high part of a level that is lse. A row that admits nothing has lse -inf and p = 0.
inline float above_nothing(float lse) { return lse == -kInfinity ? kInfinity : lse; }

// ---- rows are keys ----------------------------------------------------------------------------------------------------

// What each query of a block brings: p = e^(scale score - high - low), g (upstream) and g s (factor). A query that does not exist has p = 0.
struct KnownSoftmax {
  BlockLabels labels;
  float *scale, *high, *low, *limit, *upstream, *factor;

  void plan(int64_t block, Arena& arena) {
    labels.plan(block, arena);
    scale = arena.take(block), high = arena.take(block), low = arena.take(block);
    limit = arena.take(block), upstream = arena.take(block), factor = arena.take(block);
  }

  // Upstream gradients g and the log-sum lse + lse_low (null: 0) are the call's.
  void pack(const SimilarityParams& p, const float* g, const float* lse, const float* lse_low, int64_t batch, const Block& block) const {
    for (int64_t i = 0; i < block.padded; ++i) {
      const int64_t at = batch * p.rows + block.first + i;
      const bool exists = i < block.columns;
      scale[i] = exists ? p.scale[at] : 0;
      high[i] = exists ? above_nothing(lse[at]) : kInfinity;
      low[i] = exists && lse_low != nullptr ? lse_low[at] : 0;
      upstream[i] = exists ? g[at] : 0;
      factor[i] = upstream[i] * scale[i];
      limit[i] = exists && p.limit != nullptr ? p.limit[at] : kInfinity;
    }
    if (p.query_labels != nullptr) labels.pack(p.query_labels + batch * p.rows + block.first, block);
  }

  // Replace the scores of the keys `row` to `end`, counted from `first`, by logits, -inf where excluded. The tile begins at key `row`.
  void mask_rows(const SimilarityParams& p, int64_t batch, int64_t first, const Block& block, int64_t row, int64_t end, const Tile& tile) const {
    for (int64_t i = row; i < end; ++i) {
      const float bias = p.bias != nullptr ? p.bias[batch * p.bias_batch_stride + first + i] : 0;
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

  // p at columns j to j + kPanel of a row of scores, or with `kLogits` of logits.
  template <bool kLogits>
  inline void probabilities(const float* scores, int64_t j, Vec (&p)[kVecs]) const {
    in_step(p, [&](int v) {
      const int64_t at = j + v * kLanes;
      return exponent(load(scores + at), kLogits ? splat(1) : load(scale + at), load(high + at), load(low + at));
    });
    exp_nonpositive(p, p);
  }
};

}  // namespace
