// Gradient of the hinges of every triplet, from tiles of weights: with c_ij the triplets of row i in which column j is active,
//   W_ij = sign g_i c_ij w(d_ij),   w = 1/d, 2 or 1 as the metric is,
// sums_i = sum_j W_ij y_j, sums_j = sum_i W_ij x_i; dense_positives.inl makes gradients of them. In batch a pair's weights in both
// roles, W_ij + W_ji, are formed together, the windows of the columns being at hand as vectors, so that one product serves both: 4 N M D.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/column_weights.inl"
#include "triplet/dense.inl"

namespace {

using kdfast::HingeUpstream;

// Whether no pair of `rows` rows from `row` on with `columns` columns from `column` on has a gradient; in batch in neither role.
inline bool tiles_are_idle(const DenseParams& p, const uint8_t* tiles, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const auto any = [&](int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) {
    for (int64_t g = row_begin / kSlotRows; g * kSlotRows < row_end; ++g)
      for (int64_t t = column_begin / kTileColumns; t * kTileColumns < column_end; ++t)
        if (tiles[g * tile_columns(p) + t]) return true;
    return false;
  };
  return !any(row, row + rows, column, column + columns) && !(p.in_batch && any(column, column + columns, row, row + rows));
}

struct HingeWeights {
  static constexpr bool kKnowsIdle = true;

  const DenseParams& p;
  const HingeRule& rule;
  const HingeUpstream& upstream;
  const PairTask& task;
  int64_t first = 0, block_columns = 0;
  float* factors = nullptr;                                 // [block]
  float *row_low = nullptr, *row_high = nullptr;            // windows of a row
  int32_t* row_active = nullptr;
  float *column_low = nullptr, *column_high = nullptr;      // [positive][block]: windows of the columns
  int64_t* column_windows = nullptr;                        // of each vector of columns
  ColumnWeights column_weights = {};

  void plan(int64_t block, int64_t most, Arena& arena) {
    block_columns = block;
    factors = arena.take(block);
    row_low = arena.take(most), row_high = arena.take(most);
    row_active = reinterpret_cast<int32_t*>(arena.take(most));
    column_weights.plan(block, arena);
    column_weights.to = upstream.y_weight;
    if (!p.in_batch) return;
    column_low = arena.take(most * block), column_high = arena.take(most * block);
    column_windows = reinterpret_cast<int64_t*>(arena.take(2 * (block / kLanes)));
  }

  void begin_rows(int64_t row, int64_t) { first = row; }

  void begin_block(const Block& block) {
    column_weights.begin_block(block);
    if (!p.in_batch) return;
    const WindowTable windows_of{p, rule};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      int64_t most = 0;
      for (int64_t i = block.first + j; i < smaller(block.first + j + kLanes, p.pairs.rows); ++i)
        most = windows_of.count(i) > most ? windows_of.count(i) : most;
      column_windows[j / kLanes] = most;
      for (int64_t k = 0; k < most; ++k) {
        const int64_t at = block.first + j, slot = windows_of.slot(at, k);
        const Windows w = windows_of.at(at, k);
        float* const high = column_high + k * block_columns + j;
        store(column_low + k * block_columns + j, w.low);
        store(high, w.high);
        for (int i = 0; i < kLanes; ++i)
          if (at + i >= p.pairs.rows || k >= windows_of.count(at + i) || !taken(windows_of.distance()[slot + i], at + i)) high[i] = -kInfinity;
      }
    }
  }

  bool idle(const Block& block, int64_t row, int64_t rows) const {
    return tiles_are_idle(p, upstream.tiles, first + row, rows, block.first, block.columns);
  }

  bool taken(float d, int64_t row) const { return rule.mining != Mining::kMultiSimilarity || takes(rule, d, upstream.nearest[row]); }

