// Functions of the distances of all pairs, summed with their gradients in one pass: never N x M numbers.
//
// A tile of scores x_i.y_j gives q = |x_i|^2 + |y_j|^2 - 2 x_i.y_j; a function makes values of them and in place of the scores
// weights W = -2 df/dq, so that
//   d/dx_i sum_j f(q_ij) = sum_j W_ij (y_j - x_i) = sum_j W_ij y_j - x_i sum_j W_ij,
// 4 N M D in all. A function may use the same pair's distance between two other rows, the teacher's: 2 N M D' more.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "relations/pair_sums.h"
#include "relations/smooth_l1.inl"
#include "similarity/pairs.inl"
#include "engine/vector_math.h"
#include "triplet/metric.inl"

namespace {

using kdfast::PairResults;
using kdfast::PairSide;
using kdfast::PairSumParams;

// What a function makes of pairs, and the sums of one row over the columns of a block.
struct PairTerms {
  Vec value, second, weight;

  void add(const PairTerms& t) { value += t.value, second += t.second, weight += t.weight; }
  // Only the first `count` lanes.
  PairTerms first(int64_t count) const {
    IntVec kept = {};
    for (int64_t k = 0; k < count; ++k) kept[k] = -1;
    return {(Vec)((IntVec)value & kept), (Vec)((IntVec)second & kept), (Vec)((IntVec)weight & kept)};
  }
};

// x with 0 in a lane.
inline Vec without(Vec x, int64_t lane) {
  IntVec kept;
  for (int64_t k = 0; k < kLanes; ++k) kept[k] = k == lane ? 0 : -1;
  return (Vec)((IntVec)x & kept);
}

struct PairSumWorkspace {
  int64_t rows, block;
  Rows x, teacher_rows;
  Streamed y, teacher;
  Sums sums;
  Tile tile, teacher_tile;
  float *y_square, *teacher_square;  // of a block
  double* weight;                    // of the rows, sum_j W_ij

  template <class Product>
  PairSumWorkspace(Product product, const PairSumParams& p, bool summed, int64_t row_count, Arena& arena) {
    const bool taught = p.teacher.width > 0;
    rows = rows_at_once<Product>(p.side.width + p.teacher.width, row_count);
    block = block_columns<Product>(p.columns, p.side.width + p.teacher.width);
    x.plan(product, rows, p.side.width, arena);
    y.panels.plan(product, p.side.width, block, true, summed, arena);
    sums.plan(summed ? rows : 0, p.side.width, arena);
    tile.plan(product, rows, block, arena);
    y_square = arena.take(block);
    weight = reinterpret_cast<double*>(arena.take(2 * rows));
    y.matrix = p.side.y, teacher.matrix = p.teacher.y;
    if (!taught) return;
    teacher_rows.plan(product, rows, p.teacher.width, arena);
    teacher.panels.plan(product, p.teacher.width, block, true, false, arena);
    teacher_tile.plan(product, rows, block, arena);
    teacher_square = arena.take(block);
  }
};

// Rows `first` .. `first + count` through all columns. A Function has
//   PairTerms of(q, teacher's q)
template <class Product, class Function>
struct PairSumPass {
  const PairSumParams& p;
  const PairResults& out;
  PairSumWorkspace& w;
  const int64_t first, count;
  const Function& function;

  // Rows of one number: their gradients are summed as they are, where other rows' weights are.
  bool lone() const { return p.side.width == 1; }
  bool taught() const { return w.teacher.matrix.data != nullptr; }

  void pack(const Rows& to, const PairSide& side) const {
    const int64_t padded = round_up(count, Product::kRowMultiple);
    for (int64_t i = 0; i < count; ++i) Packing<Product>::pack_row(side.x, first + i, side.width, false, to.at(i));
    __builtin_memset(to.at(count), 0, size_t(4 * (padded - count) * to.stride));
  }

