// Log-sum-exps of the rows and of the columns of one score matrix, and their gradient.
//
// One exponential a pair serves both sides. In a tile e_ij = e^(z_ij - a), with one reference a for all of it, is added to its row and to
// its column; in the gradient W_ij = g^r_i e^(z_ij - L^r_i) + g^c_j e^(z_ij - L^c_j) = e_ij (u_i + v_j), u_i = g^r_i e^(a - L^r_i) and v_j
// likewise. Where rows or columns lie further from a than kReach, each side has its own exponential.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/pairs.inl"

namespace {

using kdfast::SymmetricStatistics;
using kdfast::SymmetricUpstream;

// The exponent z - a is rounded to 2^-19 there, which is what a logit of that size is rounded to.
constexpr float kReach = 22;

// ---- statistics -------------------------------------------------------------------------------------------------------

// kLanes running sums relative to running maxima, sum e^maximum, grow by part e^reference.
inline void fold(float* maximum, float* low, float* sum, Logits reference, Vec part) {
  const Logits before{load(maximum), load(low)}, after = larger(reference, before), shift{finite_shift(after.high), after.low};
  store(maximum, after.high);
  store(low, after.low);
  store(sum, multiply_add(load(sum), exp_nonpositive(gap(before, shift)), part * exp_nonpositive(gap(reference, shift))));
}

struct Larger {
  static inline Vec of(Vec a, Vec b) { return larger(a, b); }
};
struct Sum {
  static inline Vec of(Vec a, Vec b) { return a + b; }
};

// kLanes vectors, one for each row, reduced to the vector of the rows' results.
template <class Combine>
inline Vec across(const float* rows) {
  alignas(64) float turned[kLanes * kLanes];
  transpose(rows, kLanes, turned, kLanes);
  Vec result = load(turned);
  for (int i = 1; i < kLanes; ++i) result = Combine::of(load(turned + i * kLanes), result);
  return result;
}

struct SymmetricStatistic {
  const PairParams& p;
  const PairTask& task;
  int64_t first;  // row, of the batch entry
  PairLabels labels;
  float *row_maximum, *row_low, *row_sum;           // [rows of the task]
  float *column_maximum, *column_low, *column_sum;  // [columns of the task]
  float *lanes, *row_top, *row_rest;                // of a chunk's rows: maxima or sums by lanes, maxima, what these round off
  float *column_top, *column_rest, *column_shift, *column_part;  // of a block's columns in a chunk: the same, maxima where finite, sums
  bool rows_alone = false;                                       // nothing is found of columns

  template <class Product>
  void plan(Product, int64_t rows, int64_t columns, int64_t block, Arena& arena) {
    const int64_t row_words = rows + Product::kRowChunk, column_words = columns + kPanel, chunk = Product::kRowChunk + kLanes;
    row_maximum = arena.take(row_words), row_low = arena.take(row_words), row_sum = arena.take(row_words);
    column_maximum = arena.take(column_words), column_low = arena.take(column_words), column_sum = arena.take(column_words);
    lanes = arena.take(chunk * kLanes), row_top = arena.take(chunk), row_rest = arena.take(chunk);
    column_top = arena.take(block), column_rest = arena.take(block), column_shift = arena.take(block), column_part = arena.take(block);
    labels.halves.plan(block, arena);
  }

  void begin(int64_t row_words, int64_t column_words) const {
    for (int64_t i = 0; i < row_words; ++i) row_maximum[i] = -kInfinity, row_low[i] = row_sum[i] = 0;
    for (int64_t j = 0; j < column_words; ++j) column_maximum[j] = -kInfinity, column_low[j] = column_sum[j] = 0;
  }

  void begin_rows(int64_t row) { first = row; }

  void begin_block(const Block& block) {
    if (p.y_labels != nullptr) labels.begin_block(p.y_labels + task.batch * p.columns, block);
  }

  float multiplier(int64_t row) const { return multiplier_of(p.scale[task.batch * p.rows + first + row]); }

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    rows_alone ? take<false>(block, row, rows, tile) : take<true>(block, row, rows, tile);
  }

