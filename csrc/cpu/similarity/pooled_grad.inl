// Gradients of a softmax's log-sum-exp and pooled output, of rows and columns from one tile. With w_ij = h_i.v_j and
// dz_ij = p_ij (g_i + w_ij - mean_i),
//   sum_j dz_ij k_j,   dk_j = sum_i dz_ij s_i q_i,   db_j = sum_i dz_ij,   dv_j = sum_i p_ij h_i  (part of dk_j where values are the keys).
//
// Queries (and h) are the rows, keys (and values) the columns of stream.inl; weights are collected transposed as in pairs.inl. The mean is
// known once a row is through: what it was off by, which is much where h.v is a product of bfloat16, is taken from the sums afterwards, in the row's with the
// mean key where that is known, else for the candidates that hold a large share of the row.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/large_shares.inl"
#include "similarity/pairs.inl"
#include "similarity/pooled.h"

namespace {

using kdfast::PooledFinish;
using kdfast::PooledGradTask;
using kdfast::PooledSums;

// Sums of a block's columns over the rows: rows in panels by groups, a group's weights transposed, and the block's sums.
struct ColumnSums {
  Panels* groups = nullptr;
  float* transposed;  // [block][stride]
  int64_t stride, words;
  Sums sums;

  template <class Product>
  void plan(Product product, int64_t width, int64_t rows, int64_t group, int64_t block, Arena& arena) {
    const int64_t count = (rows + group - 1) / group;
    groups = reinterpret_cast<Panels*>(arena.take(count * int64_t(sizeof(Panels) / 4)));
    for (int64_t i = 0; i < count; ++i) {
      Panels panels;
      panels.plan(product, width, group, false, true, arena);
      if (arena.base != nullptr) groups[i] = panels;
    }
    stride = Product::words(group) + kLanes, words = round_up(block, Product::kRowMultiple) * stride;
    transposed = arena.take(words);
    sums.plan(round_up(block, Product::kRowMultiple), width, arena);
  }
};

struct PooledGradWorkspace {
  int64_t rows, block, group;  // group: rows whose weights are collected transposed
  Rows queries, upstream;
  Sums sums;
  Streamed keys, values = {};
  Tile tile, h_tile;  // of q.k, and of h.v
  ColumnTerms terms;
  float *multiplier, *high, *low, *mean, *g, *scale;  // per row
  float *mass, *total, *rests;                        // per row, by lanes; rests: of both, as grow has them
  float* dbias;                                       // per column of the block
  ColumnSums dkeys, dvalues;

  template <class Product>
  PooledGradWorkspace(Product product, const SimilarityParams& p, const PooledGradTask& t, int64_t row_count, int64_t columns,
                      Arena& arena) {
    const PooledSums& out = t.sums;
    const bool other_values = p.values.data != nullptr, slopes = out.by_slopes(), with_h = t.upstream.h.data != nullptr;
    rows = rows_at_once<Product>(p.width + p.pooled_width, row_count);
    block = smaller(kPairBlock<Product>, block_columns<Product>(columns, p.width > p.pooled_width ? p.width : p.pooled_width));
    group = smaller(kTransposedRows<Product>, round_up(rows, kPanel));
    if (p.scores == nullptr) queries.plan(product, rows, p.width, arena);
    sums.plan(out.rows != nullptr ? rows : 0, p.width, arena);
    keys.panels.plan(product, p.width, block, p.scores == nullptr || (with_h && slopes && !other_values), out.rows != nullptr, arena);
    tile.plan(product, kPairChunk<Product>, block, arena);
    h_tile.plan(product, kPairChunk<Product>, block, arena);
    terms.plan(block, arena);
    const int64_t padded = round_up(rows, kPairChunk<Product>);
    multiplier = arena.take(padded), high = arena.take(padded), low = arena.take(padded);
    mean = arena.take(padded), g = arena.take(padded), scale = arena.take(padded);
    mass = arena.take(rows * kLanes), total = arena.take(rows * kLanes), rests = arena.take(2 * rows * kLanes);
    dbias = arena.take(out.dbias != nullptr ? block : 0);
    if (with_h && slopes) upstream.plan(product, rows, p.pooled_width, arena);
    if (with_h && slopes && other_values) values.panels.plan(product, p.pooled_width, block, true, false, arena);
    if (out.dkeys != nullptr) dkeys.plan(product, p.width, rows, group, block, arena);
    if (with_h && sums_values(p, out)) dvalues.plan(product, p.pooled_width, rows, group, block, arena);
  }

