// The second derivative of a softmax over a bank that moves too: tangent.h states the sums, which rows and keys take from the same tiles.
//
// Scores S = Q K^T and rates Z = E K^T + s Q kappa^T of a chunk of rows and a block of keys make P and A = P (Z + slope); then rows += A K, and, of
// weights collected transposed as in pairs.inl, keys += (f A + g P)^T s Q + (f P)^T E: 12 N M D in all.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/large_shares.inl"
#include "similarity/tangent.h"
#include "similarity/tangent_parts.inl"

namespace {

using kdfast::TangentSums;
using kdfast::TangentUpstream;

struct TangentWorkspace {
  int64_t rows, block, group;
  Rows queries, direction;
  GroupPanels query_panels, direction_panels;
  Streamed keys, keys_direction = {};
  Sums row_sums, key_sums;
  Tile tile, rates;
  TransposedWeights of_queries, of_direction;
  ColumnTerms terms;
  float *multiplier, *high, *low;                 // per row
  float *of_rate, *of_weight, *of_own;            // per row: f s, g s, f
  float *mass, *total, *rests;                    // per row, by lanes; rests: of both, as grow has them

  template <class Product>
  TangentWorkspace(Product product, const SimilarityParams& p, const TangentUpstream& u, bool want_keys, int64_t row_count, int64_t columns,
                   Arena& arena) {
    constexpr int64_t kChunk = kPairChunk<Product>;
    rows = rows_at_once<Product>(2 * p.width, row_count);
    block = smaller(kPairBlock<Product>, block_columns<Product>(columns, (3 * p.width + 1) / 2));
    group = smaller(kTransposedRows<Product>, round_up(rows, kPanel));
    queries.plan(product, rows, p.width, arena);
    direction.plan(product, rows, p.width, arena);
    keys.panels.plan(product, p.width, block, true, true, arena);
    if (u.keys_direction.data != nullptr) keys_direction.panels.plan(product, p.width, block, true, false, arena);
    row_sums.plan(rows, p.width, arena);
    tile.plan(product, kChunk, block, arena);
    rates.plan(product, kChunk, block, arena);
    terms.plan(block, arena);
    const int64_t all = round_up(rows, kChunk);
    multiplier = arena.take(all), high = arena.take(all), low = arena.take(all);
    mass = arena.take(rows * kLanes), total = arena.take(rows * kLanes), rests = arena.take(2 * rows * kLanes);
    if (!want_keys) return;
    of_rate = arena.take(all), of_weight = arena.take(all), of_own = arena.take(all);
    query_panels.plan(product, p.width, rows, group, arena);
    direction_panels.plan(product, p.width, rows, group, arena);
    const int64_t sums = round_up(block, Product::kRowMultiple);
    key_sums.plan(sums, p.width, arena);
    of_queries.plan(product, sums, group, arena);
    of_direction.plan(product, sums, group, arena);
  }
};

template <class Product>
struct TangentPass;
template <class Product>
constexpr int64_t kChunkRows<Product, TangentPass<Product>> = kPairChunk<Product>;

// Up to rows_at_once rows, `first` .. `first + count` of the batch entry, through the task's columns.
template <class Product>
struct TangentPass {
  const SimilarityParams& p;
  const PairTask& task;
  const TangentUpstream& u;
  const TangentSums& out;
  TangentWorkspace& w;
  const int64_t first, count;

  int64_t padded_rows() const { return round_up(count, Product::kRowMultiple); }
  int64_t row_at(int64_t i) const { return task.batch * p.rows + first + i; }

  void run() const {
    for (int64_t i = 0; i < round_up(count, kPairChunk<Product>); ++i) begin_row(i);
    __builtin_memset(w.row_sums.at(0), 0, size_t(4 * padded_rows() * w.row_sums.stride));
    if (out.keys != nullptr) {
      w.query_panels.pack(Product{}, p.query, row_at(0), count);
      w.direction_panels.pack(Product{}, u.direction, row_at(0), count);
    }
    stream_blocks(Product{}, w.block, padded_rows(), task.column_begin, task.column_end, *this, w.keys, w.keys_direction);
    for (int64_t i = 0; i < count; ++i) end_row(i);
  }

