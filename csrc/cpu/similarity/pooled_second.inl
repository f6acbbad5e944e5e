// The second derivative of a softmax's log-sum-exp and pooled output: pooled_second.h states the moments and sums, which a rectangle makes
// of
//   S = Q K^T,   Z = s Q kappa^T + E K^T,   T = H V^T,   and where the values move  Y = H nu^T.
// Then rows += A K + B kappa, slopes += B K, pooled += (P Z) V + P nu and, of weights collected transposed as in pairs.inl,
// keys += A^T s Q + B^T E, values += (P Z)^T H.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/add_scaled.inl"
#include "similarity/moments.inl"
#include "similarity/softmax.inl"
#include "similarity/tangent_parts.inl"

namespace {

using kdfast::PooledSecondPart;
using kdfast::PooledSecondRows;
using kdfast::PooledSecondSums;
using kdfast::PooledSecondTask;
using kdfast::PooledTangent;

// What a call has of the values, which may be the keys.
struct ValuesOf {
  bool other, move;  // than the keys; along the direction
  ValuesOf(const SimilarityParams& p, const PooledTangent& t)
      : other(p.values.data != nullptr), move((other ? t.values_direction : t.keys_direction).data != nullptr) {}
};

inline float* values_sums(const SimilarityParams& p, const PooledSecondSums& out) {
  return p.values.data != nullptr ? out.values : out.keys;
}

struct PooledSecondWorkspace {
  int64_t rows, block, group;
  Rows queries, direction, upstream;
  Streamed keys, keys_direction = {}, values = {}, values_direction = {};
  Tile scores, rates, slopes, etas;
  ColumnTerms terms;
  float *multiplier, *high, *low, *scale;  // per row
  Sums row_sums, slope_sums, pooled_sums, key_sums, value_sums;
  GroupPanels query_panels, direction_panels, upstream_panels;
  TransposedWeights of_queries, of_direction, of_upstream;

  template <class Product>
  PooledSecondWorkspace(Product product, const SimilarityParams& p, const PooledTangent& t, const PooledSecondSums& out, int64_t row_count,
                        int64_t columns, PooledSecondPart part, Arena& arena) {
    constexpr int64_t kChunk = kPairChunk<Product>;
    const bool sums = part != PooledSecondPart::kMoments;
    const ValuesOf v(p, t);
    rows = rows_at_once<Product>(2 * p.width + p.pooled_width, row_count);
    const int64_t width = p.width > p.pooled_width ? p.width : p.pooled_width;
    block = part == PooledSecondPart::kBoth ? round_up(columns, kPanel)
                                            : smaller(kPairBlock<Product>, block_columns<Product>(columns, (3 * width + 1) / 2));
    group = smaller(kTransposedRows<Product>, round_up(rows, kPanel));
    queries.plan(product, rows, p.width, arena);
    direction.plan(product, rows, p.width, arena);
    upstream.plan(product, rows, p.pooled_width, arena);
    keys.panels.plan(product, p.width, block, true, sums, arena);
    if (t.keys_direction.data != nullptr) keys_direction.panels.plan(product, p.width, block, true, sums, arena);
    if (v.other) values.panels.plan(product, p.pooled_width, block, true, sums, arena);
    if (v.other && v.move) values_direction.panels.plan(product, p.pooled_width, block, true, sums, arena);
    scores.plan(product, kChunk, block, arena), rates.plan(product, kChunk, block, arena), slopes.plan(product, kChunk, block, arena);
    if (v.move) etas.plan(product, kChunk, block, arena);
    terms.plan(block, arena);
    const int64_t all = round_up(rows, kChunk);
    multiplier = arena.take(all), high = arena.take(all), low = arena.take(all), scale = arena.take(all);
    if (!sums) return;
    row_sums.plan(rows, p.width, arena);
    slope_sums.plan(out.slopes != nullptr ? rows : 0, p.width, arena);
    pooled_sums.plan(out.pooled != nullptr ? rows : 0, p.pooled_width, arena);
    const int64_t columns_summed = round_up(block, Product::kRowMultiple);
    if (out.keys != nullptr) {
      query_panels.plan(product, p.width, rows, group, arena);
      direction_panels.plan(product, p.width, rows, group, arena);
      of_queries.plan(product, columns_summed, group, arena);
      of_direction.plan(product, columns_summed, group, arena);
      key_sums.plan(columns_summed, p.width, arena);
    }
    if (values_sums(p, out) == nullptr) return;
    upstream_panels.plan(product, p.pooled_width, rows, group, arena);
    of_upstream.plan(product, columns_summed, group, arena);
    if (v.other) value_sums.plan(columns_summed, p.pooled_width, arena);
  }
};

template <class Product>
struct PooledSecondPass;
template <class Product>
constexpr int64_t kChunkRows<Product, PooledSecondPass<Product>> = kPairChunk<Product>;

// Up to rows_at_once rows, `first` .. `first + count` of the batch entry, through the task's columns.
template <class Product>
struct PooledSecondPass {
  const SimilarityParams& p;
  const PooledSecondTask& task;
  const PooledTangent& t;
  const PooledSecondSums& out;
  PooledSecondWorkspace& w;
  const int64_t first, count;

