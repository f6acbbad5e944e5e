// What passes over a bank share: blocks of columns streamed past packed rows, scores, sums, exclusions.
//
// A pass keeps the rows of one matrix ("rows") and streams another ("columns") in blocks (Product::kBlock): it packs a block, transposed
// in panels for the scores S = R C^T and as it is in panels for the sums W C; then, for each chunk of rows (Product::kRowChunk),
// scores, weights W made of them, sums. docs/cpu-kernels.md derives the sizes and the cost.
#pragma once

#include "engine/packing.inl"

namespace {

constexpr float kLog2e = 0x1.715476p0f;
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr float kInfinity = __builtin_inff();

// Rows of `width` numbers taken through the whole column range together: enough for the packing of a block to be small beside the
// products (about 1 step in 4 N), few enough for rows and their sums to stay near 2 MB each.
template <class Product>
inline int64_t rows_at_once(int64_t width, int64_t rows) {
  const int64_t target = (int64_t(1) << 19) / round_up(width, kLanes);
  const int64_t rows_to_pack = Product::kRowsToPack;
  return smaller(round_up(target > rows_to_pack ? target : rows_to_pack, Product::kRowChunk), round_up(rows, Product::kRowMultiple));
}

// Columns of `width` numbers packed together: a block's two panels leave half of an L2 of 2 MB to rows, sums and scores.
template <class Product>
inline int64_t block_columns(int64_t columns, int64_t width) {
  constexpr int64_t kPanelWords = 3 << 16;
  const int64_t fit = kPanelWords / (2 * Product::words(width)) / kPanel * kPanel, most = Product::kBlock;
  return smaller(smaller(most, fit > kPanel ? fit : kPanel), round_up(columns, kPanel));
}

// ---- scratch ------------------------------------------------------------------------------------------------------

// Packed rows of a matrix, and their sums.
struct Rows {
  float* words;
  int64_t stride;

  template <class Product>
  void plan(Product, int64_t rows, int64_t width, Arena& arena) {
    stride = Product::words(width);
    words = arena.take(rows * stride);
  }
  float* at(int64_t row) const { return words + row * stride; }
};

struct Sums {
  float* sums;
  int64_t stride;

  void plan(int64_t rows, int64_t width, Arena& arena) {
    stride = round_up(width, kLanes);
    sums = arena.take(rows * stride);
  }
  float* at(int64_t row) const { return sums + row * stride; }
};

// Scores of a chunk of rows against a block, or the weights made of them. Weights of three bf16 parts are longer than the scores and begin
// before them: each is written where scores have been read.
struct Tile {
  float* base;
  int64_t stride, shift;

  template <class Product>
  void plan(Product, int64_t rows, int64_t block, Arena& arena) {
    const int64_t words = Product::words(block);
    shift = words > block ? words - block : 0;
    stride = block + shift + kLanes;  // not a power of two: six rows of scores must not share one L1 set
    base = arena.take(smaller(Product::kRowChunk, round_up(rows, Product::kRowMultiple)) * stride);
  }
  float* scores(int64_t row) const { return base + shift + row * stride; }
  float* weights(int64_t row) const { return base + row * stride; }
};

// Panels that were packed before the call (similarity/packed_panels.inl): of every whole block of a matrix's rows, one after the other.
struct PackedPanels {
  const float* blocks = nullptr;
  const int32_t* sound = nullptr;  // of each block: whether the product can hold it
  int64_t count = 0, stride = 0;   // blocks; words of one: its `columns`, then its `rows`

