// The products of a streaming softmax over keys so wide that a block of them in panels leaves L2 no room. Of a block's rows, read where
// they lie, a piece is packed, at most kStepChunk steps of one panel, meets all rows of a chunk, and is forgotten: it never leaves L1.
//
// Included by the passes, after the target pragma.
#pragma once

#include "similarity/softmax.inl"

namespace {

template <class Base>
struct Wide : Base {
  using Swapped = Wide<typename Base::Swapped>;
  static constexpr int64_t kRowChunk = 3 * Base::kRowChunk;  // a piece is packed for so many rows
};

// ---- which product ----------------------------------------------------------------------------------------------------

template <class Product>
constexpr bool kHasWide = __is_same(Product, Float32Product);
#if defined(KDFAST_BF16_INSTRUCTIONS) && !defined(KDFAST_TILE_INSTRUCTIONS)
template <>
constexpr bool kHasWide<BFloat16Product> = true;
#endif
template <class Product>
constexpr bool kIsWide = false;
template <class Base>
constexpr bool kIsWide<Wide<Base>> = true;

// f(product), or its wide form where blocks would have to be smaller.
template <class Product, class F>
inline auto with_width(Product product, const SimilarityParams& p, const F& f) {
  const int64_t width = p.width > p.pooled_width ? p.width : p.pooled_width;
  if constexpr (kHasWide<Product>)
    if (block_columns<Product>(Product::kBlock, width) < Product::kBlock) return f(Wide<Product>{});
  return f(product);
}

// with_similarity_product and similarity_words, by the width too.
template <class F>
inline void with_streaming_product(const SimilarityParams& p, const F& f) {
  with_similarity_product(p.precision, [&](auto product) { return with_width(product, p, f); });
}
template <class F>
inline int64_t streaming_words(const SimilarityParams& p, const F& f) {
  return similarity_words(p.precision, [&](auto product) { return with_width(product, p, f); });
}

// Columns of `width` numbers streamed together.
template <class Product>
inline int64_t streamed_columns(int64_t columns, int64_t width) {
  return kIsWide<Product> ? smaller(int64_t(Product::kBlock), round_up(columns, kPanel)) : block_columns<Product>(columns, width);
}

// Memory for a block of a streamed matrix; whole panels of it are not made where pieces are.
template <class Product>
inline void plan_streamed(Product product, Streamed& s, int64_t width, int64_t block, bool scored, bool summed, Arena& arena) {
  constexpr bool kWhole = !kIsWide<Product>;
  s.panels.plan(product, width, block, scored && kWhole, summed && kWhole, arena);
}

// The width to lay rows out for: rows pages apart would share one set of L1, and few of L2.
template <class Product>
inline int64_t spaced(int64_t width) {
  if constexpr (kIsWide<Product>)
    if (Product::words(width) % 256 == 0) return width + Product::kPack * kLanes;
  return width;
}

// ---- pieces -------------------------------------------------------------------------------------------------------------

// A block's packed rows are the matrix's own, row_words apart, where these are whole and of the product's type.
template <class Base>
struct Packing<Wide<Base>> : Packing<Base> {
  static bool pack_block(Panels& p, const Matrix& matrix, int64_t first, int64_t columns, int64_t padded) {
    constexpr ElementType kOwn = Base::kPack == 1 ? ElementType::kFloat32 : ElementType::kBFloat16;
    p.in_place_rows = padded;
    if (matrix.type == kOwn && p.width == p.row_words * Base::kPack && columns == padded) {
      p.in_place = static_cast<const float*>(matrix.from(first * p.width).data);
      return true;
    }
    float* const to = p.staging != nullptr ? p.staging : p.rows;
    for (int64_t j = 0; j < columns; ++j) Packing<Base>::pack_row(matrix, first + j, p.width, false, to + j * p.row_words);
    __builtin_memset(to + columns * p.row_words, 0, size_t(4 * (padded - columns) * p.row_words));
    p.in_place = to;
    return true;
  }
};

// `steps` words of kPanel rows, transposed.
inline void pack_columns(const float* from, int64_t stride, int64_t steps, float* to) {
  for (int64_t j = 0; j < kPanel; j += kLanes)
    for (int64_t k = 0; k < steps; k += kLanes) transpose(from + j * stride + k, stride, to + k * kPanel + j, kPanel);
}

// `vectors` vectors of `columns` rows.
inline void pack_rows(Float32Product, const float* from, int64_t stride, int64_t columns, int vectors, float* to) {
  for (int64_t j = 0; j < columns; ++j, from += stride, to += vectors * kLanes)
    for (int v = 0; v < vectors; ++v) store(to + v * kLanes, load(from + v * kLanes));
}

#if defined(KDFAST_BF16_INSTRUCTIONS) && !defined(KDFAST_TILE_INSTRUCTIONS)
// The same of pairs: two rows' 32 numbers become two vectors.
inline void pack_rows(BFloat16Product, const float* from, int64_t stride, int64_t columns, int vectors, float* to) {
  static const uint16_t kLowHalf[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_loadu_si512(kLowHalf), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t j = 0; j < columns; j += 2, from += 2 * stride, to += vectors * kLanes) {
    for (int v = 0; v < vectors; v += 2) {
      const __m512i first = _mm512_loadu_si512(from + v / 2 * kLanes), second = _mm512_loadu_si512(from + stride + v / 2 * kLanes);
      _mm512_storeu_si512(to + v * kLanes, _mm512_permutex2var_epi16(first, low, second));
      if (v + 1 < vectors) _mm512_storeu_si512(to + (v + 1) * kLanes, _mm512_permutex2var_epi16(first, high, second));
    }
  }
}
#endif

// The rows of the piece that comes next, some of them brought into L2 before each tile.
struct PieceAhead {
  const float* from;
  int64_t stride, words, rows, share;

