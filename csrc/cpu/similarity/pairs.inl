// Passes in which one tile of scores serves rows and columns: log-sum-exps both ways, pair losses, and their gradients.
//
// Rows X and columns Y of stream.inl. A gradient makes weights W of a tile of scores and adds W Y to dX and W^T X to dY: 6 N M D. For the
// second product the weights of kTransposedRows rows are collected transposed; docs/cpu-kernels.md derives the sizes.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/pairs.h"
#include "similarity/exponential.inl"

namespace {

using kdfast::PairParams;
using kdfast::PairSums;
using kdfast::PairTask;

// Of a gradient: columns packed at a time, rows weighed at a time, and rows that one product W^T X adds up, a multiple of these. Beside the
// block's two panels and its sums, a chunk of rows, their panels and sums should stay in L2, or a group's panels and its transposed weights; and
// the longer a product's inner dimension, the fewer times its sums are loaded and stored.
template <class Product>
constexpr bool kOnTiles = Product::kRowChunk < 128;
template <class Product>
constexpr int64_t kPairBlock = !kOnTiles<Product> ? Product::kBlock : Product::kParts > 1 ? 128 : 256;
template <class Product>
constexpr int64_t kPairChunk = kOnTiles<Product> ? Product::kRowChunk : Product::kBlock * 3 / 4;
template <class Product>
constexpr int64_t kTransposedRows = kOnTiles<Product> ? 256 : kPairChunk<Product>;

// The scale, and for a scale of 0 the smallest float: an infinite score, which stands for a pair left out, must not become NaN.
inline float multiplier_of(float scale) { return scale == 0 ? 0x1p-126f : scale; }

// The score whose logit is -inf.
inline float score_left_out(float multiplier) { return multiplier > 0 ? -kInfinity : kInfinity; }

// Whether rows `begin` .. `end` hold finite numbers only.
inline bool all_finite(const Matrix& matrix, int64_t begin, int64_t end, int64_t width) {
  Vec rest = {};  // 0, or NaN after an infinity or a NaN
  with_elements(matrix, [&](const auto* elements) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec x = load_row(elements + i * width, d, width);
        rest += x - x;
      }
    }
  });
  return total(rest) == 0;
}

// S = X Y^T for `rows` rows, the first of them row `row` of the batch entry, against the block. Where Y is X, (i, j) has the bits of (j, i): a
// gradient's tile meets log-sum-exps of its rows and of its columns, which must be those of its scores.
template <class Product>
inline void score_pairs(Product product, const PairParams& p, const Block& block, int64_t row, const float* x, int64_t x_stride, int64_t rows,
                        const Panels& y, const Tile& tile) {
  if constexpr (Product::kParts > 1) {  // others are symmetric by themselves
    if (p.x.data == p.y.data && p.rows == p.columns) {
      const typename Product::Symmetric symmetric(block.first - row);
      return score_rows(symmetric, x, x_stride, rows, y, block.padded, tile.scores(0), tile.stride);
    }
  }
  score_rows(product, x, x_stride, rows, y, block.padded, tile.scores(0), tile.stride);
}

// ---- pairs left out ---------------------------------------------------------------------------------------------------

// The labels of a block's columns, and their range: most rows of a batch in order have a label outside it.
struct PairLabels {
  BlockLabels halves;
  int64_t least, greatest;

  // `labels` of all columns of the batch entry.
  void begin_block(const int64_t* labels, const Block& block) {
    labels += block.first;
    halves.pack(labels, block);
    least = greatest = labels[0];
    for (int64_t j = 1; j < block.columns; ++j) {
      least = labels[j] < least ? labels[j] : least;
      greatest = labels[j] > greatest ? labels[j] : greatest;
    }
  }
  // f(j, which of columns j .. j + kLanes have label `own`), unless none of the block can have it.
  template <class F>
  void for_equal(int64_t padded, int64_t own, const F& f) const {
    if (own < least || own > greatest) return;
    const IntVec low = IntVec{} + int32_t(uint32_t(own)), high = IntVec{} + int32_t(own >> 32);
    for (int64_t j = 0; j < padded; j += kLanes) f(j, (load_int(halves.low + j) == low) & (load_int(halves.high + j) == high));
  }
  // Scores of columns with label `own` become `replacement`.
  void leave_out(float* scores, int64_t padded, int64_t own, float replacement) const {
    const Vec other = splat(replacement);
    for_equal(padded, own, [&](int64_t j, IntVec equal) { store(scores + j, equal ? other : load(scores + j)); });
  }
};