  // The block of `columns` rows from `first` on; -1: it is not here, or not whole, and its other rows must not be read.
  int64_t find(int64_t first, int64_t columns, int64_t whole) const {
    return columns == whole && first % whole == 0 && first / whole < count ? first / whole : -1;
  }
  const float* at(int64_t block) const { return blocks + block * stride; }
};

// A matrix whose blocks of rows pass by, and the block that is packed.
struct Streamed {
  Matrix matrix;
  Panels panels;
  PackedPanels packed = {};
};

// Makes the block of `columns` rows from `first` on ready in s.panels, whose own memory is `own`'s. Returns whether the product can hold it.
template <class Product>
inline bool ready_block(Product, Streamed& s, const Panels& own, int64_t first, int64_t columns, int64_t padded) {
  s.panels = own;
  const int64_t kept = s.packed.find(first, columns, Product::kBlock);
  if (kept < 0) return Packing<Product>::pack_block(s.panels, s.matrix, first, columns, padded);
  s.panels.columns = const_cast<float*>(s.packed.at(kept));
  s.panels.rows = s.panels.columns + own.block * own.row_words;
  return s.packed.sound[kept] != 0;
}

// ---- the pass -----------------------------------------------------------------------------------------------------

// Columns `first` .. `first + columns`, and zeros up to `padded`.
struct Block {
  int64_t first, columns, padded;
};

// Memory to bring into L2 in equal shares.
struct Prefetch {
  const char* from;
  int64_t bytes, share;