  template <bool kColumns>
  void take(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    leave_out(block, row, rows, tile);
    const bool near = maxima<kColumns>(block, row, rows, tile);
    if (near) {
      add<true, kColumns>(block, row, rows, tile);
    } else {
      rests<kColumns>(block, row, rows, tile);
      add<false, kColumns>(block, row, rows, tile);
    }
  }

  // Columns that do not exist, and pairs of equal labels.
  void leave_out(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    if (p.x_labels == nullptr && block.columns == block.padded) return;
    for (int64_t i = 0; i < rows; ++i) {
      const float replacement = score_left_out(multiplier(row + i));
      for (int64_t j = block.columns; j < block.padded; ++j) tile.scores(i)[j] = replacement;
      if (p.x_labels != nullptr) labels.leave_out(tile.scores(i), block.padded, p.x_labels[task.batch * p.rows + first + row + i], replacement);
    }
  }

  // Maxima of the tile's rows and columns, rounded; whether all of them are within reach of the largest, which is rounded by less than 1.
  template <bool kColumns>
  bool maxima(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    const Vec nothing = splat(-kInfinity);
    for (int64_t j = 0; kColumns && j < block.padded; j += kLanes) store(column_top + j, nothing);
    for (int64_t i = 0; i < rows; ++i) {
      const float* const scores = tile.scores(i);
      const Vec m = splat(multiplier(row + i));
      Vec best0 = nothing, best1 = nothing;
      for (int64_t j = 0; j < block.padded; j += 2 * kLanes) {
        const Vec z0 = m * load(scores + j), z1 = m * load(scores + j + kLanes);
        best0 = larger(z0, best0);
        best1 = larger(z1, best1);
        if constexpr (!kColumns) continue;
        store(column_top + j, larger(z0, load(column_top + j)));
        store(column_top + j + kLanes, larger(z1, load(column_top + j + kLanes)));
      }
      store(lanes + i * kLanes, larger(best0, best1));
    }
    for (int64_t i = rows; i < round_up(rows, kLanes); ++i) store(lanes + i * kLanes, nothing);
    for (int64_t i = 0; i < rows; i += kLanes) store(row_top + i, across<Larger>(lanes + i * kLanes));
    for (int64_t j = 0; kColumns && j < block.padded; j += kLanes) store(column_shift + j, finite_shift(load(column_top + j)));

    float most = -kInfinity, least = kInfinity;
    for (int64_t i = 0; i < rows; ++i) most = row_top[i] > most ? row_top[i] : most, least = row_top[i] < least ? row_top[i] : least;
    for (int64_t j = 0; kColumns && j < block.columns; ++j) least = column_top[j] < least ? column_top[j] : least;
    return most - least <= kReach && most < 0x1p24f && most > -0x1p24f;  // not for NaN, nor where nothing is left in
  }

  // What the maxima of rows and columns have been rounded by.
  template <bool kColumns>
  void rests(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    const auto finite = [](Vec rest) { return rest - rest == Vec{} ? rest : Vec{}; };
    for (int64_t j = 0; kColumns && j < block.padded; j += kLanes) store(column_rest + j, splat(-kInfinity));
    for (int64_t i = 0; i < rows; ++i) {
      const float* const scores = tile.scores(i);
      const Vec m = splat(multiplier(row + i)), shift = finite_shift(splat(row_top[i]));
      Vec best = splat(-kInfinity);
      for (int64_t j = 0; j < block.padded; j += kLanes) {
        const Vec score = load(scores + j);
        best = larger(multiply_add(score, m, -shift), best);
        if constexpr (kColumns) store(column_rest + j, larger(multiply_add(score, m, -load(column_shift + j)), load(column_rest + j)));
      }
      store(lanes + i * kLanes, best);
    }
    for (int64_t i = 0; i < rows; i += kLanes) store(row_rest + i, finite(across<Larger>(lanes + i * kLanes)));
    for (int64_t j = 0; kColumns && j < block.padded; j += kLanes) store(column_rest + j, finite(load(column_rest + j)));
  }