// ---- statistics of the scores -------------------------------------------------------------------------------------------

struct PairWorkspace {
  int64_t rows, block;
  Rows x;
  Streamed y;
  Tile tile;

  template <class Product>
  PairWorkspace(Product product, const PairParams& p, int64_t row_count, int64_t columns, Arena& arena) {
    rows = rows_at_once<Product>(p.width, row_count);
    block = block_columns<Product>(columns, p.width);
    x.plan(product, rows, p.width, arena);
    y.panels.plan(product, p.width, block, true, false, arena);
    tile.plan(product, rows, block, arena);
  }
};

// Up to rows_at_once rows, `first` .. `first + count` of the batch entry, through the task's columns. A Statistic has
//   begin_rows(first)
//   begin_block(block)
//   chunk(block, row, rows, tile)   scores of rows `row` .. `row + rows`, counted from `first`, all of which exist
//   idle(block, row, rows)          where kSkipsChunks: none of these scores is wanted
template <class Statistic>
constexpr bool kSkipsChunks = false;

template <class Product, class Statistic>
struct PairPass {
  const PairParams& p;
  const PairTask& task;
  PairWorkspace& w;
  const int64_t first, count;
  Statistic& statistic;

  bool run() const {
    const int64_t padded_rows = round_up(count, Product::kRowMultiple);
    const Matrix x = p.x.from(task.batch * p.rows * p.width);
    bool sound = true;
    for (int64_t i = 0; i < count; ++i) sound &= Packing<Product>::pack_row(x, first + i, p.width, false, w.x.at(i));
    __builtin_memset(w.x.at(count), 0, size_t(4 * (padded_rows - count) * w.x.stride));
    return sound & stream_blocks(Product{}, w.block, padded_rows, task.column_begin, task.column_end, *this, w.y);
  }

  void begin_block(const Block& block) const { statistic.begin_block(block); }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    if constexpr (kSkipsChunks<Statistic>)
      if (statistic.idle(block, row, smaller(rows, count - row))) return;
    score_pairs(Product{}, p, block, first + row, w.x.at(row), w.x.stride, rows, w.y.panels, w.tile);
    for (int64_t i = row; i < row + rows; ++i) next.fetch(i);
    statistic.chunk(block, row, smaller(rows, count - row), w.tile);
  }
};

// ---- sums weighted by a function of the scores --------------------------------------------------------------------------

// C += A B, and a share of some other memory brought into L2 before each tile.
struct AddTileAhead {
  AddTile sums;
  const Prefetch* memory;
  int64_t* tiles;  // so far
  inline AddTileAhead from_row(int64_t row) const { return {sums.from_row(row), memory, tiles}; }
  inline AddTileAhead from_column(int64_t d) const { return {sums.from_column(d), memory, tiles}; }
  inline void fetch(int r, int v) const {
    if (r == 0 && v == 0) memory->fetch((*tiles)++);
    sums.fetch(r, v);
  }
  inline void operator()(int r, int v, Vec x) const { sums(r, v, x); }
};

// The tile has the scores of `tile_rows` rows, a chunk of them or several.
struct PairGradientWorkspace {
  int64_t rows, block, group;  // group: rows whose weights are collected transposed
  Rows x;
  Panels x_panels;             // of the first group
  float* more_groups;          // of the others, `rows` alone
  int64_t group_words;
  Streamed y;
  Sums x_sums, y_sums;
  Tile tile;
  float* transposed;           // [block][transposed_stride], weights of a group
  int64_t transposed_stride, transposed_words;
  float* scale;                // per row
  bool group_idle = false;     // all weights of the group at hand are 0