  // Rows that only fill the last tile, or the last of a chunk's runs, are zero, and have p = 0.
  void begin_row(int64_t i) const {
    const bool exists = i < count;
    const int64_t at = row_at(i);
    const float scale = exists ? p.scale[at] : 0;
    w.multiplier[i] = __builtin_fabsf(scale);
    w.high[i] = exists ? above_nothing(u.lse[at]) : kInfinity;
    w.low[i] = exists ? u.lse_low[at] : 0;
    if (out.keys != nullptr) {
      const float of_rate = exists ? u.of_rate[at] : 0;
      w.of_rate[i] = of_rate * scale, w.of_weight[i] = exists ? u.of_weight[at] * scale : 0, w.of_own[i] = of_rate;
    }
    if (i >= padded_rows()) return;
    __builtin_memset(w.mass + i * kLanes, 0, 4 * kLanes);
    __builtin_memset(w.total + i * kLanes, 0, 4 * kLanes);
    __builtin_memset(w.rests + 2 * i * kLanes, 0, 2 * 4 * kLanes);
    if (exists) {
      Packing<Product>::pack_row(p.query, at, p.width, scale < 0, w.queries.at(i));
      Packing<Product>::pack_row(u.direction, at, p.width, false, w.direction.at(i));
    } else {
      __builtin_memset(w.queries.at(i), 0, size_t(4 * w.queries.stride));
      __builtin_memset(w.direction.at(i), 0, size_t(4 * w.direction.stride));
    }
  }

  void begin_block(const Block& block) const {
    w.terms.pack(p, task.batch, block);
    if (out.keys != nullptr) __builtin_memset(w.key_sums.at(0), 0, size_t(4 * round_up(block.columns, Product::kRowMultiple) * w.key_sums.stride));
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    score_rows(Product{}, w.queries.at(row), w.queries.stride, rows, w.keys.panels, block.padded, w.tile.scores(0), w.tile.stride);
    rate_rows(Product{}, w.queries.at(row), w.queries.stride, w.direction.at(row), w.direction.stride, rows, w.multiplier + row, w.keys,
              w.keys_direction, block.padded, w.rates);
    for (int64_t i = row; i < row + round_up(rows, 2 * kLanes); ++i) {
      if (i < row + rows) next.fetch(i);
      weigh_row(block, i, row);
    }
    if (out.keys != nullptr) collect(block, row, rows);
    store_all_weights<Product>(w.rates, rows, block.padded);
    sum_rows(Product{}, w.rates.weights(0), w.rates.stride, rows, block.columns, w.keys.panels, AddTile{w.row_sums.at(row), w.row_sums.stride});
    if (out.keys == nullptr) return;
    const int64_t in_group = row % w.group + rows, group = row + rows - in_group;
    const bool last = row + rows == padded_rows();
    if (in_group == w.group || last) {
      const int64_t exist = smaller(in_group, count - group);
      sum_for_keys(Product{}, block, w.of_queries, exist, w.query_panels.at(group), w.key_sums);
      sum_for_keys(Product{}, block, w.of_direction, exist, w.direction_panels.at(group), w.key_sums);
    }
    if (last) end_block(block);
  }

  // P in place of the scores, A in place of the rates.
  void weigh_row(const Block& block, int64_t i, int64_t row) const {
    float *const scores = w.tile.scores(i - row), *const rates = w.rates.scores(i - row);
    if (i >= count) {
      __builtin_memset(scores, 0, size_t(4 * block.padded));
      __builtin_memset(rates, 0, size_t(4 * block.padded));
      return;
    }
    // what a key that is not there is scored by a row that holds inf
    __builtin_memset(rates + block.columns, 0, size_t(4 * (block.padded - block.columns)));
    const RowLevel level{w.terms.exclude(p, row_at(i), block, scores, w.multiplier[i]), w.high[i], w.low[i]};
    const Vec slope = splat(u.slope[row_at(i)]);
    Vec mass = {}, sum = {}, most = {};
    for (int64_t j0 = 0; j0 < block.padded; j0 += kPanel) {
      Vec weight[kVecs];
      level.exponents_of(scores + j0, weight);
      exp_nonpositive(weight, weight);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const int64_t j = j0 + v * kLanes;
        const Vec moved = weight[v] * (slope + load(rates + j));
        mass += weight[v];
        sum += moved;
        most = larger(weight[v], most);
        store(scores + j, weight[v]);
        store(rates + j, moved);
      }
    }
    grow(w.mass + i * kLanes, w.rests + 2 * i * kLanes, splat(1), mass);
    grow(w.total + i * kLanes, w.rests + (2 * i + 1) * kLanes, splat(1), sum);
    if (out.keys != nullptr) note_large(out.large, row_at(i), block, scores, most);
  }