  void fetch(int64_t tile) const {
    for (int64_t row = tile * share; row < smaller(rows, (tile + 1) * share); ++row)
      for (int64_t at = 0; at < words; at += 16) __builtin_prefetch(from + row * stride + at, 0, 2);
  }
};

// Words k to k + words of `rows` rows of the block from row j on, before `tiles` tiles.
inline PieceAhead piece_ahead(const Panels& c, int64_t j, int64_t rows, int64_t k, int64_t words, int64_t tiles) {
  return {c.in_place + j * c.row_words + k, c.row_words, smaller(words, c.row_words - k), rows, (rows + tiles - 1) / tiles};
}

// An epilogue, and before each tile a share of what comes next.
template <class Epilogue>
struct Ahead {
  Epilogue epilogue;
  const PieceAhead* next;
  int64_t* tiles;  // so far
  inline Ahead from_row(int64_t row) const { return {epilogue.from_row(row), next, tiles}; }
  inline void fetch(int r, int v) const {
    if (r == 0 && v == 0) next->fetch((*tiles)++);
    epilogue.fetch(r, v);
  }
  inline void operator()(int r, int v, Vec x) const { epilogue(r, v, x); }
};

template <class Base, class Epilogue>
inline void multiply_piece(Base, const float* a, int64_t a_stride, int64_t rows, const float* piece, int64_t steps, int vectors,
                           const Epilogue& epilogue, const PieceAhead& next) {
  int64_t tiles = 0;
  multiply_panel(Base{}, a, a_stride, rows, piece, steps, vectors, Ahead<Epilogue>{epilogue, &next, &tiles});
}

template <class Base>
inline void score_rows(Wide<Base>, const float* a, int64_t a_stride, int64_t rows, const Panels& c, int64_t padded, float* scores,
                       int64_t score_stride) {
  constexpr int64_t kSteps = Base::kStepChunk;
  alignas(64) float piece[kSteps * kPanel];
  const int64_t tiles = rows / kTileRows;
  for (int64_t k = 0; k < c.row_words; k += kSteps) {
    for (int64_t j = 0; j < padded; j += kPanel) {
      pack_columns(c.in_place + j * c.row_words + k, c.row_words, smaller(kSteps, c.row_words - k), piece);
      const bool last = j + kPanel == padded;
      const PieceAhead next = piece_ahead(c, last ? 0 : j + kPanel, kPanel, last ? k + kSteps : k, kSteps, tiles);
      const int64_t steps = smaller(kSteps, Base::steps(c.width) - k);
      const StoreTile to{scores + j, score_stride};
      if (k == 0) {
        multiply_piece(Base{}, a + k, a_stride, rows, piece, steps, kVecs, to, next);
      } else {
        multiply_piece(Base{}, a + k, a_stride, rows, piece, steps, kVecs, AddTile{to.c, to.stride}, next);
      }
    }
  }
}

template <class Base, class Epilogue>
inline void sum_rows(Wide<Base>, const float* weights, int64_t weight_stride, int64_t rows, int64_t columns, const Panels& c,
                     Epilogue sums) {
  constexpr int64_t kWords = kPanel / Base::kPack;
  alignas(64) float piece[Base::kStepChunk * kPanel];
  const int64_t steps = Base::steps(columns);
  for (int64_t d = 0; d < c.padded_width; d += kPanel) {
    const int vectors = int(smaller(kPanel, c.padded_width - d) / kLanes);
    const int64_t k = d / Base::kPack;
    pack_rows(Base{}, c.in_place + k, c.row_words, columns, vectors, piece);
    multiply_piece(Base{}, weights, weight_stride, rows, piece, steps, vectors, Epilogue(sums.from_column(d)),
                   piece_ahead(c, 0, columns, k + kWords, kWords, rows / kTileRows));
  }
}

// Nothing: pieces are fetched one by one.
template <class Base>
inline Prefetch after_block(Wide<Base>, const Streamed&, const Panels&, const Block&, int64_t, int64_t, int64_t) {
  return {nullptr, 0, 64};
}

}  // namespace