  int64_t padded_rows() const { return round_up(count, Product::kRowMultiple); }
  int64_t row_at(int64_t i) const { return task.rectangle.batch * p.rows + first + i; }
  int64_t column_at(const Block& block) const { return task.rectangle.batch * p.columns + block.first; }
  bool sums() const { return task.part != PooledSecondPart::kMoments; }
  bool of_keys() const { return sums() && out.keys != nullptr; }
  bool of_values() const { return sums() && values_sums(p, out) != nullptr; }
  const Panels& values() const { return w.values.matrix.data != nullptr ? w.values.panels : w.keys.panels; }
  bool values_move() const { return ValuesOf(p, t).move; }
  const Panels& values_direction() const {
    return w.values.matrix.data != nullptr ? w.values_direction.panels : w.keys_direction.panels;
  }

  void run() const {
    for (int64_t i = 0; i < round_up(count, kPairChunk<Product>); ++i) begin_row(i);
    if (sums()) {
      clear(w.row_sums, padded_rows());
      if (out.slopes != nullptr) clear(w.slope_sums, padded_rows());
      if (out.pooled != nullptr) clear(w.pooled_sums, padded_rows());
    }
    if (of_keys()) {
      w.query_panels.pack(Product{}, p.query, row_at(0), count);
      w.direction_panels.pack(Product{}, t.direction, row_at(0), count);
    }
    if (of_values()) w.upstream_panels.pack(Product{}, t.h, row_at(0), count);
    const PairTask& r = task.rectangle;
    stream_blocks(Product{}, w.block, padded_rows(), r.column_begin, r.column_end, *this, w.keys, w.keys_direction, w.values,
                  w.values_direction);
    for (int64_t i = 0; sums() && i < count; ++i) end_row(i);
  }

  static void clear(const Sums& s, int64_t rows) { __builtin_memset(s.at(0), 0, size_t(4 * rows * s.stride)); }

  // Rows that only fill the last tile, or the last of a chunk's runs, are zero, and have p = 0.
  void begin_row(int64_t i) const {
    const bool exists = i < count;
    const int64_t at = row_at(i);
    const float scale = exists ? p.scale[at] : 0;
    w.scale[i] = scale, w.multiplier[i] = __builtin_fabsf(scale);
    w.high[i] = exists ? above_nothing(t.lse[at]) : kInfinity, w.low[i] = exists ? t.lse_low[at] : 0;
    if (i >= padded_rows()) return;
    const auto pack = [&](const Rows& rows, const Matrix& matrix, int64_t width, bool negate) {
      if (!exists) return void(__builtin_memset(rows.at(i), 0, size_t(4 * rows.stride)));
      Packing<Product>::pack_row(matrix, at, width, negate, rows.at(i));
    };
    pack(w.queries, p.query, p.width, scale < 0);
    pack(w.direction, t.direction, p.width, false);
    pack(w.upstream, t.h, p.pooled_width, false);
  }