  static bool sums_values(const SimilarityParams& p, const PooledSums& out) {
    return (p.values.data != nullptr ? out.dvalues : out.dkeys) != nullptr;
  }
};

template <class Product>
struct PooledGradPass;
template <class Product>
constexpr int64_t kChunkRows<Product, PooledGradPass<Product>> = kPairChunk<Product>;

// Up to rows_at_once rows, `first` .. `first + count` of the call, through the task's columns.
template <class Product>
struct PooledGradPass {
  const SimilarityParams& p;
  const PooledGradTask& task;
  PooledGradWorkspace& w;
  const int64_t first, count;

  const PooledSums& out() const { return task.sums; }
  bool with_h() const { return task.upstream.h.data != nullptr; }
  int64_t padded_rows() const { return round_up(count, Product::kRowMultiple); }

  void run() const {
    for (int64_t i = 0; i < padded_rows(); ++i) begin_row(i);
    for (int64_t i = count; i < round_up(count, kPairChunk<Product>); ++i) w.scale[i] = 0;
    if (w.dkeys.groups != nullptr) pack_groups(w.dkeys, p.query, p.width);
    if (w.dvalues.groups != nullptr) pack_groups(w.dvalues, task.upstream.h, p.pooled_width);
    stream_blocks(Product{}, w.block, padded_rows(), task.column_begin, task.column_end, *this, w.keys, w.values);
    for (int64_t i = 0; i < count; ++i) end_row(i);
  }

  // Rows that only fill the last tile are zero, and have p = 0.
  void begin_row(int64_t i) const {
    const bool slopes = out().by_slopes();
    if (out().rows != nullptr) __builtin_memset(w.sums.at(i), 0, size_t(4 * w.sums.stride));
    __builtin_memset(w.mass + i * kLanes, 0, 4 * kLanes);
    __builtin_memset(w.total + i * kLanes, 0, 4 * kLanes);
    __builtin_memset(rests(i), 0, 2 * 4 * kLanes);
    if (i >= count) {
      w.multiplier[i] = 0, w.high[i] = kInfinity, w.low[i] = 0, w.mean[i] = 0, w.g[i] = 0;
      if (p.scores == nullptr) __builtin_memset(w.queries.at(i), 0, size_t(4 * w.queries.stride));
      if (with_h() && slopes) __builtin_memset(w.upstream.at(i), 0, size_t(4 * w.upstream.stride));
      return;
    }
    const kdfast::PooledUpstream& u = task.upstream;
    const int64_t row = first + i;
    w.scale[i] = p.scale[row];
    w.multiplier[i] = __builtin_fabsf(p.scale[row]);
    w.high[i] = above_nothing(u.lse[row]), w.low[i] = u.lse_low[row];
    if (p.scores == nullptr)  // as in the forward pass
      Packing<Product>::pack_row(p.query, row, p.width, p.scale[row] < 0, w.queries.at(i));
    if (!slopes) return;
    w.g[i] = u.g != nullptr ? u.g[row] : 0;
    if (task.begins) out().large.count[row] = 0;
    out().mean[row] = w.mean[i] = 0;
    if (!with_h()) return;
    const int64_t width = p.pooled_width;
    const float *const h = static_cast<const float*>(u.h.data) + row * width, *const pooled = u.pooled + row * width;
    Vec mean = {};
    for (int64_t d = 0; d < width; d += kLanes) mean = multiply_add(load_row(h, d, width), load_row(pooled, d, width), mean);
    out().mean[row] = w.mean[i] = total(mean);
    Packing<Product>::pack_row(u.h, row, width, false, w.upstream.at(i));
  }

