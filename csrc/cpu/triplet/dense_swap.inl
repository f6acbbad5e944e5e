// Triplets whose negative is the nearer of two distances, min(d_an, d_pn): anchor and positive swapped where that is the harder one.
//
// The rows of this pass are teams: anchors of a class beside all references of the class, within one chunk of rows, so that the levels v_a and v_p of a pair
// stand in one tile. A triplet is mined by v_a; its level is that of the smaller distance, whose weight it adds to: W_an or W_pn. Both are
// weights of rows of the pass, so that what is summed is as in dense_sorted.inl.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/dense_soft.inl"

namespace {

using kdfast::SwapState;
using kdfast::Team;
using kdfast::Teams;

struct SwapHinges {
  static constexpr bool kKnowsIdle = false;

  const DenseParams& p;
  const Teams& teams;
  const HingeRule& rule;
  const HingeUpstream& upstream;
  const SwapState& state;
  int64_t first = 0, block_columns = 0, chunk_rows = 0;
  Tile tile = {};
  ColumnWeights column_weights = {};
  float *factors = nullptr, *slopes = nullptr;  // [Teams::kRows][block]

  template <class Product>
  void plan(Product, int64_t block, Arena& arena) {
    block_columns = block, chunk_rows = Product::kRowChunk;
    column_weights.plan(block, arena);
    factors = arena.take(Teams::kRows * block), slopes = arena.take(Teams::kRows * block);
  }

  void begin_rows(int64_t row) { first = row; }
  void begin_rows(int64_t row, int64_t) { first = row; }
  void begin_block(const Block& block) {
    if (upstream.g != nullptr) column_weights.begin_block(block);
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& scores) const {
    for (int64_t i = 0; i < rows; ++i)
      if (begins_team(first + row + i)) take_team<false>(block, team_of(first + row + i), scores, i);
  }
  // The first row of a team makes the weights of all of it.
  void weigh(const Block& block, int64_t i, float* scores) {
    const int64_t row = first + i;
    if (teams.team[row] < 0) __builtin_memset(scores, 0, size_t(4 * block.padded));
    if (begins_team(row)) take_team<true>(block, team_of(row), tile, i % chunk_rows);
    column_weights.end_row();
  }

  const Team& team_of(int64_t row) const { return teams.teams[teams.team[row]]; }
  bool begins_team(int64_t row) const { return teams.team[row] >= 0 && team_of(row).begin == row; }

  template <bool kWeights>
  void take_team(const Block& block, const Team& team, const Tile& scores, int64_t at) const {
    const int64_t size = team.end - team.begin;
    for (int64_t r = 0; r < size; ++r) {
      row_levels<kWeights, false>(teams.rows, block, team.begin + r, rule.sign, scores.scores(at + r), factors + r * block_columns, nullptr);
      if (kWeights) __builtin_memset(slopes + r * block_columns, 0, size_t(4 * block.padded));
    }
    for (int64_t a = 0; a < team.anchors; ++a) {
      const int64_t row = team.anchor + a;
      for (int64_t k = 0; k < p.count(row); ++k) {
        const int64_t q = team.refs - team.begin + p.column(row, k) - p.first[row];
        take_pair<kWeights>(row, k, block.padded, a, q, scores.scores(at + a), scores.scores(at + q));
      }
    }
    for (int64_t r = 0; kWeights && r < size; ++r) store_weights(block, team, r, scores.scores(at + r));
  }

  template <bool kWeights>
  void take_pair(int64_t row, int64_t k, int64_t padded, int64_t a, int64_t q, const float* of_anchor, const float* of_positive) const {
    const int64_t slot = p.slot(row, k);
    const float d = p.distance[slot];
    PairTerms terms{soft_windows(rule, splat(d), splat(p.farthest[row])), splat(float(rule.sign * double(d) + rule.margin)), row, slot,
                    slopes + a * block_columns, slopes + q * block_columns};
    if (!takes(rule, d, upstream.nearest[row])) terms.window.low = splat(kInfinity), terms.window.high = splat(-kInfinity);  // for NaN alone
    if (rule.soft) {
      rule.sign > 0 ? take_levels<kWeights, true, true>(terms, padded, of_anchor, of_positive)
                    : take_levels<kWeights, true, false>(terms, padded, of_anchor, of_positive);
    } else {
      rule.sign > 0 ? take_levels<kWeights, false, true>(terms, padded, of_anchor, of_positive)
                    : take_levels<kWeights, false, false>(terms, padded, of_anchor, of_positive);
    }
  }

  struct PairTerms {
    Windows window;  // of the levels that are mined
    Vec t;
    int64_t row, slot;
    float *anchor_slopes, *positive_slopes;
  };

