// How products read matrices: rows packed one by one (A), blocks of columns packed in panels (B), weights in place of scores (A).
//
// Whatever its element type a row is widened to float, then written as the product wants it: floats, or groups of bf16 parts (amx.h).
#pragma once

#include "engine/element.h"
#include "engine/panel.h"
#ifdef KDFAST_TILE_INSTRUCTIONS
#include "engine/amx.h"
#endif

namespace {

using kdfast::ElementType;
using kdfast::Matrix;
using kdfast::Precision;

// f(elements), a pointer of the matrix's type.
template <class F>
inline void with_elements(const Matrix& matrix, const F& f) {
  switch (matrix.type) {
    case ElementType::kFloat32:
      return f(static_cast<const float*>(matrix.data));
    case ElementType::kBFloat16:
      return f(static_cast<const BFloat16*>(matrix.data));
    case ElementType::kFloat16:
      return f(static_cast<const Half*>(matrix.data));
  }
}

// f(product) for the product that serves `precision` on this instruction set.
template <class F>
inline auto with_product(Precision precision, const F& f) {
#ifdef KDFAST_TILE_INSTRUCTIONS
  switch (precision) {
    case Precision::kFloat32:
      return f(TileProduct<3>{});
    case Precision::kBFloat16x3:
      return f(TileProduct<2>{});
    case Precision::kBFloat16:
      return f(TileProduct<1>{});
    default:
      break;
  }
#else
#ifdef KDFAST_BF16_INSTRUCTIONS
  if (precision == Precision::kBFloat16) return f(BFloat16Product{});
#endif
  (void)precision;
#endif
  return f(Float32Product{});
}

// f(product), which returns whether the product could hold its operands. Parts of an infinity cannot: inf - inf is NaN. Such a call,
// whose loss is lost already, is done once more in plain floats, so that it is lost as in the formula.
template <class F>
inline void with_sound_product(Precision precision, const F& f) {
  if (!with_product(precision, f)) f(Float32Product{});
}

// The words of scratch that f(product) counts, enough for either product.
template <class F>
inline int64_t scratch_words(Precision precision, const F& f) {
  const int64_t words = with_product(precision, f), plain = f(Float32Product{});
  return words > plain ? words : plain;
}

// Hands out pieces of one allocation, in 4-byte words; without one it only counts.
struct Arena {
  float* base;
  int64_t words = 0;

  float* take(int64_t count) {
    float* const at = base == nullptr ? nullptr : base + words;
    words += round_up(count, 16);
    return at;
  }
};

// A block of columns C, [block, width], as the second factor of two products.
struct Panels {
  float* columns;  // for S = R C^T: [column / panel][steps of width][panel]; null where C is not scored
  float* rows;     // for W C: [width / panel][steps of the block][panel]; null where C is not summed
  float* staging;  // [block][row_words]: the block's packed rows
  const float* in_place;  // the block's rows for RowProduct (in_place.inl), padded_width apart: the matrix's own or in `rows`,
  int64_t in_place_rows;  // and how many of them there are
  int64_t width, padded_width, row_words, block, block_words;

  template <class Product>
  void plan(Product, int64_t columns_width, int64_t block_columns, bool scored, bool summed, Arena& arena) {
    constexpr bool kStaged = !__is_base_of(RegisterTiles<1>, Product);  // floats are staged in `rows`
    width = columns_width, padded_width = round_up(width, kLanes), row_words = Product::words(width);
    block = block_columns, block_words = Product::words(block);
    columns = scored ? arena.take(block * row_words) : nullptr;
    rows = summed || !kStaged ? arena.take(block_words * padded_width) : nullptr;
    staging = kStaged ? arena.take(block * row_words) : nullptr;
  }
};

template <class Product>
struct Packing;  // pack_row and pack_block return whether the product can hold all the numbers

// Floats.
template <>
struct Packing<Float32Product> {
  // Row `row` of the matrix, or its negative.
  static bool pack_row(const Matrix& matrix, int64_t row, int64_t width, bool negate, float* to) {
    with_elements(matrix, [&](const auto* elements) {
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec x = load_row(elements + row * width, d, width);
        store(to + d, negate ? -x : x);
      }
    });
    return true;
  }

  // Rows `first` to `first + columns` of the matrix, and zeros up to `padded`: kLanes rows at a time, which are transposed out of L1.
  static bool pack_block(const Panels& p, const Matrix& matrix, int64_t first, int64_t columns, int64_t padded) {
    with_elements(matrix, [&](const auto* elements) {
      for (int64_t j = 0; j < padded; j += kLanes) {
        for (int64_t d0 = 0; d0 < p.padded_width; d0 += kPanel) {
          const int64_t panel = smaller(kPanel, p.padded_width - d0);
          float* const rows = p.rows + d0 * p.block + j * panel;
          for (int64_t i = 0; i < kLanes; ++i)
            for (int64_t d = 0; d < panel; d += kLanes)
              store(rows + i * panel + d, j + i < columns ? load_row(elements + (first + j + i) * p.width, d0 + d, p.width) : Vec{});
          if (p.columns == nullptr) continue;
          for (int64_t d = 0; d < panel; d += kLanes)
            transpose(rows + d, panel, p.columns + (j / kPanel * p.row_words + d0 + d) * kPanel + j % kPanel, kPanel);
        }
      }
    });
    return true;
  }