  void pack_groups(const ColumnSums& c, const Matrix& matrix, int64_t width) const {
    const Matrix mine = matrix.from(first * width);
    for (int64_t row = 0; row < count; row += w.group) {
      const int64_t rows = smaller(w.group, count - row);
      Packing<Product>::pack_block(c.groups[row / w.group], mine, row, rows, round_up(rows, 2 * kLanes));
    }
    __builtin_memset(c.transposed, 0, size_t(4 * c.words));  // rows that only fill the last tile are never written
  }

  void begin_block(const Block& block) const {
    w.terms.pack(p, task.batch, block);
    if (out().dbias != nullptr) __builtin_memset(w.dbias, 0, size_t(4 * block.padded));
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    const bool slopes = out().by_slopes();
    score(block, row, rows);
    const int64_t exist = smaller(rows, count - row);
    if (slopes && with_h()) {
      const Panels& values = w.values.matrix.data != nullptr ? w.values.panels : w.keys.panels;
      score_rows(Product{}, w.upstream.at(row), w.upstream.stride, rows, values, block.padded, w.h_tile.scores(0), w.h_tile.stride);
    } else if (slopes) {
      for (int64_t i = 0; i < exist; ++i) __builtin_memset(w.h_tile.scores(i), 0, size_t(4 * block.padded));
    }
    for (int64_t i = 0; i < round_up(rows, 2 * kLanes); ++i) {
      if (i >= exist) {
        __builtin_memset(w.tile.scores(i), 0, size_t(4 * block.padded));
        __builtin_memset(w.h_tile.scores(i), 0, size_t(4 * block.padded));
        continue;
      }
      next.fetch(row + i);
      const float factor = w.terms.exclude(p, first + row + i, block, w.tile.scores(i), w.multiplier[row + i]);
      slopes ? weigh_row<true>(block, i, row, factor) : weigh_row<false>(block, i, row, factor);
    }
    const int64_t in_group = row % w.group;
    if (out().dbias != nullptr) add_bias(block, exist);
    if (w.dkeys.groups != nullptr)
      collect_transposed<Product>(w.tile, rows, block.padded, w.scale + row, w.dkeys.transposed, w.dkeys.stride, in_group);
    if (w.dvalues.groups != nullptr)
      collect_transposed<Product>(w.h_tile, rows, block.padded, nullptr, w.dvalues.transposed, w.dvalues.stride, in_group);
    if (out().rows != nullptr) {
      store_all_weights<Product>(w.tile, rows, block.padded);
      sum_rows(Product{}, w.tile.weights(0), w.tile.stride, rows, block.columns, w.keys.panels, AddTile{w.sums.at(row), w.sums.stride});
    }
    if (in_group + rows == w.group || row + rows == padded_rows()) sum_for_columns(block, row - in_group, in_group + rows);
  }

  void score(const Block& block, int64_t row, int64_t rows) const {
    if (p.scores == nullptr) {
      score_rows(Product{}, w.queries.at(row), w.queries.stride, rows, w.keys.panels, block.padded, w.tile.scores(0), w.tile.stride);
      return;
    }
    for (int64_t i = 0; i < smaller(rows, count - row); ++i) {  // the forward pass has left -inf beyond the columns that exist
      __builtin_memcpy(w.tile.scores(i), p.scores + (first + row + i) * p.scores_stride + block.first, size_t(4 * block.columns));
      __builtin_memset(w.tile.scores(i) + block.columns, 0, size_t(4 * (block.padded - block.columns)));
    }
  }

