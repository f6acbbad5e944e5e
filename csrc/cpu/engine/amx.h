// The matrix product over packed panels (panel.h) on tile registers: Intel AMX with bf16.
//
// A tile register holds 16 rows of 64 bytes. One instruction adds A[16, 32] B[32, 16] in bf16 to C[16, 16] in float: 16,384
// floating-point operations in 16 cycles, where loading a tile from L1 takes 12. Two tiles of A against two of B are four products
// for four loads, 48 cycles of loads under 64 of products; the four sums, 2 of A and 2 of B fill the eight registers.
//
// Floats are multiplied as sums of bf16 parts, x = x0 + x1 + x2 with 8 bits of mantissa in each: three parts hold a float exactly, and
// of the nine products the six with i + j <= 2 hold everything above 2^-25 of |x y|, half a unit in a float's last place. Six products at 16
// times the rate of vfmadd are more than twice as fast, and as exact. Two parts, three products, err by about 2^-16.
//
// The panels are those of vdpbf16ps: B's words are pairs along the inner dimension, as this instruction wants them too. A group of 32
// elements along the inner dimension is 16 words of part 0, then 16 of part 1, then 16 of part 2.
// Every row of a tile must lie within a cache line, else each load costs two: strides are multiples of 16 words.
#pragma once

#include "engine/panel.h"