  // The weights of columns `at` to `at + 2 kLanes`.
  static void store_weights(float* weights, int64_t at, Vec first, Vec second) {
    store(weights + at, first);
    store(weights + at + kLanes, second);
  }
};

#ifdef KDFAST_BF16_INSTRUCTIONS
// Words of two bf16 that are neighbours along the inner dimension: two d of one column in C^T, two columns of one d in C.
template <class Product>
struct Packing {
  static constexpr int kParts = Product::kParts;

  static __m512i round_pairs(Vec first, Vec second) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
  static Vec widen(__m256i x) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

  static bool pack_row(const Matrix& matrix, int64_t row, int64_t width, bool negate, float* to) {
    Vec rest = {};  // 0, or NaN after an infinity
    with_elements(matrix, [&](const auto* elements) {
      for (int64_t d = 0; d < width; d += 2 * kLanes) {
        Vec x0 = load_row(elements + row * width, d, width), x1 = load_row(elements + row * width, d + kLanes, width);
        if (negate) x0 = -x0, x1 = -x1;
        for (int part = 0; part < kParts; ++part, to += kLanes) {
          const __m512i pairs = round_pairs(x0, x1);
          _mm512_storeu_si512(to, pairs);
          if (part + 1 == kParts) continue;
          x0 -= widen(_mm512_castsi512_si256(pairs));
          x1 -= widen(_mm512_extracti64x4_epi64(pairs, 1));
        }
        if constexpr (kParts > 1) rest += (x0 - x0) + (x1 - x1);
      }
    });
    return total(rest) == 0;
  }

  // The same from row `begin` of the block on, a multiple of kLanes: what comes before is packed already.
  static bool pack_block(const Panels& p, const Matrix& matrix, int64_t first, int64_t columns, int64_t padded, int64_t begin = 0) {
    bool sound = true;
    for (int64_t j = begin; j < columns; ++j) sound &= pack_row(matrix, first + j, p.width, false, p.staging + j * p.row_words);
    __builtin_memset(p.staging + columns * p.row_words, 0, size_t((padded - columns) * p.row_words) * 4);
    if (p.columns != nullptr)
      for (int64_t j = begin; j < padded; j += kLanes)
        for (int64_t k = 0; k < p.row_words; k += kLanes)
          transpose(p.staging + j * p.row_words + k, p.row_words, p.columns + (j / kPanel * p.row_words + k) * kPanel + j % kPanel, kPanel);
    if (p.rows != nullptr) pair_columns(p, begin, padded);
    return sound;
  }

  // Two columns' 32 values of d become two vectors of pairs (c_j[d], c_j+1[d]): the first 16 d, then the other 16.
  static void pair_columns(const Panels& p, int64_t begin, int64_t padded) {
    static const uint16_t kLowHalf[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                          8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_loadu_si512(kLowHalf);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t j = begin; j < padded; j += 2) {
      const int64_t first_step = j / 32 * 16 * kParts + j % 32 / 2;
      for (int64_t d = 0; d < p.padded_width; d += kLanes) {
        const int64_t d0 = d / kPanel * kPanel, panel = smaller(kPanel, p.padded_width - d0);
        const float* from = p.staging + j * p.row_words + d / 32 * 16 * kParts;
        float* to = p.rows + d0 * p.block_words + first_step * panel + (d - d0);
        const __m512i half = d / kLanes % 2 == 0 ? low : high;
        for (int part = 0; part < kParts; ++part, from += 16, to += 16 * panel)
          _mm512_storeu_si512(to, _mm512_permutex2var_epi16(_mm512_loadu_si512(from), half, _mm512_loadu_si512(from + p.row_words)));
      }
    }
  }

  // Leading parts are cut off, not rounded, which is cheaper; what is cut off is exact all the same.
  static void store_weights(float* weights, int64_t at, Vec first, Vec second) {
    float* to = weights + at / 2 * kParts;
    if constexpr (kParts > 1) {
      static const uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                          33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
      const __m512i upper = _mm512_loadu_si512(kUpper);
      const IntVec mask = IntVec{} + int32_t(0xffff0000);
      for (int part = 0; part + 1 < kParts; ++part, to += kLanes) {
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16((__m512i)first, upper, (__m512i)second));
        first -= (Vec)((IntVec)first & mask);
        second -= (Vec)((IntVec)second & mask);
      }
    }
    _mm512_storeu_si512(to, round_pairs(first, second));
  }
};
#endif

}  // namespace