  void run() const {
    const int64_t padded = round_up(count, Product::kRowMultiple);
    pack(w.x, p.side);
    if (taught()) pack(w.teacher_rows, p.teacher);
    for (int64_t i = 0; i < count; ++i) out.value[first + i] = out.second[first + i] = w.weight[i] = 0;
    if (out.gradient != nullptr) __builtin_memset(w.sums.at(0), 0, size_t(4 * padded * w.sums.stride));
    stream_blocks(Product{}, w.block, padded, 0, p.columns, *this, w.y, w.teacher);
    if (out.gradient == nullptr) return;
    if (lone()) {
      for (int64_t i = 0; i < count; ++i) out.gradient[first + i] = float(w.weight[i]);
      return;
    }
    const float* const x = static_cast<const float*>(p.side.x.data);
    for (int64_t i = 0; i < count; ++i) {  // both products rounded alike: nothing is left of a pair that coincides
      const Vec weight = splat(float(w.weight[i]));
      for (int64_t d = 0; d < p.side.width; d += kLanes) {
        const int64_t at = (first + i) * p.side.width;
        store_row(out.gradient + at, d, p.side.width, load(w.sums.at(i) + d) - scaled(load_row(x + at, d, p.side.width), weight));
      }
    }
  }

  static void copy_squares(const float* squares, const Block& block, float* to) {
    for (int64_t j = 0; j < block.padded; ++j) to[j] = j < block.columns ? squares[block.first + j] : 0;
  }
  void begin_block(const Block& block) const {
    copy_squares(p.side.y_square, block, w.y_square);
    if (taught()) copy_squares(p.teacher.y_square, block, w.teacher_square);
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    score_rows(Product{}, w.x.at(row), w.x.stride, rows, w.y.panels, block.padded, w.tile.scores(0), w.tile.stride);
    if (taught())
      score_rows(Product{}, w.teacher_rows.at(row), w.teacher_rows.stride, rows, w.teacher.panels, block.padded, w.teacher_tile.scores(0),
                 w.teacher_tile.stride);
    for (int64_t i = 0; i < rows; ++i) {
      next.fetch(row + i);
      if (row + i < count && lone()) weigh<true>(block, row + i, w.tile.scores(i), w.teacher_tile.scores(i));
      else if (row + i < count) weigh<false>(block, row + i, w.tile.scores(i), w.teacher_tile.scores(i));
      else __builtin_memset(w.tile.scores(i), 0, size_t(4 * block.padded));
    }
    if (out.gradient == nullptr || lone()) return;
    if constexpr (!__is_same(Product, Float32Product)) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < block.padded; j += 2 * kLanes)
          Packing<Product>::store_weights(w.tile.weights(i), j, load(w.tile.scores(i) + j), load(w.tile.scores(i) + j + kLanes));
    }
    sum_rows(Product{}, w.tile.weights(0), w.tile.stride, rows, block.columns, w.y.panels, AddTile{w.sums.at(row), w.sums.stride});
  }

  // x_i - y_j of rows of one number. Many pairs are nearer than inner products tell, and a mean of distances counts them all; their
  // weights 1 / d, up to 10^7, would cancel in the sums.
  Vec on_a_line(const PairSide& side, const Block& block, int64_t i, int64_t j) const {
    const Vec x = splat(static_cast<const float*>(side.x.data)[first + i]);
    return x - load_row(static_cast<const float*>(side.y.data) + block.first, j, block.columns);
  }
  static Vec squared(Vec x) { return x * x; }

  template <bool kLone>
  void weigh(const Block& block, int64_t i, float* scores, float* teacher_scores) const {
    const int64_t own = first + i - block.first;
    const bool has_own = p.same && own >= 0 && own < block.columns;
    const float square = p.side.x_square[first + i], teacher_square = taught() ? p.teacher.x_square[first + i] : 0;
    const int64_t own_vector = has_own ? own - own % kLanes : -1;
    if (has_own) scores[own] = square;  // q is then exactly 0
    if (has_own && taught()) teacher_scores[own] = teacher_square;
    PairTerms sums = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec q = kLone ? squared(on_a_line(p.side, block, i, j))
                          : squared_distance(load(scores + j), splat(square), load(w.y_square + j));
      Vec other = {};
      if (taught())
        other = p.teacher.width == 1 ? squared(on_a_line(p.teacher, block, i, j))
                                     : squared_distance(load(teacher_scores + j), splat(teacher_square), load(w.teacher_square + j));
      PairTerms terms = function.of(q, other);
      if (kLone) terms.weight *= -on_a_line(p.side, block, i, j);
      if (j + kLanes > block.columns) terms = terms.first(block.columns - j);
      if (j == own_vector) terms.weight = without(terms.weight, own - j);  // of x_i - x_i; left in, it would round the others off
      sums.add(terms);
      store(scores + j, terms.weight);
    }
    out.value[first + i] += double(sum_lanes(sums.value));
    out.second[first + i] += double(sum_lanes(sums.second));
    w.weight[i] += double(sum_lanes(sums.weight));
  }
};

