// Triplets of the set minings visited one by one: those whose loss is taken elsewhere than they are mined, in one layer or in several, or at the
// nearer of d_an and d_pn.
//
// A block of columns is packed in every space, and the scores of a unit of rows stand side by side in a tile a space: levels in the space that mines,
// distances in the layers. A window over the levels (dense_levels.inl) says which columns a pair (a, p) is mined with; of these
//   hinge = sign (d_ap - d) + margin,   d = d_an, with swap min(d_an, d_pn),
// in every layer, or its softplus, is summed, and its slope added to that distance's: W_an or W_pn, in place of the layer's scores once the unit is
// done. With swap the unit holds an anchor's positives, so that d_pn stands in the same tile. N P M triplets of about ten vector operations;
// products 2 N M D in each space and 4 more in each layer for the gradient.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/pairs.inl"
#include "triplet/column_weights.inl"
#include "triplet/pair_levels.inl"

namespace {

using kdfast::EveryGradients;
using kdfast::EveryState;
using kdfast::HingeResult;
using kdfast::TripletSpace;

constexpr int64_t kUnitWords = int64_t(1) << 17;  // of a tile: distances and slopes of a unit stay in L2
constexpr int64_t kMostColumns = 256;

// What becomes of a layer's rows once all of a unit's triplets are taken.
struct LayerWeights {
  static constexpr bool kKnowsIdle = false;

  Metric metric = {};
  float sign = 1;
  const float* g = nullptr;         // [anchors]
  const int64_t* anchor = nullptr;  // of the group's rows
  double* to = nullptr;             // [rows of the group]: sums of the weights
  float* slopes = nullptr;          // [rows of the unit][block], of the rows as anchors
  float* other_slopes = nullptr;    // the same as positives, times g; with swap alone
  int64_t block_columns = 0, unit_first = 0;
  ColumnWeights column_weights = {};

  void begin_group(const float* all_g, const int64_t* anchors, double* sums) { g = all_g, anchor = anchors, to = sums; }
  void begin_block(const Block& block) { column_weights.begin_block(block); }
  void begin_unit(int64_t first, int64_t rows) {
    unit_first = first;
    __builtin_memset(slopes, 0, size_t(4 * rows * block_columns));
    if (other_slopes != nullptr) __builtin_memset(other_slopes, 0, size_t(4 * rows * block_columns));
  }
  float* slopes_of(int64_t i) const { return slopes + i * block_columns; }
  float* other_slopes_of(int64_t i) const { return other_slopes != nullptr ? other_slopes + i * block_columns : nullptr; }

  void weigh(const Block& block, int64_t i, float* distances) {
    other_slopes != nullptr ? weigh_row<true>(block, i, distances) : weigh_row<false>(block, i, distances);
    column_weights.end_row();
  }

  template <bool kOther>
  void weigh_row(const Block& block, int64_t i, float* distances) const {
    const float *const slope = slopes_of(i - unit_first), *const other = other_slopes_of(i - unit_first);
    const Vec own_g = splat(anchor[i] >= 0 ? sign * g[anchor[i]] : 0);
    Vec sum = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec slopes_here = kOther ? multiply_add(own_g, load(slope + j), load(other + j)) : own_g * load(slope + j);
      const Vec weight = slopes_here * weight_factors(metric, load(distances + j));
      sum += weight;
      store(distances + j, weight);
      column_weights.add(j, weight);
    }
    to[i] += wide_total(sum);
  }
};

// A space's scratch.
struct SpaceWork {
  PairGradientWorkspace w;
  LayerWeights weights;
};

// All spaces': layers, then the one that mines.
struct EveryWork {
  SpaceWork spaces[kMostLayers + 1];
  int64_t rows, block;      // rows that are taken together, at most
  float* levels;            // [most_unit][block]: where those of layer 0 mine, and are not its distances

  template <class Product>
  EveryWork(Product product, const EveryTriplet& e, const PairSums* sums, Arena& arena) {
    const int64_t tile_rows = round_up(e.most_unit, Product::kRowChunk), fit = kUnitWords / tile_rows / kPanel * kPanel;
    const int64_t columns = smaller(kMostColumns, fit > kPanel ? fit : kPanel);
    int64_t width = e.separate ? e.mine.rows.pairs.width : 0;
    for (int64_t l = 0; l < e.layer_count; ++l) width += e.layers[l].rows.pairs.width;
    rows = rows_at_once<Product>(width, e.rows);
    rows = rows > e.most_unit ? rows : e.most_unit;
    for (int64_t l = 0; l < e.layer_count + e.separate; ++l) {
      const bool mines = l == e.layer_count, want_x = !mines && sums[l].x_sums != nullptr, want_y = !mines && sums[l].y_sums != nullptr;
      const DenseParams& p = mines ? e.mine.rows : e.layers[l].rows;
      SpaceWork& s = spaces[l];
      s.w = PairGradientWorkspace(product, p.pairs, want_x, want_y, rows, p.columns, arena, columns, tile_rows);
      s.w.y.matrix = p.pairs.y;
      block = s.w.block;
      s.weights.metric = p.metric, s.weights.sign = e.rule.sign, s.weights.block_columns = block;
      s.weights.column_weights.plan(block, arena);
      if (!want_x && !want_y) continue;
      s.weights.slopes = arena.take(tile_rows * block);
      s.weights.other_slopes = e.swap ? arena.take(tile_rows * block) : nullptr;
    }
    levels = arena.take(e.separate || e.rule.sign > 0 ? 0 : tile_rows * block);
  }
};