  void fetch(int64_t index) const {
    const int64_t end = smaller(bytes, (index + 1) * share);
    for (int64_t at = index * share; at < end; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
};

// S[rows, padded] = R C^T, a panel of columns and kStepChunk steps at a time, so that the panel stays in L1.
template <class Product>
inline void score_rows(Product product, const float* rows_words, int64_t rows_stride, int64_t rows, const Panels& c, int64_t padded, float* scores,
                       int64_t score_stride) {
  const int64_t steps = Product::steps(c.width);
  for (int64_t j = 0; j < padded; j += kPanel) {
    for (int64_t k = 0; k < steps; k += Product::kStepChunk) {
      const float* a = rows_words + k;
      const float* b = c.columns + j * c.row_words + k * kPanel;
      const int64_t n = smaller(steps - k, Product::kStepChunk);
      if (k == 0) {
        multiply_panel(from_column(product, j), a, rows_stride, rows, b, n, kVecs, StoreTile{scores + j, score_stride});
      } else {
        multiply_panel(from_column(product, j), a, rows_stride, rows, b, n, kVecs, AddTile{scores + j, score_stride});
      }
    }
  }
}

// W C for the weights of `columns` columns, given to `sums.from_column(d)`, the epilogue for columns d to d + kPanel of the result.
template <class Product, class Epilogue>
inline void sum_rows(Product, const float* weights, int64_t weight_stride, int64_t rows, int64_t columns, const Panels& c, Epilogue sums) {
  const int64_t steps = Product::steps(columns);
  for (int64_t d = 0; d < c.padded_width; d += kPanel) {
    const int vectors = int(smaller(kPanel, c.padded_width - d) / kLanes);
    multiply_panel(Product{}, weights, weight_stride, rows, c.rows + d * c.block_words, steps, vectors, sums.from_column(d));
  }
}

// Each of `rows` rows' share of the block of at most `block_size` columns after this one, which then waits in L2 when it is packed.
inline Prefetch after_block(const Streamed& s, const Block& block, int64_t block_size, int64_t end, int64_t rows) {
  const int64_t row_bytes = s.panels.width * s.matrix.element_bytes(), first = block.first + block.columns;
  const int64_t bytes = smaller(block_size, end - first) * row_bytes;
  return {static_cast<const char*>(s.matrix.data) + first * row_bytes, bytes, round_up(bytes / rows + 1, 64)};
}

// The same where the next block is packed already: of its panels, those that `own` has memory for.
template <class Product>
inline Prefetch after_block(Product, const Streamed& s, const Panels& own, const Block& block, int64_t block_size, int64_t end, int64_t rows) {
  const int64_t first = block.first + block.columns, kept = s.packed.find(first, smaller(block_size, end - first), Product::kBlock);
  if (kept < 0) return after_block(s, block, block_size, end, rows);
  const int64_t bytes = 4 * (own.rows != nullptr ? s.packed.stride : own.block * own.row_words);
  return {reinterpret_cast<const char*>(s.packed.at(kept)), bytes, round_up(bytes / rows + 1, 64)};
}

// Rows of a chunk, unless the pass says otherwise.
template <class Product, class Pass>
constexpr int64_t kChunkRows = Product::kRowChunk;

// Takes `rows` rows through the columns `begin` to `end` of each of `streamed`. A pass has
//   begin_block(block)              what it keeps of a block's columns
//   chunk(block, row, rows, next)   scores, weights and sums of a chunk of rows; next.fetch(i) once for each row i
// Returns whether the product could hold the columns.
template <class Product, class Pass, class... More>
inline bool stream_blocks(Product, int64_t block_size, int64_t rows, int64_t begin, int64_t end, const Pass& pass, Streamed& streamed,
                          More&... more) {
  bool sound = true;
  const Panels own = streamed.panels;
  for (int64_t first = begin; first < end; first += block_size) {
    const int64_t columns = smaller(block_size, end - first);
    const Block block{first, columns, round_up(columns, kPanel)};
    [[maybe_unused]] const auto pack = [&](Streamed& s) {
      if (s.matrix.data != nullptr) sound &= Packing<Product>::pack_block(s.panels, s.matrix, first, columns, block.padded);
    };
    sound &= ready_block(Product{}, streamed, own, first, columns, block.padded);
    (pack(more), ...);
    pass.begin_block(block);
    const Prefetch next = after_block(Product{}, streamed, own, block, block_size, end, rows);
    constexpr int64_t chunk = kChunkRows<Product, Pass>;
    for (int64_t row = 0; row < rows; row += chunk) pass.chunk(block, row, smaller(rows - row, chunk), next);
  }
  streamed.panels = own;
  return sound;
}

// ---- exclusions -------------------------------------------------------------------------------------------------------

// The halves of a block's labels.
struct BlockLabels {
  int32_t *low, *high;

  void plan(int64_t block, Arena& arena) {
    low = reinterpret_cast<int32_t*>(arena.take(block));
    high = reinterpret_cast<int32_t*>(arena.take(block));
  }
  // Columns that do not exist have label 0.
  void pack(const int64_t* labels, const Block& block) const {
    for (int64_t j = 0; j < block.padded; ++j) {
      const int64_t label = j < block.columns ? labels[j] : 0;
      low[j] = int32_t(uint32_t(label));
      high[j] = int32_t(label >> 32);
    }
  }
};

// A term of the logits along one row of scores: the same everywhere, or one for each column.
struct SameTerm {
  Vec x;
  inline Vec at(int64_t) const { return x; }
};
struct ColumnTerm {
  const float* x;
  inline Vec at(int64_t j) const { return load(x + j); }
};

// Replace one row's scores by logits, scale score + bias, -inf where scale score > limit or the labels are equal.
// `label` null: no labels.
template <class Scale, class Limit, class Bias>
inline void mask_scores(const BlockLabels& labels, float* scores, int64_t padded, Scale scale, bool limited, Limit limit, Bias bias,
                        const int64_t* label) {
  const int64_t own = label != nullptr ? *label : 0;
  const IntVec low = IntVec{} + int32_t(uint32_t(own)), high = IntVec{} + int32_t(own >> 32);
  const Vec dropped = splat(-kInfinity);
  for (int64_t j = 0; j < padded; j += kLanes) {
    const Vec score = load(scores + j);
    Vec z = multiply_add(score, scale.at(j), bias.at(j));
    if (limited) z = score * scale.at(j) > limit.at(j) ? dropped : z;
    if (label != nullptr) z = ((load_int(labels.low + j) == low) & (load_int(labels.high + j) == high)) ? dropped : z;
    store(scores + j, z);
  }
}

}  // namespace