  template <bool kWeights, bool kSoft, bool kCluster>
  void take_levels(const PairTerms& terms, int64_t padded, const float* of_anchor, const float* of_positive) const {
    const Vec one = splat(1.0f), g = kWeights ? splat(rule.sign * upstream.g[terms.row]) : one;
    Vec sum = {}, mined = {}, active = {}, pull = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec v_a = load(of_anchor + j), v_p = load(of_positive + j);
      const Mask swapped = kCluster ? below(v_p, v_a) : below(v_a, v_p), inside = between(v_a, terms.window.low, terms.window.high);
      const Vec v = choose(swapped, v_p, v_a), hinge = terms.t - v;
      Vec value = hinge, slope = one;
      if constexpr (kSoft) value = softplus(hinge, &slope);
      const Mask counts = kSoft ? inside : Mask(inside & below(v, terms.t));
      sum = add_where(counts, sum, value);
      mined = add_where(inside, mined, one), active = add_where(counts, active, one);
      if constexpr (kWeights) {
        slope = choose(counts, slope, Vec{});
        pull += slope, slope *= g;
        store(terms.anchor_slopes + j, load(terms.anchor_slopes + j) + choose(swapped, Vec{}, slope));
        store(terms.positive_slopes + j, load(terms.positive_slopes + j) + choose(swapped, slope, Vec{}));
      }
    }
    state.sum[terms.row] += wide_total(sum);
    state.mined[terms.row] += wide_total(mined), state.active[terms.row] += wide_total(active);
    if constexpr (kWeights) state.pull[terms.slot] += wide_total(pull);
  }

  // W of a team's row number r in place of its levels.
  void store_weights(const Block& block, const Team& team, int64_t r, float* scores) const {
    Vec weights = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec weight = load(slopes + r * block_columns + j) * load(factors + r * block_columns + j);
      weights += weight;
      store(scores + j, weight);
      column_weights.add(j, weight);
    }
    state.weight[team.begin + r] += wide_total(weights);
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows of teams.
int64_t swapped_hinges_workspace(const DenseParams& p, const Teams& teams, const PairSums& sums, int64_t rows) {
  return scratch_words(p.pairs.precision, [&](auto product) {
    Arena values{nullptr}, gradients{nullptr};
    SwapHinges hinges{p, teams, HingeRule{}, HingeUpstream{}, SwapState{}};
    hinges.plan(product, PairWorkspace(product, teams.rows.pairs, rows, p.columns, values).block, values);
    const PairGradientWorkspace w(product, teams.rows.pairs, true, sums.y_sums != nullptr, rows, p.columns, gradients);
    hinges.plan(product, w.block, gradients);
    return values.words > gradients.words ? values.words : gradients.words;
  });
}

// Rows begin .. end of teams against all references; begin is a multiple of Teams::kRows. With upstream.g weights go into `sums`, which has x_sums.
void swapped_hinges(const DenseParams& p, const Teams& teams, const HingeRule& rule, const HingeUpstream& upstream, const SwapState& state,
                    const PairSums& sums, int64_t begin, int64_t end, float* workspace) {
  const PairTask task{0, begin, end, 0, p.columns};
  SwapHinges hinges{p, teams, rule, upstream, state};
  with_product(p.pairs.precision, [&](auto product) {  // which holds all rows
    Arena arena{workspace};
    if (upstream.g == nullptr) {
      PairWorkspace w(product, teams.rows.pairs, end - begin, p.columns, arena);
      hinges.plan(product, w.block, arena);
      take_statistics(product, teams.rows.pairs, task, w, hinges);
    } else {
      PairGradientWorkspace w(product, teams.rows.pairs, true, sums.y_sums != nullptr, end - begin, p.columns, arena);
      hinges.plan(product, w.block, arena);
      hinges.column_weights.to = upstream.y_weight;
      hinges.tile = w.tile;
      take_gradients(product, teams.rows.pairs, task, sums, w, hinges);
      hinges.column_weights.flush();
    }
  });
}

// Once all teams have passed: values where out.loss is given, and what the positives weigh where upstream.g is. out.mined as SortedHinges::report
// has it.
void swapped_finish(const DenseParams& p, const HingeRule& rule, const SwapState& state, const HingeResult& out, const HingeUpstream& upstream) {
  for (int64_t row = 0; row < p.pairs.rows; ++row) {
    int64_t taken = 0;
    for (int64_t k = 0; k < p.count(row); ++k) {
      const int64_t slot = p.slot(row, k);
      const float d = p.distance[slot];
      taken += takes(rule, d, upstream.nearest[row]);
      if (upstream.g != nullptr) upstream.pull[slot] = rule.sign * upstream.g[row] * float(state.pull[slot]) * weight_factors(p.metric, splat(d))[0];
    }
    if (out.loss == nullptr) continue;
    const int64_t negatives = p.negatives(row), kept = out.mined[row];
    const bool counts = taken > 0 && negatives > 0;
    out.loss[row] = p.count(row) > 0 && negatives > 0 ? float(state.sum[row]) : 0;
    out.mined[row] = !counts                                ? 0
                     : rule.mining == Mining::kBatchAll     ? taken * negatives
                     : rule.mining == Mining::kSemiHard     ? int64_t(state.mined[row])
                                                            : taken * kept;
    out.active[row] = !counts ? 0 : rule.soft ? out.mined[row] : int64_t(state.active[row]);
  }
}

}  // namespace