  void begin_block(const Block& block) const {
    w.terms.pack(p, task.rectangle.batch, block);
    const int64_t columns = round_up(block.columns, Product::kRowMultiple);
    if (of_keys()) clear(w.key_sums, columns);
    if (of_values() && ValuesOf(p, t).other) clear(w.value_sums, columns);
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    form_tiles(block, row, rows);
    for (int64_t i = 0; i < round_up(rows, 2 * kLanes); ++i) {
      if (row + i >= count) {
        for_tiles([&](const Tile& tile) { __builtin_memset(tile.scores(i), 0, size_t(4 * block.padded)); });
        continue;
      }
      next.fetch(row + i);
      weigh_row(block, row, i);
      if (task.part != PooledSecondPart::kSums) measure_row(block, row, i);
      if (sums()) differentiate_row(block, row, i);
    }
    if (!sums()) return;
    const int64_t in_group = row % w.group;
    if (of_keys()) {
      collect_transposed<Product>(w.scores, rows, block.padded, w.scale + row, w.of_queries.words, w.of_queries.stride, in_group);
      collect_transposed<Product>(w.slopes, rows, block.padded, nullptr, w.of_direction.words, w.of_direction.stride, in_group);
    }
    if (of_values())
      collect_transposed<Product>(w.rates, rows, block.padded, nullptr, w.of_upstream.words, w.of_upstream.stride, in_group);
    sum_for_rows(block, row, rows);
    if (in_group + rows == w.group || row + rows == padded_rows()) sum_for_columns(block, row - in_group, in_group + rows);
  }

  template <class F>
  void for_tiles(const F& f) const {
    f(w.scores), f(w.rates), f(w.slopes);
    if (values_move()) f(w.etas);
  }

  // What a key that is not there is scored by a row that holds inf must not be NaN.
  void form_tiles(const Block& block, int64_t row, int64_t rows) const {
    const auto score = [&](const Rows& of, const Panels& panels, const Tile& to) {
      score_rows(Product{}, of.at(row), of.stride, rows, panels, block.padded, to.scores(0), to.stride);
    };
    score(w.queries, w.keys.panels, w.scores);
    rate_rows(Product{}, w.queries.at(row), w.queries.stride, w.direction.at(row), w.direction.stride, rows, w.multiplier + row, w.keys,
              w.keys_direction, block.padded, w.rates);
    score(w.upstream, values(), w.slopes);
    if (values_move()) score(w.upstream, values_direction(), w.etas);
    for_tiles([&](const Tile& tile) {
      for (int64_t i = 0; &tile != &w.scores && i < rows; ++i)
        __builtin_memset(tile.scores(i) + block.columns, 0, size_t(4 * (block.padded - block.columns)));
    });
  }

  // p in place of row `i` of the chunk's scores.
  void weigh_row(const Block& block, int64_t row, int64_t i) const {
    float* const scores = w.scores.scores(i);
    const int64_t at = row + i;
    const RowLevel level{w.terms.exclude(p, row_at(at), block, scores, w.multiplier[at]), w.high[at], w.low[at]};
    for (int64_t j = 0; j < block.padded; j += kPanel) {
      Vec weight[kVecs];
      level.exponents_of(scores + j, weight);
      exp_nonpositive(weight, weight);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store(scores + j + v * kLanes, weight[v]);
    }
  }

  void measure_row(const Block& block, int64_t row, int64_t i) const {
    const float* const etas = values_move() ? w.etas.scores(i) : nullptr;
    const RowMoments found = moments_of(w.scores.scores(i), w.rates.scores(i), w.slopes.scores(i), etas, block.padded);
    if (!(found.mass < 0x1p-100)) merge(out.moments[row_at(row + i)], found);
  }