  // Row `i` of the chunk's weights dz in place of its scores, and p in place of h.v; without slopes p alone.
  template <bool kSlopes>
  void weigh_row(const Block& block, int64_t i, int64_t row, float factor) const {
    float *const scores = w.tile.scores(i), *const h_scores = w.h_tile.scores(i);
    const int64_t at = row + i;
    const RowLevel level{factor, w.high[at], w.low[at]};
    const Vec mean = splat(w.mean[at]), g = splat(w.g[at]);
    Vec mass = {}, sum = {}, most = {};
    for (int64_t j0 = 0; j0 < block.padded; j0 += kPanel) {
      Vec p[kVecs];
      level.exponents_of(scores + j0, p);
      exp_nonpositive(p, p);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const int64_t j = j0 + v * kLanes;
        if constexpr (kSlopes) {
          const Vec slope = p[v] * (load(h_scores + j) - mean);
          mass += p[v];
          sum += slope;
          most = larger(p[v], most);
          store(scores + j, multiply_add(p[v], g, slope));
        }
        store(h_scores + j, p[v]);
      }
    }
    if constexpr (kSlopes) {
      grow(w.mass + at * kLanes, rests(at), splat(1), mass);
      grow(w.total + at * kLanes, rests(at) + kLanes, splat(1), sum);
      note_large(out().large, first + at, block, h_scores, most);
    }
  }

  void add_bias(const Block& block, int64_t rows) const {
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      Vec sum = load(w.dbias + j);
      for (int64_t i = 0; i < rows; ++i) sum += load(w.tile.scores(i) + j);
      store(w.dbias + j, sum);
    }
  }

  // dK += W^T Q and dV += P^T H for the group of `rows` rows from `row` on; after the last group they are added to the call's.
  void sum_for_columns(const Block& block, int64_t row, int64_t rows) const {
    const bool last = row + rows >= padded_rows();
    const int64_t exist = smaller(rows, count - row), at = task.batch * p.columns + block.first;
    const auto sum = [&](const ColumnSums& c, const Sums& sums, bool begins) {
      const int64_t columns = round_up(block.columns, Product::kRowMultiple);
      for (int64_t j = 0; j < columns; j += kPairChunk<Product>) {
        const int64_t some = smaller(kPairChunk<Product>, columns - j);
        const auto add = [&](auto to) {
          sum_rows(Product{}, c.transposed + j * c.stride, c.stride, some, exist, c.groups[row / w.group], to);
        };
        begins ? add(StoreTile{sums.at(j), sums.stride}) : add(AddTile{sums.at(j), sums.stride});
      }
    };
    const bool begins = task.begins && first == task.batch * p.rows + task.row_begin;
    const auto give = [&](const Sums& sums, float* to, int64_t width) {
      for (int64_t j = 0; last && j < block.columns; ++j) add_row(to + (at + j) * width, sums.at(j), width, begins);
    };
    const bool over_keys = p.values.data == nullptr;
    if (w.dkeys.groups != nullptr) sum(w.dkeys, w.dkeys.sums, row == 0);
    if (w.dvalues.groups != nullptr) sum(w.dvalues, over_keys ? w.dkeys.sums : w.dvalues.sums, row == 0 && !over_keys);
    if (w.dkeys.groups != nullptr) give(w.dkeys.sums, out().dkeys, p.width);
    if (w.dvalues.groups != nullptr && !over_keys) give(w.dvalues.sums, out().dvalues, p.pooled_width);
    if (last && out().dbias != nullptr) add_row(out().dbias + at, w.dbias, block.columns, begins);
  }

  static void add_row(float* to, const float* sums, int64_t width, bool begins) {
    if (begins) return void(__builtin_memcpy(to, sums, size_t(4 * width)));
    for (int64_t d = 0; d < width; ++d) to[d] += sums[d];
  }

  float* rests(int64_t i) const { return w.rests + 2 * i * kLanes; }

  void end_row(int64_t i) const {
    const int64_t row = first + i;
    if (!out().by_slopes()) return;
    out().mass[row] = (task.begins ? 0 : out().mass[row]) + total(load(w.mass + i * kLanes)) + total(load(rests(i)));
    out().total[row] = (task.begins ? 0 : out().total[row]) + total(load(w.total + i * kLanes)) + total(load(rests(i) + kLanes));
    if (out().rows != nullptr) add_row(out().rows + row * p.width, w.sums.at(i), p.width, task.begins);
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows and `columns` columns that want what `like` wants.
int64_t pooled_grad_workspace(const SimilarityParams& p, const PooledGradTask& like, int64_t rows, int64_t columns) {
  return similarity_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    PooledGradWorkspace(product, p, like, rows, columns, arena);
    return arena.words;
  });
}