template <class Product>
struct EveryPass {
  using Layer = PairGradientPass<Product, LayerWeights>;

  const EveryTriplet& e;
  const EveryGradients& gradients;
  const EveryState& state;
  EveryWork& work;
  const int64_t first, count;  // rows of the pass

  bool weighs() const { return gradients.g != nullptr; }
  int64_t spaces() const { return e.layer_count + e.separate; }
  const DenseParams& rows_of(int64_t space) const { return space == e.layer_count ? e.mine.rows : e.layers[space].rows; }

  // f(pass of a space, its number)
  template <class F>
  void for_each_space(const F& f) const {
    for (int64_t l = 0; l < spaces(); ++l) {
      SpaceWork& s = work.spaces[l];
      const PairSums none{};
      const DenseParams& p = rows_of(l);
      f(Layer{p.pairs, PairTask{0, first, first + count, 0, p.columns}, weighs() && l < e.layer_count ? gradients.sums[l] : none, s.w, first, count,
              s.weights},
        l);
    }
  }

  // Units begin .. end, which are these rows.
  void run(int64_t begin, int64_t end) const {
    for_each_space([&](const Layer& pass, int64_t l) {
      if (weighs() && l < e.layer_count) pass.weights.begin_group(gradients.g, e.anchor + first, state.weight[l] + first);
      pass.begin();
    });
    for (int64_t column = 0; column < e.mine.anchors.columns; column += work.block) {
      const int64_t columns = smaller(work.block, e.mine.anchors.columns - column);
      const Block block{column, columns, round_up(columns, kPanel)};
      for_each_space([&](const Layer& pass, int64_t) {
        Packing<Product>::pack_block(pass.w.y.panels, pass.w.y.matrix, column, columns, block.padded);
        pass.begin_block(block);
      });
      for (int64_t unit = begin; unit < end; ++unit) take_unit(block, e.units[unit], e.units[unit + 1]);
    }
    for_each_space([](const Layer& pass, int64_t) {
      pass.finish();
      pass.weights.column_weights.flush();
    });
  }

  void take_unit(const Block& block, int64_t begin, int64_t end) const {
    for_each_space([&](const Layer& pass, int64_t l) { measure(pass, block, begin, end, l); });
    for (int64_t row = begin; row < end; ++row)
      if (e.anchor[row] >= 0) take_anchor(block, begin, row);
    if (!weighs()) return;
    for_each_space([&](const Layer& pass, int64_t l) {
      if (l == e.layer_count) return;
      for (int64_t row = begin - first; row < end - first; row += kPairChunk<Product>) {
        const int64_t rows = smaller(kPairChunk<Product>, pass.padded_rows() - row);
        pass.weigh_and_sum(block, row, rows, pass.w.tile_from(row - (begin - first)), Prefetch{nullptr, 0, 0}, false);
      }
    });
  }

  // Distances of a unit's rows in a space, or levels.
  void measure(const Layer& pass, const Block& block, int64_t begin, int64_t end, int64_t l) const {
    PairGradientWorkspace& w = pass.w;
    for (int64_t row = begin - first; row < end - first; row += Product::kRowChunk) {
      const Tile tile = w.tile_from(row - (begin - first));
      score_rows(Product{}, w.x.at(row), w.x.stride, smaller(Product::kRowChunk, pass.padded_rows() - row), w.y.panels, block.padded,
                 tile.scores(0), tile.stride);
    }
    const float sign = l == e.layer_count ? e.rule.sign : 1;
    for (int64_t row = begin; row < end; ++row)
      row_levels<false, false>(rows_of(l), block, row, sign, w.tile.scores(row - begin), nullptr, nullptr);
    if (weighs() && l < e.layer_count) pass.weights.begin_unit(begin - first, end - begin);
  }