  PairGradientWorkspace() = default;
  template <class Product>
  PairGradientWorkspace(Product product, const PairParams& p, bool want_x, bool want_y, int64_t row_count, int64_t columns, Arena& arena,
                        int64_t most_columns = kPairBlock<Product>, int64_t tile_rows = kPairChunk<Product>) {
    rows = rows_at_once<Product>(p.width, row_count);
    if (rows < tile_rows) rows = round_up(smaller(tile_rows, row_count), Product::kRowMultiple);
    block = smaller(most_columns, round_up(columns, kPanel));
    group = smaller(kTransposedRows<Product>, round_up(rows, kPanel));
    const int64_t sums = round_up(block, Product::kRowMultiple), groups = (rows + group - 1) / group;
    x.plan(product, rows, p.width, arena);
    y.panels.plan(product, p.width, block, true, want_x, arena);
    x_sums.plan(want_x ? rows : 0, p.width, arena);
    tile.plan(product, kPairChunk<Product>, block, arena);
    if (tile_rows > kPairChunk<Product>) arena.take((tile_rows - kPairChunk<Product>) * tile.stride);  // its other rows
    scale = arena.take(round_up(rows, kPairChunk<Product>));
    if (!want_y) return;
    x_panels.plan(product, p.width, group, false, true, arena);
    group_words = x_panels.block_words * x_panels.padded_width;
    more_groups = arena.take((groups - 1) * group_words);
    y_sums.plan(sums, p.width, arena);
    transposed_stride = Product::words(group) + kLanes;
    transposed = arena.take(sums * transposed_stride);
    transposed_words = sums * transposed_stride;
  }

  Tile tile_from(int64_t row) const { return {tile.base + row * tile.stride, tile.stride, tile.shift}; }

  // Rows that only fill the last tile are never written.
  void clear_transposed() const { __builtin_memset(transposed, 0, size_t(4 * transposed_words)); }
};

// Weights of a chunk of rows, times each row's scale (null: 1), as columns of W^T from column `at` on, a multiple of 2 kLanes.
template <class Product>
inline void collect_transposed(const Tile& tile, int64_t rows, int64_t padded, const float* scale, float* transposed, int64_t stride, int64_t at) {
  constexpr int64_t kRun = 2 * kLanes;
  alignas(64) float square[kLanes * kRun];
  for (int64_t i = 0; i < rows; i += kRun) {
    const Vec scale0 = scale != nullptr ? load(scale + i) : splat(1), scale1 = scale != nullptr ? load(scale + i + kLanes) : splat(1);
    for (int64_t j = 0; j < padded; j += kLanes) {
      transpose(tile.scores(i) + j, tile.stride, square, kRun);
      transpose(tile.scores(i + kLanes) + j, tile.stride, square + kLanes, kRun);
      float* to = transposed + j * stride;
      for (int64_t k = 0; k < kLanes; ++k, to += stride)
        Packing<Product>::store_weights(to, at + i, load(square + k * kRun) * scale0, load(square + k * kRun + kLanes) * scale1);
    }
  }
}

// Weights where scores were, as the product reads them.
template <class Product>
inline void store_all_weights(const Tile& tile, int64_t rows, int64_t padded) {
  if constexpr (!__is_base_of(RegisterTiles<1>, Product)) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < padded; j += 2 * kLanes)
        Packing<Product>::store_weights(tile.weights(i), j, load(tile.scores(i) + j), load(tile.scores(i) + j + kLanes));
  }
}

// Up to rows_at_once rows, `first` .. `first + count` of the batch entry, through the task's columns. Weights has
//   begin_rows(first, count)
//   begin_block(block)
//   weigh(block, i, scores)         replaces row i's scores by its weights; what becomes of the columns that do not exist is no matter
//   kKnowsIdle                      whether it has idle(block, row, rows): all weights of a chunk are 0
//   learn(product, block, workspace) where kKeepsScores: once all scores are there, and before the first is weighed
template <class Weights>
constexpr bool kKeepsScores = false;

template <class Product, class Weights>
struct PairGradientPass;
template <class Product, class Weights>
constexpr int64_t kChunkRows<Product, PairGradientPass<Product, Weights>> = kPairChunk<Product>;

template <class Product, class Weights>
struct PairGradientPass {
  const PairParams& p;
  const PairTask& task;
  const PairSums& out;
  PairGradientWorkspace& w;
  const int64_t first, count;
  Weights& weights;

  static constexpr bool kKept = kKeepsScores<Weights>;

  struct Memory {
    const float* from = nullptr;
    int64_t words = 0;
  };

  int64_t padded_rows() const { return round_up(count, Product::kRowMultiple); }

  void run() const {
    begin();
    stream_blocks(Product{}, w.block, padded_rows(), task.column_begin, task.column_end, *this, w.y);
    finish();
  }