  // kNear: relative to the largest maximum of all. Else to each row's and each column's own.
  template <bool kNear, bool kColumns>
  void add(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    float most = row_top[0];
    for (int64_t i = 1; i < rows; ++i) most = row_top[i] > most ? row_top[i] : most;
    for (int64_t j = 0; kColumns && j < block.padded; j += kLanes) store(column_part + j, Vec{});
    for (int64_t i = 0; i < rows; ++i) {
      const float* const scores = tile.scores(i);
      const Vec m = splat(multiplier(row + i)), shift = kNear ? splat(most) : finite_shift(splat(row_top[i])), rest = kNear ? Vec{} : splat(row_rest[i]);
      Vec sum0 = {}, sum1 = {};
      for (int64_t j0 = 0; j0 < block.padded; j0 += kPanel) {
        Vec e[kVecs], of_column[kVecs];
        in_step(e, [&](int v) {
          const Vec score = load(scores + j0 + v * kLanes);
          return kNear ? multiply_add(score, m, -shift) : exponent(score, m, shift, rest);
        });
        exp_nonpositive(e, e);
        if constexpr (kColumns && !kNear) {
          in_step(of_column, [&](int v) {
            const int64_t j = j0 + v * kLanes;
            return exponent(load(scores + j), m, load(column_shift + j), load(column_rest + j));
          });
          exp_nonpositive(of_column, of_column);
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          float* const part = column_part + j0 + v * kLanes;
          if constexpr (kColumns) store(part, load(part) + (kNear ? e[v] : of_column[v]));
          (v % 2 == 0 ? sum0 : sum1) += e[v];
        }
      }
      store(lanes + i * kLanes, sum0 + sum1);
    }
    for (int64_t i = rows; i < round_up(rows, kLanes); ++i) store(lanes + i * kLanes, Vec{});
    const int64_t row_at = first + row - task.row_begin, column_at = block.first - task.column_begin;
    const auto reference = [&](const float* top, const float* rest) { return kNear ? Logits{splat(most), Vec{}} : Logits{load(top), load(rest)}; };
    for (int64_t i = 0; i < rows; i += kLanes) {
      const int64_t at = row_at + i;
      fold(row_maximum + at, row_low + at, row_sum + at, reference(row_top + i, row_rest + i), across<Sum>(lanes + i * kLanes));
    }
    for (int64_t j = 0; kColumns && j < block.padded; j += kLanes) {
      const int64_t at = column_at + j;
      fold(column_maximum + at, column_low + at, column_sum + at, reference(column_top + j, column_rest + j), load(column_part + j));
    }
  }

  void give(const SymmetricStatistics& out) const {
    const size_t rows = size_t(4 * (task.row_end - task.row_begin)), columns = size_t(4 * (task.column_end - task.column_begin));
    __builtin_memcpy(out.row_maximum, row_maximum, rows);
    __builtin_memcpy(out.row_low, row_low, rows);
    __builtin_memcpy(out.row_sum, row_sum, rows);
    if (rows_alone) return;
    __builtin_memcpy(out.column_maximum, column_maximum, columns);
    __builtin_memcpy(out.column_low, column_low, columns);
    __builtin_memcpy(out.column_sum, column_sum, columns);
  }
};

struct SymmetricWorkspace : PairWorkspace {
  template <class Product>
  SymmetricWorkspace(Product product, const PairParams& p, int64_t rows, int64_t columns, SymmetricStatistic& statistic, Arena& arena)
      : PairWorkspace(product, p, rows, columns, arena) {
    statistic.plan(product, rows, columns, block, arena);
  }
};

// ---- gradient -----------------------------------------------------------------------------------------------------------

// One side's L, in two floats, and g. Nothing left in (L = -inf): +inf, so that the weight is 0.
struct SymmetricSide {
  float *high, *low, *g, *near_g;

  void plan(int64_t count, Arena& arena) { high = arena.take(count), low = arena.take(count), g = arena.take(count), near_g = arena.take(count); }

