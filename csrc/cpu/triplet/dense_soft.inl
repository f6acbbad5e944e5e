// Softplus of every triplet: log(1 + exp(t_k - v)) of each positive's t_k = sign d_ap + margin and each level v = sign d_an.
//
// With one reference r for the row, e_k = exp(t_k - r) and f = exp(r - v), a triplet has q = e_k f = exp(t_k - v) without an exponential of its own. Of a few
// positives at once
//   sum over k of log(1 + q_k) = log(1 + P),    P <- P + q_k (1 + P) from P = 0,
// one logarithm, and as exact where all q are small. The slope q_k / (1 + q_k) weighs the gradient of both distances. Where a row's hinges
// reach so far that products or exponentials might leave the range of floats, each triplet has its own softplus. A softplus is never 0: all triplets
// that are mined count.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/softplus.inl"
#include "triplet/dense_sorted.inl"

namespace {

constexpr float kMostHinge = 20, kLeastHinge = -60;  // of which kSoftTogether exponentials, and their quotients, are floats that lose nothing
constexpr int kSoftTogether = 4;

// As the statistic of a pass, the sums alone; as its weights, W_ij of the rows, as SortedHinges.
struct SoftHinges {
  static constexpr bool kKnowsIdle = true;

  const DenseParams& p;
  const HingeRule& rule;
  const HingeUpstream& upstream;
  const PairTask& task;
  int64_t rows, first = 0, base;
  ColumnWeights column_weights = {};
  float *factors, *relative, *slopes;    // [block]: relative, the f of the levels
  float *t, *t_rest, *exponential;       // slots of the task; t_rest: what rounding took from t; exponential: e_k
  float *low, *high;                     // slots of the task
  double* pull;                          // slots of the task: sums of the slopes
  float *most, *least;                   // [rows]: the largest t, the r of the row, and the smallest
  double *sum, *mined;                   // [rows]

  // `rows` of the task, with `slots` slots.
  SoftHinges(const DenseParams& p, const HingeRule& rule, const HingeUpstream& upstream, const PairTask& task, int64_t rows, int64_t block,
             int64_t slots, Arena& arena)
      : p(p), rule(rule), upstream(upstream), task(task), rows(rows), base(p.group != nullptr ? p.first_slot(task.row_begin) : 0) {
    column_weights.plan(block, arena);
    float** const of_block[] = {&factors, &relative, &slopes};
    for (float** const one : of_block) *one = arena.take(block);
    float** const of_slots[] = {&t, &t_rest, &exponential, &low, &high};
    for (float** const one : of_slots) *one = arena.take(slots);
    pull = HingeStatistic::doubles(slots, arena);
    most = arena.take(rows), least = arena.take(rows);
    sum = HingeStatistic::doubles(rows, arena), mined = HingeStatistic::doubles(rows, arena);
  }

  bool each_has_a_window() const { return rule.mining == Mining::kSemiHard; }
  bool taken(int64_t row, int64_t k) const { return takes(rule, p.distance[p.slot(row, k)], upstream.nearest[row]); }

  void begin() {
    column_weights.to = upstream.y_weight;
    for (int64_t i = 0; i < rows; ++i) {
      begin_row(task.row_begin + i, i);
      sum[i] = mined[i] = 0;
    }
  }