  void begin() const {
    const Matrix x = p.x.from(task.batch * p.rows * p.width);
    for (int64_t i = 0; i < count; ++i) {
      Packing<Product>::pack_row(x, first + i, p.width, false, w.x.at(i));
      w.scale[i] = p.scale != nullptr ? p.scale[task.batch * p.rows + first + i] : 1;
    }
    __builtin_memset(w.x.at(count), 0, size_t(4 * (padded_rows() - count) * w.x.stride));
    for (int64_t i = count; i < round_up(count, kPairChunk<Product>); ++i) w.scale[i] = 0;
    if (out.y_sums != nullptr) {
      for (int64_t row = 0; row < count; row += w.group) {
        const int64_t rows = smaller(w.group, count - row);
        Packing<Product>::pack_block(group_panels(row), x, first + row, rows, round_up(rows, 2 * kLanes));
      }
    }
    if (out.x_sums != nullptr && !kKept) __builtin_memset(w.x_sums.at(0), 0, size_t(4 * padded_rows() * w.x_sums.stride));
  }

  void finish() const {
    if (out.x_sums != nullptr) add_to(out.x_sums + (task.batch * p.rows + first) * p.width, w.x_sums, count);
  }

  Panels group_panels(int64_t row) const {
    Panels panels = w.x_panels;
    if (row >= w.group) panels.rows = w.more_groups + (row / w.group - 1) * w.group_words;
    return panels;
  }

  // Of kept scores these are all.
  void add_to(float* to, const Sums& sums, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (kKept) {
        __builtin_memcpy(to + i * p.width, sums.at(i), size_t(4 * p.width));
      } else {
        for (int64_t d = 0; d < p.width; ++d) to[i * p.width + d] += sums.at(i)[d];
      }
    }
  }

  void begin_block(const Block& block) const {
    weights.begin_block(block);
    if (out.y_sums != nullptr && !kKept) __builtin_memset(w.y_sums.at(0), 0, size_t(4 * round_up(block.columns, Product::kRowMultiple) * w.y_sums.stride));
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    bool idle = false;
    if constexpr (Weights::kKnowsIdle) idle = weights.idle(block, row, smaller(rows, count - row));
    if (idle && out.y_sums == nullptr) return;
    if constexpr (Weights::kKnowsIdle && !kKept)
      if (row % w.group == 0) w.group_idle = idle && weights.idle(block, row, smaller(w.group, count - row));
    const Tile tile = kKept ? w.tile_from(row) : w.tile;
    if (!idle) score_pairs(Product{}, p, block, first + row, w.x.at(row), w.x.stride, rows, w.y.panels, tile);
    if constexpr (!kKept) {
      weigh_and_sum(block, row, rows, tile, next, idle);
    } else if (row + rows == padded_rows()) {
      weights.learn(Product{}, block, w);
      for (int64_t i = 0; i < padded_rows(); i += kPairChunk<Product>)
        weigh_and_sum(block, i, smaller(kPairChunk<Product>, padded_rows() - i), w.tile_from(i), next, idle);
    }
  }

  void weigh_and_sum(const Block& block, int64_t row, int64_t rows, const Tile& tile, const Prefetch& next, bool idle) const {
    const int64_t exist = smaller(rows, count - row);
    for (int64_t i = 0; i < round_up(rows, 2 * kLanes); ++i) {
      float* const scores = tile.scores(i);
      const bool weighed = i < exist && !idle;
      if (weighed) weights.weigh(block, row + i, scores);
      const int64_t kept = weighed ? block.columns : 0;
      __builtin_memset(scores + kept, 0, size_t(4 * (block.padded - kept)));
    }
    for (int64_t i = row; i < row + rows; ++i) next.fetch(i);
    if (out.y_sums != nullptr && !w.group_idle) collect(block, row, rows, tile);
    const int64_t following = row + rows < padded_rows() ? row + rows : 0;  // chunk
    const Memory rows_after{w.x.at(following), rows * w.x.stride};
    if (out.x_sums != nullptr && !idle)
      sum_for_rows(block, row, rows, tile, out.y_sums != nullptr ? Memory{group_panels(row).rows, w.group_words} : rows_after);
    if (out.y_sums == nullptr) return;
    const int64_t in_group = row % w.group + rows;
    const bool last = row + rows == padded_rows();
    if ((in_group == w.group || last) && !w.group_idle)
      sum_for_columns(block, row + rows - in_group, smaller(in_group, count - (row + rows - in_group)), rows_after);
    if (last) add_to(out.y_sums + (task.batch * p.columns + block.first) * p.width, w.y_sums, block.columns);
  }

  void collect(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    collect_transposed<Product>(tile, rows, block.padded, w.scale + row, w.transposed, w.transposed_stride, row % w.group);
  }

  // dX += W Y
  void sum_for_rows(const Block& block, int64_t row, int64_t rows, const Tile& tile, const Memory& next) const {
    store_all_weights<Product>(tile, rows, block.padded);
    add_product(w.x_sums, row, true, tile.weights(0), tile.stride, rows, block.columns, w.y.panels, next);
  }

  // dY += W^T X for a group of rows
  void sum_for_columns(const Block& block, int64_t row, int64_t rows, const Memory& next) const {
    const Panels panels = group_panels(row);
    const int64_t columns = round_up(block.columns, Product::kRowMultiple);
    for (int64_t j = 0; j < columns; j += kPairChunk<Product>) {
      const int64_t some = smaller(kPairChunk<Product>, columns - j);
      add_product(w.y_sums, j, row == 0, w.transposed + j * w.transposed_stride, w.transposed_stride, some, rows, panels, j == 0 ? next : Memory{});
    }
  }

  // Sums from row `at` on grow by weights times C; those of kept scores, which nothing has set to zero, begin with the `first`. `next`, which the
  // pass needs soon and which L2 has no room to keep, comes back meanwhile; kept scores and chunks of tile registers are few rows, close together.
  static void add_product(const Sums& sums, int64_t at, [[maybe_unused]] bool first, const float* weights, int64_t weight_stride, int64_t rows,
                          int64_t columns, const Panels& c, [[maybe_unused]] const Memory& next) {
    const auto sum = [&](auto to) { sum_rows(Product{}, weights, weight_stride, rows, columns, c, to); };
    const AddTile to{sums.at(at), sums.stride};
    if constexpr (kKept) {
      first ? sum(StoreTile{to.c, to.stride}) : sum(to);
    } else if constexpr (kOnTiles<Product>) {
      sum(to);
    } else {
      const int64_t tiles = rows / kTileRows * round_up(c.padded_width, kPanel) / kPanel, bytes = 4 * next.words;
      const Prefetch memory{reinterpret_cast<const char*>(next.from), bytes, round_up(bytes / tiles + 1, 64)};
      int64_t taken = 0;
      sum(AddTileAhead{to, &memory, &taken});
    }
  }
};