  // The levels that row number i of a unit is mined by.
  const float* levels_of(const Block& block, int64_t i) const {
    if (e.separate) return work.spaces[e.layer_count].w.tile.scores(i);
    const float* const distances = work.spaces[0].w.tile.scores(i);
    if (e.rule.sign > 0) return distances;
    float* const levels = work.levels + i * work.block;
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec d = load(distances + j);
      store(levels + j, d == splat(kInfinity) ? d : -d);
    }
    return levels;
  }

  void take_anchor(const Block& block, int64_t begin, int64_t row) const {
    const DenseParams& p = e.mine.anchors;
    const int64_t a = e.anchor[row], taken = p.count(a);
    const float* const levels = levels_of(block, row - begin);
    if (taken > 0 && any_lost(p.farthest[a], levels, block.padded)) state.sum[a] = __builtin_nan("");
    for (int64_t k = 0; k < taken; ++k) {
      const int64_t slot = p.slot(a, k), at = row - begin, positive = e.swap ? e.references[row] + p.column(a, k) - p.first[a] - begin : at;
      const float d = p.distance[slot];
      if (!takes(e.rule, d, gradients.nearest[a])) continue;
      PairLevels pair;
      pair.levels = levels, pair.window = mined_windows(e.rule, splat(d), splat(p.farthest[a])), pair.padded = block.padded;
      pair.g = weighs() ? e.rule.sign * gradients.g[a] : 0;
      for (int64_t l = 0; l < e.layer_count; ++l) {
        const SpaceWork& s = work.spaces[l];
        pair.own[l] = e.layers[l].anchors.distance[slot];
        pair.anchor[l] = s.w.tile.scores(at), pair.positive[l] = s.w.tile.scores(positive);
        if (weighs()) pair.anchor_slopes[l] = s.weights.slopes_of(at), pair.positive_slopes[l] = s.weights.other_slopes_of(positive);
      }
      take_pair(e, weighs(), &pair);
      state.sum[a] += pair.sum, state.mined[a] += pair.mined, state.active[a] += pair.active;
      for (int64_t l = 0; l < e.layer_count && weighs(); ++l) state.pull[l][slot] += pair.pull[l];
    }
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

int64_t every_triplet_chunk(kdfast::Precision precision) {
  return with_product(precision, [](auto product) { return int64_t(decltype(product)::kRowChunk); });
}

// Words of workspace; sums: which of each layer are wanted.
int64_t every_triplet_workspace(const EveryTriplet& e, const PairSums* sums) {
  return scratch_words(e.mine.rows.pairs.precision, [&](auto product) {
    Arena arena{nullptr};
    EveryWork(product, e, sums, arena);
    return arena.words;
  });
}

// Units begin .. end against all references. Each layer has sums of one kind or both where gradients.g is given.
void every_triplet(const EveryTriplet& e, const EveryGradients& gradients, const EveryState& state, int64_t begin, int64_t end, float* workspace) {
  with_product(e.mine.rows.pairs.precision, [&](auto product) {  // which holds all rows
    using Product = decltype(product);
    [[maybe_unused]] typename Product::Session session;
    Arena arena{workspace};
    EveryWork work(product, e, gradients.sums, arena);
    for (int64_t l = 0; l < e.layer_count && gradients.g != nullptr; ++l) {
      work.spaces[l].weights.column_weights.to = gradients.y_weight[l];
      if (gradients.sums[l].y_sums != nullptr) work.spaces[l].w.clear_transposed();
    }
    for (int64_t unit = begin; unit < end;) {
      int64_t last = unit + 1;
      while (last < end && e.units[last + 1] - e.units[unit] <= work.rows) ++last;
      EveryPass<Product>{e, gradients, state, work, e.units[unit], e.units[last] - e.units[unit]}.run(unit, last);
      unit = last;
    }
  });
}

// Values, once all units have passed. out.mined holds how many negatives of the row pass multi-similarity mining's filter.
void every_triplet_finish(const EveryTriplet& e, const EveryState& state, const HingeResult& out) {
  const DenseParams& p = e.mine.anchors;
  for (int64_t row = 0; row < p.pairs.rows; ++row) {
    int64_t taken = 0;
    for (int64_t k = 0; k < p.count(row); ++k) taken += takes(e.rule, p.distance[p.slot(row, k)], out.nearest[row]);
    const int64_t negatives = p.negatives(row), kept = out.mined[row];
    const bool counts = taken > 0 && negatives > 0;
    out.loss[row] = p.count(row) > 0 && negatives > 0 ? float(state.sum[row]) : 0;
    out.mined[row] = !counts                                  ? 0
                     : e.rule.mining == Mining::kBatchAll     ? taken * negatives
                     : e.rule.mining == Mining::kSemiHard     ? int64_t(state.mined[row])
                                                              : taken * kept;
    out.active[row] = !counts ? 0 : e.rule.soft ? out.mined[row] : int64_t(state.active[row]);
  }
}

// What the positives weigh in a layer.
void every_triplet_pull(const EveryTriplet& e, int64_t layer, const float* g, const EveryState& state, float* pull) {
  const DenseParams& p = e.layers[layer].anchors;
  for (int64_t row = 0; row < p.pairs.rows; ++row) {
    for (int64_t k = 0; k < p.count(row); ++k) {
      const int64_t slot = p.slot(row, k);
      pull[slot] = e.rule.sign * g[row] * float(state.pull[layer][slot]) * weight_factors(p.metric, splat(p.distance[slot]))[0];
    }
  }
}

}  // namespace