  // Returns whether it is within reach of the centre.
  bool set(int64_t i, float lse, float lse_low, float upstream, double centre) const {
    const double distance = double(lse) + double(lse_low) - centre;
    high[i] = lse == -kInfinity ? kInfinity : lse;
    low[i] = lse_low;
    g[i] = upstream;
    const bool near = distance <= kReach && distance >= -kReach;
    near_g[i] = near ? float(double(upstream) * __builtin_exp(-distance)) : 0;
    return near;
  }
};

struct SymmetricWeights {
  static constexpr bool kKnowsIdle = false;
  const PairParams& p;
  const PairTask& task;
  const SymmetricUpstream& upstream;
  const PairSums& out;
  int64_t first;  // row, of the batch entry
  double centre;  // the reference a, a float: the mean of the rows' L
  bool block_near;
  PairLabels labels, classes;
  SymmetricSide row, column;
  float* multiplier;   // per row
  int32_t* near;       // per row
  float* column_pull;  // per column
  float* kept;         // a row's scores, where they meet their weights

  void plan(int64_t rows, int64_t block, Arena& arena) {
    row.plan(rows, arena), column.plan(block, arena);
    multiplier = arena.take(rows);
    near = reinterpret_cast<int32_t*>(arena.take(rows));
    labels.halves.plan(block, arena), classes.halves.plan(block, arena);
    column_pull = arena.take(block), kept = arena.take(block);
  }

  void begin() {
    double sum = 0, count = 0;
    for (int64_t i = task.row_begin; i < task.row_end; ++i) {
      const double lse = upstream.row_lse[task.batch * p.rows + i];
      if (lse - lse == 0) sum += lse, count += 1;
    }
    centre = double(float(count == 0 ? 0 : sum / count));
  }

  void begin_rows(int64_t begin, int64_t count) {
    first = begin;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = task.batch * p.rows + first + i;
      near[i] = row.set(i, upstream.row_lse[at], upstream.row_low[at], upstream.row_g[at], centre);
      multiplier[i] = multiplier_of(p.scale[at]);
    }
  }

  void begin_block(const Block& block) {
    block_near = true;
    for (int64_t j = 0; upstream.column_g != nullptr && j < block.columns; ++j) {
      const int64_t at = task.batch * p.columns + block.first + j;
      block_near &= column.set(j, upstream.column_lse[at], upstream.column_low[at], upstream.column_g[at], centre);
    }
    for (int64_t j = upstream.column_g != nullptr ? block.columns : 0; j < block.padded; ++j) column.set(j, -kInfinity, 0, 0, centre);
    const int64_t begin = task.batch * p.columns;
    if (p.y_labels != nullptr) labels.begin_block(p.y_labels + begin, block);
    if (upstream.column_class == nullptr) return;
    classes.begin_block(upstream.column_class + begin, block);
    __builtin_memcpy(column_pull, upstream.column_pull + begin + block.first, size_t(4 * block.columns));
    __builtin_memset(column_pull + block.columns, 0, size_t(4 * (block.padded - block.columns)));
  }

  void weigh(const Block& block, int64_t i, float* scores) const {
    if (p.x_labels != nullptr)
      labels.leave_out(scores, block.padded, p.x_labels[task.batch * p.rows + first + i], score_left_out(multiplier[i]));
    if (out.scores != nullptr) __builtin_memcpy(kept, scores, size_t(4 * block.columns));
    const Vec m = splat(multiplier[i]);
    if (block_near && near[i]) {
      const Vec shift = splat(-float(centre)), u = splat(row.near_g[i]);
      for (int64_t j = 0; j < block.padded; j += kPanel) {
        Vec e[kVecs];
        in_step(e, [&](int v) { return multiply_add(load(scores + j + v * kLanes), m, shift); });
        exp_nonpositive(e, e);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) store(scores + j + v * kLanes, e[v] * (u + load(column.near_g + j + v * kLanes)));
      }
    } else {
      const Vec high = splat(row.high[i]), low = splat(row.low[i]), g = splat(row.g[i]);
      for (int64_t j = 0; j < block.padded; j += kLanes) {
        const Vec of_row = exp_nonpositive(exponent(load(scores + j), m, high, low));
        const Vec of_column = exp_nonpositive(exponent(load(scores + j), m, load(column.high + j), load(column.low + j)));
        store(scores + j, multiply_add(g, of_row, load(column.g + j) * of_column));
      }
    }
    if (upstream.row_class != nullptr) attract(block, i, scores);
    if (out.scores != nullptr) add_scores(block, i, scores);
  }

  // Weights meet the scores they are made of, less what all of these share: where logits are large and alike, the roundings of weights that add up
  // to nothing, and of a sum of rows y_j beside one of most of the weight, would leave more of it than there is to find.
  void add_scores(const Block& block, int64_t i, float* weights) const {
    for (int64_t j = block.columns; j < block.padded; ++j) weights[j] = 0;
    const Vec level = splat(out.level);
    Vec sum = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec weight = load(weights + j), term = weight * (load(kept + j) - level);
      sum += (Vec)((IntVec)term & (weight != Vec{}));  // a pair left out has an infinite score
    }
    out.scores[task.batch * p.rows + first + i] += total(sum);
  }

  // Taken off each weight before the product: summed by themselves the two parts would lose the digits they share.
  void attract(const Block& block, int64_t i, float* weights) const {
    const int64_t at = task.batch * p.rows + first + i;
    const Vec pull = splat(upstream.row_pull[at]);
    classes.for_equal(block.padded, upstream.row_class[at], [&](int64_t j, IntVec equal) {
      const Vec weight = load(weights + j);
      store(weights + j, equal ? weight - (pull + load(column_pull + j)) : weight);
    });
    if (p.x_labels != nullptr) labels.leave_out(weights, block.padded, p.x_labels[at], 0);
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows and `columns` columns.
int64_t symmetric_workspace(const PairParams& p, int64_t rows, int64_t columns) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    SymmetricStatistic statistic{p, PairTask{}};
    SymmetricWorkspace(product, p, rows, columns, statistic, arena);
    return arena.words;
  });
}