// ---- the functions ------------------------------------------------------------------------------------------------------------

// Gaussian kernels: f = sum_s exp(-q / 2 sigma_s^2), W = sum_s exp(-q / 2 sigma_s^2) / sigma_s^2.
struct Gaussians {
  int64_t count;
  const float *rate, *weight;  // [count]: -log2e / 2 sigma^2, 1 / sigma^2

  PairTerms of(Vec q, Vec) const {
    PairTerms terms = {};
    for (int64_t s = 0; s < count; ++s) {
      const Vec kernel = exp2_nonpositive(q * splat(rate[s]));
      terms.value += kernel;
      terms.weight = multiply_add(kernel, splat(weight[s]), terms.weight);
    }
    return terms;
  }
};

// 1 / d, 0 where d is 0.
inline Vec inverse_distance(Vec q) {
  const Vec inverse = splat(1.0f) / root(q);
  return q == Vec{} ? Vec{} : inverse;
}

// Distances: f = d, W = -1 / d, and how many are not 0.
struct Distances {
  PairTerms of(Vec q, Vec) const { return {root(q), q == Vec{} ? Vec{} : splat(1.0f), -inverse_distance(q)}; }
};

// Relational distillation by distances: f = smooth_l1(d / mean, d' / mean'); beside f' d, and W = -f' / d without the factor 1 / mean.
struct DistanceLosses {
  float inverse_mean, teacher_inverse_mean;

  PairTerms of(Vec q, Vec teacher_q) const {
    const Vec d = root(q), wanted = root(teacher_q) * splat(teacher_inverse_mean);
    Vec slope;
    const Vec loss = smooth_l1(multiply_add(d, splat(inverse_mean), -wanted), &slope);
    return {loss, slope * d, -slope * inverse_distance(q)};
  }
};

// ---- the entries of the dispatch table ------------------------------------------------------------------------------------------

void row_squares(const float* x, int64_t rows, int64_t width, float* to) {
  for (int64_t i = 0; i < rows; ++i) to[i] = row_square(x + i * width, width);
}

// Floats, for calls of at most `rows` rows.
int64_t pair_sums_workspace(const PairSumParams& p, bool gradient, int64_t rows) {
  return scratch_words(Precision::kFloat32, [&](auto product) {
    Arena arena{nullptr};
    const PairSumWorkspace w(product, p, gradient, rows, arena);
    return arena.words;
  });
}

template <class Function>
inline void sum_pairs(const PairSumParams& p, const Function& function, const PairResults& out, int64_t begin, int64_t end, float* workspace) {
  const auto finite = [&](const PairSide& side) {
    return side.width == 0 || (all_finite(side.x, begin, end, side.width) && all_finite(side.y, 0, p.columns, side.width));
  };
  const auto run = [&](auto product) {
    using Product = decltype(product);
    [[maybe_unused]] typename Product::Session session;
    Arena arena{workspace};
    PairSumWorkspace w(product, p, out.gradient != nullptr, end - begin, arena);
    for (int64_t row = begin; row < end; row += w.rows)
      PairSumPass<Product, Function>{p, out, w, row, smaller(w.rows, end - row), function}.run();
  };
  if (finite(p.side) && finite(p.teacher)) {
    with_product(Precision::kFloat32, run);
  } else {
    run(Float32Product{});
  }
}

void pair_gaussians(const PairSumParams& p, int64_t count, const float* rate, const float* weight, const PairResults& out, int64_t begin,
                    int64_t end, float* workspace) {
  sum_pairs(p, Gaussians{count, rate, weight}, out, begin, end, workspace);
}

void pair_distances(const PairSumParams& p, const PairResults& out, int64_t begin, int64_t end, float* workspace) {
  sum_pairs(p, Distances{}, out, begin, end, workspace);
}

void pair_distance_losses(const PairSumParams& p, float inverse_mean, float teacher_inverse_mean, const PairResults& out, int64_t begin,
                          int64_t end, float* workspace) {
  sum_pairs(p, DistanceLosses{inverse_mean, teacher_inverse_mean}, out, begin, end, workspace);
}

}  // namespace