void pooled_grad(const SimilarityParams& p, const PooledGradTask& task, float* workspace) {
  const Matrix keys = p.keys.from(task.batch * p.keys_batch_stride);
  const Matrix values = p.values.data == nullptr ? p.values : p.values.from(task.batch * p.values_batch_stride);
  const int64_t first = task.batch * p.rows;
  const auto run = [&](auto product) {
    using Product = decltype(product);
    Arena arena{workspace};
    PooledGradWorkspace w(product, p, task, task.row_end - task.row_begin, task.column_end - task.column_begin, arena);
    w.keys.matrix = keys;
    if (task.upstream.h.data != nullptr && task.sums.by_slopes()) w.values.matrix = values;
    [[maybe_unused]] typename Product::Session session;
    for (int64_t row = task.row_begin; row < task.row_end; row += w.rows)
      PooledGradPass<Product>{p, task, w, first + row, smaller(w.rows, task.row_end - row)}.run();
  };
  if (p.precision == Precision::kFloat32Rows) return run(RowProduct{});
  with_holding_product(p.precision, run, [&] {
    return all_finite(p.query, first + task.row_begin, first + task.row_end, p.width) &&
           (task.upstream.h.data == nullptr || all_finite(task.upstream.h, first + task.row_begin, first + task.row_end, p.pooled_width)) &&
           all_finite(keys, task.column_begin, task.column_end, p.width) &&
           (values.data == nullptr || all_finite(values, task.column_begin, task.column_end, p.pooled_width));
  });
}

// A row's p add up to m = 1 + O(eps), its p (w - mean) to t in place of 0: the row's sum is divided by m, and the mean was off by t / m.
void pooled_finish_rows(const SimilarityParams& p, const PooledFinish& f, int64_t begin, int64_t end) {
  const int64_t rows = p.batch * p.rows;
  for (int64_t row = begin; row < end; ++row) {
    float mass = 0, total = 0;
    for (int64_t part = 0; part < f.parts; ++part) mass += f.sums.mass[part * rows + row], total += f.sums.total[part * rows + row];
    const float mean = f.sums.mean[row];
    if (f.start_weight != nullptr) {
      mass += f.start_weight[row];
      total += f.start_weight[row] * ((f.start_slope != nullptr ? f.start_slope[row] : 0) - mean);
    }
    const float whole = mass == 0 ? 1 : mass, off = mass == 0 ? 0 : total / mass;
    f.mean[row] = mean + off;
    f.sums.total[row] = off;
    if (f.rows == nullptr) continue;
    float* const to = f.rows + row * p.width;
    const float factor = f.scaled ? p.scale[row] : 1;
    for (int64_t d = 0; d < p.width; d += kLanes) {
      Vec sum = load_row(f.sums.rows + row * p.width, d, p.width);
      for (int64_t part = 1; part < f.parts; ++part) sum += load_row(f.sums.rows + (part * rows + row) * p.width, d, p.width);
      store_row(to, d, p.width, sum / splat(whole) * splat(factor));
    }
    if (f.key_mean != nullptr) {
      add_scaled(to, -factor * off, f.key_mean + row * p.width, p.width);
      continue;
    }
    with_elements(p.keys.from(row / p.rows * p.keys_batch_stride), [&](const auto* keys) {
      for (int64_t part = 0; part < f.parts; ++part)
        f.sums.large.of_row(part * rows + row, [&](int64_t column, float share) { add_scaled(to, -factor * off * share, keys + column * p.width, p.width); });
    });
  }
}

// The same for keys `begin` .. `end` of a batch entry, once its rows are done.
void pooled_finish_keys(const SimilarityParams& p, const PooledFinish& f, int64_t batch, int64_t begin, int64_t end) {
  for (int64_t part = 0; part < f.parts; ++part)
    take_off_keys(p, f.sums.large.from(part * p.batch * p.rows), f.sums.total, batch, begin, end, f.sums.dkeys, f.sums.dbias);
}

}  // namespace