  // A, p rate, B and, where the values move, p in place of p, the rates, the slopes and the etas.
  void differentiate_row(const Block& block, int64_t row, int64_t i) const {
    float *const scores = w.scores.scores(i), *const rates = w.rates.scores(i), *const slopes = w.slopes.scores(i);
    float* const etas = values_move() ? w.etas.scores(i) : nullptr;
    const int64_t at = row_at(row + i);
    const RowMoments& m = out.moments[at];
    const float rate = float(m.rate), slope = float(m.slope), eta = float(m.eta);
    const Vec whole = splat(m.mass == 0 ? 0 : float(1 / m.mass)), g = splat(t.g[at]);
    const Vec rate0 = splat(rate), slope0 = splat(slope), eta0 = splat(eta);
    const Vec rate1 = splat(float(m.rate - rate)), slope1 = splat(float(m.slope - slope)), rest = splat(float(m.eta - eta + m.covariance));
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec weight = load(scores + j) * whole, moved = load(rates + j) - rate0 - rate1, c = g + (load(slopes + j) - slope0 - slope1);
      Vec change = -rest;
      if (etas != nullptr) {
        change = load(etas + j) - eta0 - rest;
        store(etas + j, weight);
      }
      store(scores + j, weight * multiply_add(c, moved, change));
      store(rates + j, weight * moved);
      store(slopes + j, weight * c);
    }
  }

  void sum_for_rows(const Block& block, int64_t row, int64_t rows) const {
    const bool moves = w.keys_direction.matrix.data != nullptr;
    for_tiles([&](const Tile& tile) { store_all_weights<Product>(tile, rows, block.padded); });
    const auto sum = [&](const Tile& weights, const Panels& panels, const Sums& to) {
      sum_rows(Product{}, weights.weights(0), weights.stride, rows, block.columns, panels, AddTile{to.at(row), to.stride});
    };
    sum(w.scores, w.keys.panels, w.row_sums);
    if (moves) sum(w.slopes, w.keys_direction.panels, w.row_sums);
    if (out.slopes != nullptr) sum(w.slopes, w.keys.panels, w.slope_sums);
    if (out.pooled == nullptr) return;
    sum(w.rates, values(), w.pooled_sums);
    if (values_move()) sum(w.etas, values_direction(), w.pooled_sums);
  }

  // For the group of `rows` rows from `row` on; after the last group the block's sums are added to the call's.
  void sum_for_columns(const Block& block, int64_t row, int64_t rows) const {
    const int64_t exist = smaller(rows, count - row), at = column_at(block);
    const bool last = row + rows >= padded_rows(), other = ValuesOf(p, t).other;
    const auto give = [&](const Sums& sums, float* to, int64_t width) {
      for (int64_t j = 0; last && j < block.columns; ++j) add_row(to + (at + j) * width, sums.at(j), width);
    };
    if (of_keys()) {
      sum_for_keys(Product{}, block, w.of_queries, exist, w.query_panels.at(row), w.key_sums);
      sum_for_keys(Product{}, block, w.of_direction, exist, w.direction_panels.at(row), w.key_sums);
    }
    if (of_values()) sum_for_keys(Product{}, block, w.of_upstream, exist, w.upstream_panels.at(row), other ? w.value_sums : w.key_sums);
    if (of_keys()) give(w.key_sums, out.keys, p.width);
    if (of_values() && other) give(w.value_sums, out.values, p.pooled_width);
  }

  void end_row(int64_t i) const {
    const int64_t at = row_at(i);
    add_row(out.rows + at * p.width, w.row_sums.at(i), p.width);
    if (out.pooled != nullptr) add_row(out.pooled + at * p.pooled_width, w.pooled_sums.at(i), p.pooled_width);
    if (out.slopes != nullptr) add_row(out.slopes + at * p.width, w.slope_sums.at(i), p.width);
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

int64_t pooled_second_workspace(const SimilarityParams& p, const PooledTangent& t, const PooledSecondSums& out, int64_t rows,
                                int64_t columns, PooledSecondPart part) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    PooledSecondWorkspace(product, p, t, out, rows, columns, part, arena);
    return arena.words;
  });
}