  // The chunk's weights of directions and, in place of P, of queries: transposed.
  void collect(const Block& block, int64_t row, int64_t rows) const {
    const int64_t at = row % w.group;
    collect_transposed<Product>(w.tile, rows, block.padded, w.of_own + row, w.of_direction.words, w.of_direction.stride, at);
    for (int64_t i = 0; i < round_up(rows, 2 * kLanes); ++i) {
      float *const p = w.tile.scores(i), *const a = w.rates.scores(i);
      const Vec f = splat(w.of_rate[row + i]), g = splat(w.of_weight[row + i]);
      for (int64_t j = 0; j < block.padded; j += kLanes) store(p + j, multiply_add(load(a + j), f, load(p + j) * g));
    }
    collect_transposed<Product>(w.tile, rows, block.padded, nullptr, w.of_queries.words, w.of_queries.stride, at);
  }

  void end_block(const Block& block) const {
    float* const to = out.keys + (task.batch * p.columns + block.first) * p.width;
    for (int64_t j = 0; j < block.columns; ++j) add_row(to + j * p.width, w.key_sums.at(j), p.width);
  }

  void end_row(int64_t i) const {
    const int64_t at = row_at(i);
    out.mass[at] += ::total(load(w.mass + i * kLanes)) + ::total(load(w.rests + 2 * i * kLanes));
    out.total[at] += ::total(load(w.total + i * kLanes)) + ::total(load(w.rests + (2 * i + 1) * kLanes));
    add_row(out.rows + at * p.width, w.row_sums.at(i), p.width);
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

int64_t tangent_workspace(const SimilarityParams& p, const TangentUpstream& u, const TangentSums& out, int64_t rows, int64_t columns) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    TangentWorkspace(product, p, u, out.keys != nullptr, rows, columns, arena);
    return arena.words;
  });
}

void tangent(const SimilarityParams& p, const PairTask& task, const TangentUpstream& u, const TangentSums& out, float* workspace) {
  const Matrix keys = p.keys.from(task.batch * p.keys_batch_stride);
  const Matrix keys_direction = u.keys_direction.data != nullptr ? u.keys_direction.from(task.batch * u.keys_direction_batch_stride) : Matrix{};
  const int64_t rows = task.batch * p.rows;
  const auto run = [&](auto product) {
    using Product = decltype(product);
    Arena arena{workspace};
    TangentWorkspace w(product, p, u, out.keys != nullptr, task.row_end - task.row_begin, task.column_end - task.column_begin, arena);
    w.keys.matrix = keys, w.keys_direction.matrix = keys_direction;
    if (out.keys != nullptr) w.of_queries.clear(), w.of_direction.clear();
    [[maybe_unused]] typename Product::Session session;
    for (int64_t row = task.row_begin; row < task.row_end; row += w.rows)
      TangentPass<Product>{p, task, u, out, w, row, smaller(w.rows, task.row_end - row)}.run();
  };
  with_holding_product(p.precision, run, [&] {
    const auto finite_rows = [&](const Matrix& x) { return all_finite(x, rows + task.row_begin, rows + task.row_end, p.width); };
    const auto finite_keys = [&](const Matrix& x) { return x.data == nullptr || all_finite(x, task.column_begin, task.column_end, p.width); };
    return finite_rows(p.query) && finite_rows(u.direction) && finite_keys(keys) && finite_keys(keys_direction);
  });
}

void tangent_finish_keys(const SimilarityParams& p, const TangentSums& out, const float* off, int64_t batch, int64_t begin, int64_t end) {
  take_off_keys(p, out.large, off, batch, begin, end, out.keys, nullptr);
}

}  // namespace