namespace {

// The instructions by hand: a template cannot pass its register to the compilers' macros, which moreover may leave out that memory
// is read. The compiler keeps nothing in tile registers, so a function call in between is the only thing that could change them.
template <int kTile>
inline void load_tile(const float* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,4), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(float* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,4)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kSum, int kA, int kB>
inline void multiply_add_tile() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

// While it lives, this thread has eight tiles of 16 rows of 64 bytes. Afterwards the registers are clean, and a switch of threads
// need not save their 8 KB.
struct TileSession {
  TileSession() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape = {};
    shape.palette = 1;
    for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~TileSession() { asm volatile("tilerelease"); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

template <int kParts>
struct SymmetricTiles;

// Products of numbers in `kParts` bf16 parts. kSwapped: A and B exchange the order of their parts, so that B^T A^T has the same bits as A B.
template <int kParts_, bool kSwapped = false>
struct TileProduct {
  static constexpr int kParts = kParts_;
  static constexpr int kRowMultiple = 16;
  static constexpr int64_t kBlock = kParts == 1 ? 512 : 256;                   // columns packed at a time
  static constexpr int64_t kStepChunk = 64 * kParts;   // 128 elements: 32 rows of A, 24 KB in three parts, stay in L1 while B streams from L2
  static constexpr int64_t kRowChunk = 32;                 // 32 rows of scores, written by tiles, weighed and read by tiles in L1
  static constexpr int64_t kRowsToPack = 1024;             // the products are faster, the packing is not
  using Swapped = TileProduct<kParts, !kSwapped>;
  using Symmetric = SymmetricTiles<kParts>;
  using Session = TileSession;

  static constexpr int64_t words(int64_t elements) { return round_up(elements, 32) / 2 * kParts; }
  static constexpr int64_t steps(int64_t elements) { return words(elements); }

  // The parts that are multiplied, each term sharing one with the term before: that tile stays in its register.
  static constexpr int kTerms = kParts * (kParts + 1) / 2;
  static constexpr int first(int term) { return kParts == 3 ? "001102"[term] - '0' : kParts == 2 ? "001"[term] - '0' : 0; }
  static constexpr int second(int term) { return kParts == 3 ? "211000"[term] - '0' : kParts == 2 ? "100"[term] - '0' : 0; }
  static constexpr int a_part(int term) { return kSwapped ? second(term) : first(term); }
  static constexpr int b_part(int term) { return kSwapped ? first(term) : second(term); }
};
using BFloat16Product = TileProduct<1>;

// One term of a group, `kRows` x `kVectors` tiles: A in registers 4 and 5, B in 6 and 7; a part that the term before had is there already.
template <class Product, int kTerm, int kRows, int kVectors>
inline __attribute__((always_inline)) void add_term(const float* a, int64_t a_stride, const float* b, int64_t b_stride) {
  constexpr int kA = Product::a_part(kTerm), kB = Product::b_part(kTerm);
  constexpr bool kLoadA = kTerm == 0 || kA != Product::a_part(kTerm - 1), kLoadB = kTerm == 0 || kB != Product::b_part(kTerm - 1);
  const float* const at = a + 16 * kA;
  const float* const bt = b + 16 * kB * b_stride;
  if constexpr (kLoadA) load_tile<4>(at, a_stride);
  if constexpr (kLoadB) load_tile<6>(bt, b_stride);
  multiply_add_tile<0, 4, 6>();
  if constexpr (kVectors == 2) {
    if constexpr (kLoadB) load_tile<7>(bt + kLanes, b_stride);
    multiply_add_tile<1, 4, 7>();
  }
  if constexpr (kRows == 2) {
    if constexpr (kLoadA) load_tile<5>(at + 16 * a_stride, a_stride);
    multiply_add_tile<2, 5, 6>();
    if constexpr (kVectors == 2) multiply_add_tile<3, 5, 7>();
  }
  if constexpr (kTerm + 1 < Product::kTerms) add_term<Product, kTerm + 1, kRows, kVectors>(a, a_stride, b, b_stride);
}

// C = A B for kRows x kVectors tiles, their sums in registers 0 to 3.
template <class Product, int kRows, int kVectors>
inline __attribute__((always_inline)) void store_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t steps,
                                                       float* c, int64_t c_stride) {
  constexpr bool kSecondRow = kRows == 2, kSecondVector = kVectors == 2;
  clear_tile<0>();
  if constexpr (kSecondVector) clear_tile<1>();
  if constexpr (kSecondRow) clear_tile<2>();
  if constexpr (kSecondRow && kSecondVector) clear_tile<3>();
  constexpr int kGroup = 16 * Product::kParts;
  for (int64_t k = 0; k < steps; k += kGroup, a += kGroup, b += kGroup * b_stride)
    add_term<Product, 0, kRows, kVectors>(a, a_stride, b, b_stride);
  store_tile<0>(c, c_stride);
  if constexpr (kSecondVector) store_tile<1>(c + kLanes, c_stride);
  if constexpr (kSecondRow) store_tile<2>(c + 16 * c_stride, c_stride);
  if constexpr (kSecondRow && kSecondVector) store_tile<3>(c + 16 * c_stride + kLanes, c_stride);
}

// The same, given to an epilogue by way of L1. A running sum enters after the block's own, not before: else each term would round to it.
template <class Product, int kRows, int kVectors, class Epilogue>
inline __attribute__((always_inline)) void tile_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t steps,
                                                      const Epilogue& epilogue, int first_vector) {
  if constexpr (__is_same(Epilogue, StoreTile)) {
    store_block<Product, kRows, kVectors>(a, a_stride, b, b_stride, steps, epilogue.at(0, first_vector), epilogue.stride);
  } else {
    alignas(64) float c[kRows * 16 * kVectors * kLanes];
    for (int r = 0; r < kRows * 16; ++r)
      for (int v = 0; v < kVectors; ++v) epilogue.fetch(r, first_vector + v);
    store_block<Product, kRows, kVectors>(a, a_stride, b, b_stride, steps, c, kVectors * kLanes);
    for (int r = 0; r < kRows * 16; ++r)
      for (int v = 0; v < kVectors; ++v) epilogue(r, first_vector + v, load(c + (r * kVectors + v) * kLanes));
  }
}

template <int kRows_, int kVectors_>
struct TileBlock {
  static constexpr int kRows = kRows_, kVectors = kVectors_;
};

// f(row, vector, TileBlock): `rows` rows, a multiple of 16, by `vectors` vectors, two tiles by two where there are.
template <class F>
inline __attribute__((always_inline)) void for_tile_blocks(int64_t rows, int vectors, const F& f) {
  for (int64_t row = 0; row < rows; row += 32) {
    const bool two = row + 32 <= rows;
    for (int v = 0; v < vectors; v += 2) {
      if (two && v + 2 <= vectors) {
        f(row, v, TileBlock<2, 2>{});
      } else if (two) {
        f(row, v, TileBlock<2, 1>{});
      } else if (v + 2 <= vectors) {
        f(row, v, TileBlock<1, 2>{});
      } else {
        f(row, v, TileBlock<1, 1>{});
      }
    }
  }
}

// `rows` rows, a multiple of 16, against one panel. Steps are whole groups: what is packed beyond them is zero.
template <int kParts, bool kSwapped, class Epilogue>
__attribute__((noinline)) void multiply_panel(TileProduct<kParts, kSwapped>, const float* a, int64_t a_stride, int64_t rows, const float* b,
                                              int64_t steps, int vectors, Epilogue epilogue) {
  const int64_t b_stride = int64_t(vectors) * kLanes;
  for_tile_blocks(rows, vectors, [&](int64_t row, int v, auto block) __attribute__((always_inline)) {
    tile_block<TileProduct<kParts, kSwapped>, block.kRows, block.kVectors>(a + row * a_stride, a_stride, b + v * kLanes, b_stride, steps,
                                                                          epilogue.from_row(row), v);
  });
}

// ---- a matrix by its own transpose --------------------------------------------------------------------------------------

// Element (i, j) has the bits of (j, i): above the diagonal parts are in order, below it they are swapped. The first column is `ahead` of the
// first row.
template <int kParts>
struct SymmetricTiles : TileProduct<kParts> {
  int64_t ahead;