// ---- what the entries of the dispatch table share ------------------------------------------------------------------------

// statistic(first) for each group of rows, through the task's columns. Returns whether the product could hold the operands.
template <class Product, class Statistic>
inline bool take_statistics(Product, const PairParams& p, const PairTask& task, PairWorkspace& w, Statistic& statistic) {
  [[maybe_unused]] typename Product::Session session;
  w.y.matrix = p.y.from(task.batch * p.columns * p.width);
  bool sound = true;
  for (int64_t row = task.row_begin; row < task.row_end; row += w.rows) {
    statistic.begin_rows(row);
    sound &= PairPass<Product, Statistic>{p, task, w, row, smaller(w.rows, task.row_end - row), statistic}.run();
  }
  return sound;
}

template <class Product, class Weights>
inline void take_gradients(Product, const PairParams& p, const PairTask& task, const PairSums& out, PairGradientWorkspace& w,
                           Weights& weights) {
  [[maybe_unused]] typename Product::Session session;
  w.y.matrix = p.y.from(task.batch * p.columns * p.width);
  if (out.y_sums != nullptr) w.clear_transposed();
  for (int64_t row = task.row_begin; row < task.row_end; row += w.rows) {
    const int64_t count = smaller(w.rows, task.row_end - row);
    weights.begin_rows(row, count);
    PairGradientPass<Product, Weights>{p, task, out, w, row, count, weights}.run();
  }
}

// f(product) with a product that holds the operands, `finite()` saying whether they are: sums grow as blocks pass by, so that it must be known
// beforehand.
template <class F, class Finite>
inline void with_holding_product(Precision precision, const F& f, const Finite& finite) {
  if (precision == Precision::kBFloat16 || precision == Precision::kFloat32Vectors || finite()) {
    with_product(precision, f);
  } else {
    f(Float32Product{});
  }
}

template <class F>
inline void with_holding_product(const PairParams& p, const PairTask& task, const F& f) {
  with_holding_product(p.precision, f, [&] {
    return all_finite(p.x.from(task.batch * p.rows * p.width), task.row_begin, task.row_end, p.width) &&
           all_finite(p.y.from(task.batch * p.columns * p.width), task.column_begin, task.column_end, p.width);
  });
}

}  // namespace