void symmetric(const PairParams& p, const PairTask& task, const SymmetricStatistics& out, float* workspace) {
  const int64_t rows = task.row_end - task.row_begin, columns = task.column_end - task.column_begin;
  SymmetricStatistic statistic{p, task};
  statistic.rows_alone = out.column_sum == nullptr;
  with_sound_product(p.precision, [&](auto product) {
    Arena arena{workspace};
    SymmetricWorkspace w(product, p, rows, columns, statistic, arena);
    statistic.begin(rows + decltype(product)::kRowChunk, columns + kPanel);
    return take_statistics(product, p, task, w, statistic);
  });
  statistic.give(out);
}

struct SymmetricGradientWorkspace : PairGradientWorkspace {
  template <class Product>
  SymmetricGradientWorkspace(Product product, const PairParams& p, const PairSums& out, int64_t rows, int64_t columns, SymmetricWeights& weights,
                             Arena& arena)
      : PairGradientWorkspace(product, p, out.x_sums != nullptr, out.y_sums != nullptr, rows, columns, arena) {
    weights.plan(PairGradientWorkspace::rows, block, arena);
  }
};

int64_t symmetric_grad_workspace(const PairParams& p, const PairSums& out, int64_t rows, int64_t columns) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    SymmetricWeights weights{p, PairTask{}, SymmetricUpstream{}, out};
    SymmetricGradientWorkspace(product, p, out, rows, columns, weights, arena);
    return arena.words;
  });
}

void symmetric_grad(const PairParams& p, const PairTask& task, const SymmetricUpstream& upstream, const PairSums& out, float* workspace) {
  with_holding_product(p, task, [&](auto product) {
    Arena arena{workspace};
    SymmetricWeights weights{p, task, upstream, out};
    SymmetricGradientWorkspace w(product, p, out, task.row_end - task.row_begin, task.column_end - task.column_begin, weights, arena);
    weights.begin();
    take_gradients(product, p, task, out, w, weights);
  });
}

}  // namespace