  explicit SymmetricTiles(int64_t ahead) : ahead(ahead) {}
};
template <int kParts>
inline SymmetricTiles<kParts> from_column(SymmetricTiles<kParts> product, int64_t j) {
  return SymmetricTiles<kParts>(product.ahead + j);
}

// A block across the diagonal is made both ways, each element taken from one.
template <int kParts, int kRows, int kVectors, class Epilogue>
inline void diagonal_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t steps, const Epilogue& epilogue,
                           int first_vector, int64_t ahead) {
  using Product = TileProduct<kParts>;
  constexpr int kStride = kVectors * kLanes;
  alignas(64) float above[kRows * 16 * kStride], below[kRows * 16 * kStride];
  store_block<Product, kRows, kVectors>(a, a_stride, b, b_stride, steps, above, kStride);
  store_block<typename Product::Swapped, kRows, kVectors>(a, a_stride, b, b_stride, steps, below, kStride);
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int r = 0; r < kRows * 16; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int at = r * kStride + v * kLanes;
      epilogue(r, first_vector + v, lane + int32_t(ahead + v * kLanes - r) > 0 ? load(above + at) : load(below + at));
    }
  }
}

template <int kParts, class Epilogue>
__attribute__((noinline)) void multiply_panel(SymmetricTiles<kParts> product, const float* a, int64_t a_stride, int64_t rows, const float* b,
                                              int64_t steps, int vectors, Epilogue epilogue) {
  using Product = TileProduct<kParts>;
  const int64_t b_stride = int64_t(vectors) * kLanes;
  for_tile_blocks(rows, vectors, [&](int64_t row, int v, auto block) {
    constexpr int kRows = block.kRows, kVectors = block.kVectors;
    const float *const ar = a + row * a_stride, *const bv = b + v * kLanes;
    const Epilogue at = epilogue.from_row(row);
    const int64_t ahead = product.ahead + v * kLanes - row;
    if (ahead >= 16 * kRows) {
      tile_block<Product, kRows, kVectors>(ar, a_stride, bv, b_stride, steps, at, v);
    } else if (ahead <= -kVectors * kLanes) {
      tile_block<typename Product::Swapped, kRows, kVectors>(ar, a_stride, bv, b_stride, steps, at, v);
    } else {
      diagonal_block<kParts, kRows, kVectors>(ar, a_stride, bv, b_stride, steps, at, v, ahead);
    }
  });
}

// The rate of four independent sums; see probe.inl.
[[maybe_unused]] double probe(BFloat16Product, int64_t steps) {
  TileSession session;
  uint16_t numbers[4 * 512];  // of all signs and mantissas, around 1
  for (int i = 0; i < 4 * 512; ++i) numbers[i] = uint16_t(((i * 40503) & 0x80ff) | 0x3f00);
  const float* const words = reinterpret_cast<const float*>(numbers);
  load_tile<4>(words, 16), load_tile<5>(words + 256, 16), load_tile<6>(words + 512, 16), load_tile<7>(words + 768, 16);
  clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
  for (int64_t step = 0; step < steps; ++step) {
    multiply_add_tile<0, 4, 6>();
    multiply_add_tile<1, 4, 7>();
    multiply_add_tile<2, 5, 6>();
    multiply_add_tile<3, 5, 7>();
  }
  return double(steps) * 4 * 16 * 16 * 32 * 2;
}

}  // namespace