  void weigh(const Block& block, int64_t i, float* scores) {
    const int64_t row = first + i;
    row_levels<true, false>(p, block, row, rule.sign, scores, factors, nullptr);
    const WindowTable windows_of{p, rule};
    const int64_t count = windows_of.count(row);
    for (int64_t k = 0; k < count; ++k) {
      const float d = windows_of.distance()[windows_of.slot(row, k)];
      const Windows w = windows(rule, splat(d), splat(p.farthest[row]));
      row_low[k] = w.low[0], row_high[k] = taken(d, row) ? w.high[0] : -kInfinity;
      row_active[k] = 0;
    }
    if (has_low_end(rule)) {
      p.in_batch ? weigh_row<true, true>(block, row, count, scores) : weigh_row<true, false>(block, row, count, scores);
    } else {
      p.in_batch ? weigh_row<false, true>(block, row, count, scores) : weigh_row<false, false>(block, row, count, scores);
    }
    if (upstream.active != nullptr)
      for (int64_t k = 0; k < count; ++k) upstream.active[p.slot(row, k)] += row_active[k];
    column_weights.end_row();
  }

  template <bool kLow, bool kColumns>
  void weigh_row(const Block& block, int64_t row, int64_t count, float* scores) const {
    const Vec one = splat(1.0f), g = splat(rule.sign * upstream.g[row]), sign = splat(rule.sign);
    Vec sum = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec v = load(scores + j);
      Vec number = {};
      for (int64_t k = 0; k < count; ++k) {
        const Mask inside = kLow ? between(v, splat(row_low[k]), splat(row_high[k])) : below(v, splat(row_high[k]));
        number = add_where(inside, number, one);
        row_active[k] += lanes_in(inside);
      }
      Vec weight = number * g;
      if constexpr (kColumns) {
        const float *low = column_low + j, *high = column_high + j;
        Vec mutual = {};
        for (int64_t k = 0; k < column_windows[j / kLanes]; ++k, low += block_columns, high += block_columns)
          mutual = add_where(kLow ? between(v, load(low), load(high)) : below(v, load(high)), mutual, one);
        weight = multiply_add(mutual, sign * load(upstream.g + block.first + j), weight);
      }
      weight *= load(factors + j);
      sum += weight;
      store(scores + j, weight);
      column_weights.add(j, weight);
    }
    upstream.x_weight[row] += double(total(sum));
  }
};

struct HingeGradientWorkspace : PairGradientWorkspace {
  template <class Product>
  HingeGradientWorkspace(Product product, const DenseParams& p, const PairSums& out, int64_t rows, int64_t columns, int64_t most,
                         HingeWeights& weights, Arena& arena)
      : PairGradientWorkspace(product, p.pairs, out.x_sums != nullptr, out.y_sums != nullptr, rows, columns, arena) {
    weights.plan(block, most, arena);
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows and `columns` columns, with at most `most` positives to a row.
int64_t triplet_hinges_grad_workspace(const DenseParams& p, const PairSums& out, int64_t rows, int64_t columns, int64_t most) {
  return scratch_words(p.pairs.precision, [&](auto product) {
    Arena arena{nullptr};
    HingeWeights weights{p, HingeRule{}, HingeUpstream{}, PairTask{}};
    HingeGradientWorkspace(product, p, out, rows, columns, most, weights, arena);
    return arena.words;
  });
}

void triplet_hinges_grad(const DenseParams& p, const HingeRule& rule, const HingeUpstream& upstream, const PairTask& task, const PairSums& out,
                         int64_t most, float* workspace) {
  with_holding_product(p.pairs, task, [&](auto product) {
    Arena arena{workspace};
    HingeWeights weights{p, rule, upstream, task};
    HingeGradientWorkspace w(product, p, out, task.row_end - task.row_begin, task.column_end - task.column_begin, most, weights, arena);
    take_gradients(product, p.pairs, task, out, w, weights);
    weights.column_weights.flush();
  });
}

// The pull of the positives of rows begin .. end, once all their negatives are counted.
void triplet_hinges_pull(const DenseParams& p, const HingeRule& rule, const HingeUpstream& upstream, float* pull, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t count = p.count(i);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t slot = p.slot(i, k);
      pull[slot] = rule.sign * upstream.g[i] * float(upstream.active[slot]) * weight_factors(p.metric, splat(p.distance[slot]))[0];
    }
  }
}

}  // namespace