  // Positives that are not taken have t = -inf, whose softplus is 0.
  void begin_row(int64_t row, int64_t i) {
    const int64_t count = p.count(row);
    most[i] = -kInfinity, least[i] = kInfinity;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t at = p.slot(row, k) - base;
      const Vec d = splat(p.distance[p.slot(row, k)]);
      const Windows w = mined_windows(rule, d, splat(p.farthest[row]));
      const double hinge = taken(row, k) ? rule.sign * double(d[0]) + rule.margin : -kInfinity;
      t[at] = float(hinge);
      t_rest[at] = t[at] - t[at] == 0 ? float(hinge - t[at]) : 0;
      low[at] = w.low[0], high[at] = w.high[0], pull[at] = 0;
      if (t[at] > most[i]) most[i] = t[at];
      if (t[at] > -kInfinity && t[at] < least[i]) least[i] = t[at];
    }
    if (most[i] == -kInfinity) most[i] = least[i] = 0;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t at = p.slot(row, k) - base;
      exponential[at] = exp2_nonpositive(splat((t[at] - most[i] + t_rest[at]) * kLog2e))[0];
    }
  }

  void begin_rows(int64_t row) { first = row; }
  void begin_rows(int64_t row, int64_t) { first = row; }
  void begin_block(const Block& block) {
    if (upstream.g != nullptr) column_weights.begin_block(block);
  }
  bool idle(const Block& block, int64_t row, int64_t rows) const { return no_negatives(p, block, first + row, rows); }

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    for (int64_t i = 0; i < rows; ++i) take_row<false>(block, first + row + i, tile.scores(i));
  }
  void weigh(const Block& block, int64_t i, float* scores) {
    take_row<true>(block, first + i, scores);
    column_weights.end_row();
  }

  template <bool kWeights>
  void take_row(const Block& block, int64_t row, float* scores) const {
    row_levels<kWeights, false>(p, block, row, rule.sign, scores, factors, nullptr);
    if (rule.mining == Mining::kMultiSimilarity) filter(row, block.padded, scores);
    if (kWeights) __builtin_memset(slopes, 0, size_t(4 * block.padded));
    const bool near = relate(row - task.row_begin, block.padded, scores);
    each_has_a_window() ? take_levels<kWeights, true>(row, block.padded, scores, near) : take_levels<kWeights, false>(row, block.padded, scores, near);
    if constexpr (kWeights) store_weights(block, row, scores);
  }

  // Levels of negatives that are not kept become those of no negatives.
  void filter(int64_t row, int64_t padded, float* levels) const {
    const Windows w = mined_windows(rule, Vec{}, splat(p.farthest[row]));
    for (int64_t j = 0; j < padded; j += kLanes) store(levels + j, choose(between(load(levels + j), w.low, w.high), load(levels + j), splat(kInfinity)));
  }

  // f of the levels; returns whether no triplet's hinge is beyond the range where products of them serve.
  bool relate(int64_t i, int64_t padded, const float* levels) const {
    const Vec reference = splat(most[i]), infinity = splat(kInfinity);
    Vec lowest = infinity, highest = splat(-kInfinity);
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec v = load(levels + j);
      lowest = lesser(v, lowest), highest = larger(v < infinity ? v : -infinity, highest);
      store(relative + j, exp2_nonpositive((reference - v) * splat(kLog2e)));
    }
    return most[i] + largest(-lowest) < kMostHinge && least[i] - largest(highest) > kLeastHinge && most[i] - least[i] < kMostHinge - kLeastHinge;
  }

  template <bool kWeights, bool kEach>
  void take_levels(int64_t row, int64_t padded, const float* levels, bool near) const {
    const int64_t count = p.count(row);
    int64_t k = 0;
    if (!near) {
      for (; k < count; ++k) take<kWeights, kEach, false, 1>(row, k, padded, levels);
      return;
    }
    for (; k + kSoftTogether <= count; k += kSoftTogether) take<kWeights, kEach, true, kSoftTogether>(row, k, padded, levels);
    switch (count - k) {
      case 3:
        return take<kWeights, kEach, true, 3>(row, k, padded, levels);
      case 2:
        return take<kWeights, kEach, true, 2>(row, k, padded, levels);
      case 1:
        return take<kWeights, kEach, true, 1>(row, k, padded, levels);
    }
  }

  // Positives k .. k + kCount of a row. kNear: by products.
  template <bool kWeights, bool kEach, bool kNear, int kCount>
  void take(int64_t row, int64_t k, int64_t padded, const float* levels) const {
    const int64_t i = row - task.row_begin;
    const Vec one = splat(1.0f);
    int64_t at[kCount];
    Vec of_positive[kCount], rest[kCount], from[kCount], to[kCount], slope_sum[kCount] = {}, total_of = {}, number = {};
    for (int c = 0; c < kCount; ++c) {
      at[c] = p.slot(row, k + c) - base;
      of_positive[c] = splat(kNear ? exponential[at[c]] : t[at[c]]), rest[c] = splat(t_rest[at[c]]);
      from[c] = splat(low[at[c]]), to[c] = splat(high[at[c]]);
    }
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec v = load(levels + j), f = load(relative + j);
      Vec product = {}, slope_here = {};
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) {
        Vec q, slope, alone = {};
        if constexpr (kNear) {
          q = of_positive[c] * f;
        } else {
          alone = softplus(of_positive[c] - v + rest[c], &slope);
        }
        if constexpr (kEach) {
          const Mask inside = between(v, from[c], to[c]);
          number = add_where(inside, number, one);
          if constexpr (kNear) {
            q = choose(inside, q, Vec{});
          } else {
            alone = choose(inside, alone, Vec{}), slope = choose(inside, slope, Vec{});
          }
        }
        if constexpr (kNear) {
          product = multiply_add(q, product + one, product);
          if constexpr (kWeights) slope = q * reciprocal(q + one);
        } else {
          total_of += alone;
        }
        if constexpr (kWeights) slope_here += slope, slope_sum[c] += slope;
      }
      if constexpr (kNear) total_of += log1p_nonnegative(product);
      if constexpr (kWeights) store(slopes + j, load(slopes + j) + slope_here);
    }
    sum[i] += wide_total(total_of);
    if constexpr (kEach) mined[i] += wide_total(number);
    if constexpr (kWeights)
      for (int c = 0; c < kCount; ++c) pull[at[c]] += wide_total(slope_sum[c]);
  }

  void store_weights(const Block& block, int64_t row, float* scores) const {
    const Vec g = splat(rule.sign * upstream.g[row]);
    Vec weights = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec weight = load(slopes + j) * g * load(factors + j);
      weights += weight;
      store(scores + j, weight);
      column_weights.add(j, weight);
    }
    upstream.x_weight[row] += wide_total(weights);
  }

  // Once all levels have passed: what the positives weigh.
  void finish(int64_t row) const {
    if (upstream.g == nullptr) return;
    const float g = rule.sign * upstream.g[row];
    for (int64_t k = 0; k < p.count(row); ++k) {
      const int64_t slot = p.slot(row, k);
      upstream.pull[slot] = g * float(pull[slot - base]) * weight_factors(p.metric, splat(p.distance[slot]))[0];
    }
  }

  // out.mined as SortedHinges::report has it.
  void report(const HingeResult& out, int64_t row) const {
    const int64_t i = row - task.row_begin, negatives = p.negatives(row), kept = out.mined[row];
    out.loss[row] = 0, out.mined[row] = out.active[row] = 0;
    if (p.count(row) == 0 || negatives == 0) return;
    int64_t positives = 0;
    for (int64_t k = 0; k < p.count(row); ++k) positives += taken(row, k);
    out.loss[row] = float(sum[i]);
    out.mined[row] = out.active[row] = rule.mining == Mining::kBatchAll   ? positives * negatives
                                       : rule.mining == Mining::kSemiHard ? int64_t(mined[i])
                                                                          : positives * kept;
  }
};

template <>
constexpr bool kSkipsChunks<SoftHinges> = true;

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// As sorted_hinges, for tasks of at most `slots` slots.
int64_t soft_hinges_workspace(const DenseParams& p, const PairSums& sums, int64_t rows, int64_t slots) {
  return row_hinges_workspace<SoftHinges>(p, sums, rows, slots);
}
void soft_hinges(const DenseParams& p, const HingeRule& rule, const HingeResult& out, const HingeUpstream& upstream, const PairSums& sums,
                 int64_t begin, int64_t end, int64_t slots, float* workspace) {
  row_hinges<SoftHinges>(p, rule, out, upstream, sums, begin, end, slots, workspace);
}

}  // namespace