void pooled_second(const SimilarityParams& p, const PooledSecondTask& task, const PooledTangent& t, const PooledSecondSums& out,
                   float* workspace) {
  const PairTask& r = task.rectangle;
  const auto of_entry = [&](const Matrix& x, int64_t stride) { return x.data != nullptr ? x.from(r.batch * stride) : x; };
  const Matrix keys = of_entry(p.keys, p.keys_batch_stride), keys_direction = of_entry(t.keys_direction, t.keys_direction_batch_stride);
  const Matrix values = of_entry(p.values, p.values_batch_stride);
  const Matrix values_direction = values.data != nullptr ? of_entry(t.values_direction, t.values_direction_batch_stride) : Matrix{};
  const auto run = [&](auto product) {
    using Product = decltype(product);
    Arena arena{workspace};
    PooledSecondWorkspace w(product, p, t, out, r.row_end - r.row_begin, r.column_end - r.column_begin, task.part, arena);
    w.keys.matrix = keys, w.keys_direction.matrix = keys_direction, w.values.matrix = values, w.values_direction.matrix = values_direction;
    const bool sums = task.part != PooledSecondPart::kMoments;
    if (sums && out.keys != nullptr) w.of_queries.clear(), w.of_direction.clear();
    if (sums && values_sums(p, out) != nullptr) w.of_upstream.clear();
    [[maybe_unused]] typename Product::Session session;
    for (int64_t row = r.row_begin; row < r.row_end; row += w.rows)
      PooledSecondPass<Product>{p, task, t, out, w, row, smaller(w.rows, r.row_end - row)}.run();
  };
  with_holding_product(p.precision, run, [&] {
    const int64_t rows = r.batch * p.rows;
    const auto finite_rows = [&](const Matrix& x, int64_t width) { return all_finite(x, rows + r.row_begin, rows + r.row_end, width); };
    const auto finite_columns = [&](const Matrix& x, int64_t width) {
      return x.data == nullptr || all_finite(x, r.column_begin, r.column_end, width);
    };
    return finite_rows(p.query, p.width) && finite_rows(t.direction, p.width) && finite_rows(t.h, p.pooled_width) &&
           finite_columns(keys, p.width) && finite_columns(keys_direction, p.width) && finite_columns(values, p.pooled_width) &&
           finite_columns(values_direction, p.pooled_width);
  });
}

void pooled_second_directions(const SimilarityParams& p, const PooledSecondRows& r, int64_t begin, int64_t end) {
  with_elements(p.query, [&](const auto* queries) {
    for (int64_t row = begin; row < end; ++row) {
      float* const e = r.direction + row * p.width;
      __builtin_memset(e, 0, size_t(4 * p.width));
      if (r.scale_direction != nullptr) add_scaled(e, r.scale_direction[row], queries + row * p.width, p.width);
      if (r.query_direction.data == nullptr) continue;
      with_elements(r.query_direction, [&](const auto* u) { add_scaled(e, p.scale[row], u + row * p.width, p.width); });
    }
  });
}

// dquery = s rows + sigma slopes, dscale = q.rows + u.slopes
void pooled_second_finish(const SimilarityParams& p, const PooledSecondSums& out, const PooledSecondRows& r, int64_t begin, int64_t end) {
  const auto inner = [&](const Matrix& x, int64_t row, const float* y) {
    Vec sum = {};
    with_elements(x, [&](const auto* elements) {
      for (int64_t d = 0; d < p.width; d += kLanes)
        sum = multiply_add(load_row(elements + row * p.width, d, p.width), load_row(y, d, p.width), sum);
    });
    return total(sum);
  };
  for (int64_t row = begin; row < end; ++row) {
    const float* const rows = out.rows + row * p.width;
    const float* const slopes = out.slopes != nullptr ? out.slopes + row * p.width : nullptr;
    r.dg[row] = float(out.moments[row].rate);
    if (r.dscale != nullptr)
      r.dscale[row] = inner(p.query, row, rows) + (r.query_direction.data != nullptr ? inner(r.query_direction, row, slopes) : 0);
    float* const dquery = r.dquery + row * p.width;
    __builtin_memset(dquery, 0, size_t(4 * p.width));
    add_scaled(dquery, p.scale[row], rows, p.width);
    if (r.scale_direction != nullptr) add_scaled(dquery, r.scale_direction[row], slopes, p.width);
  }
}

}  // namespace
