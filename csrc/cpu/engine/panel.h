// Register-tiled matrix product over packed panels: C[rows, panel] from A[rows, steps] and B[steps, panel].
//
// A tile is 6 rows by one panel of kVecs vectors. AVX-512 has 32 registers: 6 x 4 = 24 accumulators, 4 vectors of B and
// one broadcast of A make 29. Each step then issues 24 multiply-adds for 4 + 6 = 10 loads, so two multiply-adds a cycle
// need less than one load a cycle, and 24 independent chains hide a latency of 4 cycles three times over. AVX2 has
// 16 registers: 6 x 2 accumulators, 2 of B, 1 or 2 of A.
//
// What becomes of the accumulators is the Epilogue's business: epilogue(row, vector, accumulator) at the end, and
// epilogue.fetch(row, vector) at the start, for what it will read then.
#pragma once

#include "engine/simd.h"

namespace {

constexpr int kTileRows = 6;
constexpr int kPanel = kVecs * kLanes;  // words across a panel

// What every product on vector registers says of itself. A product works on 4-byte words of A and B: one float, or a pair of bf16.
template <int kPack_>
struct RegisterTiles {
  static constexpr int kPack = kPack_;                // elements of the inner dimension in a word
  static constexpr int kParts = 1;                    // numbers that an element is the sum of (see amx.h)
  static constexpr int kRowMultiple = kTileRows;      // rows are padded to it
  static constexpr int64_t kBlock = 128 * kPack;      // columns packed at a time: W C is one chunk of steps
  static constexpr int64_t kStepChunk = 128;          // inner steps of a product: 128 x 64 words = 32 KB of panel, inside L1
  static constexpr int64_t kRowChunk = 192;           // rows that pass over a panel while it stays in L1
  static constexpr int64_t kRowsToPack = 512;         // the products of so many rows make the packing of a block small
  struct Session {};                                  // what a thread sets up before its products, and undoes after

  static constexpr int64_t words(int64_t elements) { return round_up(elements, kLanes * kPack) / kPack; }  // of a packed row
  static constexpr int64_t steps(int64_t elements) { return (elements + kPack - 1) / kPack; }              // those that count
};

// The product for the columns from `j` on (amx.h has one that depends on them).
template <class Product>
inline Product from_column(Product product, int64_t) {
  return product;
}

struct Float32Product : RegisterTiles<1> {
  using Swapped = Float32Product;  // for B^T A^T with the bits of A B
  static inline Vec broadcast(const float* p) { return splat(*p); }
  static inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if KDFAST_LANES == 16
    // Written out because gcc picks among three forms of this instruction, and then moves accumulators about to suit.
    asm("vfmadd231ps %1, %2, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
#else
    return ::multiply_add(a, b, c);
#endif
  }
};

#if defined(KDFAST_BF16_INSTRUCTIONS) && !defined(KDFAST_TILE_INSTRUCTIONS)
// vdpbf16ps: acc += a.low * b.low + a.high * b.high in each 4-byte lane.
struct BFloat16Product : RegisterTiles<2> {
  using Swapped = BFloat16Product;
  static inline Vec broadcast(const float* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return (Vec)_mm512_set1_epi32(pair);
  }
  static inline Vec multiply_add(Vec a, Vec b, Vec c) { return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
};
#endif

#if KDFAST_LANES == 16
// 0 by an instruction that occupies no port, where a copy of another register does; before start_of_loop() whatever the compiler prefers.
inline Vec zero() {
  Vec x;
  asm volatile("vpxord %0, %0, %0" : "=v"(x));
  return x;
}
// Puts a loop that begins here on a cache line: where lines divide it decides how fast its instructions come (4 % of a product).
inline void start_of_loop() { asm volatile(".p2align 6"); }
#else
inline Vec zero() { return Vec{}; }
inline void start_of_loop() {}
#endif

template <class Product, int kWidth, class Epilogue>
inline __attribute__((always_inline)) void tile(const float* a, int64_t a_stride, const float* b, int64_t steps,
                                                const Epilogue& epilogue) {
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) epilogue.fetch(r, v);
  Vec acc[kTileRows][kWidth];
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) acc[r][v] = zero();
  start_of_loop();
  for (int64_t k = 0; k < steps; ++k, b += kWidth * kLanes) {
    Vec bk[kWidth];
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) bk[v] = load(b + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      const Vec ark = Product::broadcast(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v) acc[r][v] = Product::multiply_add(ark, bk[v], acc[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) epilogue(r, v, acc[r][v]);
}

// What becomes of a tile, at row r and vector v of it. C = A B:
struct StoreTile {
  float* c;
  int64_t stride;
  inline float* at(int r, int v) const { return c + r * stride + v * kLanes; }
  inline StoreTile from_row(int64_t row) const { return {c + row * stride, stride}; }
  inline StoreTile from_column(int64_t d) const { return {c + d, stride}; }
  inline void fetch(int, int) const {}
  inline void operator()(int r, int v, Vec x) const { store(at(r, v), x); }
};

// C += A B
struct AddTile {
  float* c;
  int64_t stride;
  inline float* at(int r, int v) const { return c + r * stride + v * kLanes; }
  inline AddTile from_row(int64_t row) const { return {c + row * stride, stride}; }
  inline AddTile from_column(int64_t d) const { return {c + d, stride}; }
  inline void fetch(int r, int v) const { __builtin_prefetch(at(r, v), 1); }
  inline void operator()(int r, int v, Vec x) const { store(at(r, v), load(at(r, v)) + x); }
};

// C = diag(factor) C + A B
struct ScaleAddTile {
  float* c;
  int64_t stride;
  const float* factor;
  inline float* at(int r, int v) const { return c + r * stride + v * kLanes; }
  inline ScaleAddTile from_row(int64_t row) const { return {c + row * stride, stride, factor + row}; }
  inline ScaleAddTile from_column(int64_t d) const { return {c + d, stride, factor}; }
  inline void fetch(int r, int v) const { __builtin_prefetch(at(r, v), 1); }
  inline void operator()(int r, int v, Vec x) const { store(at(r, v), multiply_add(splat(factor[r]), load(at(r, v)), x)); }
};

// tile<Product, kWidth> for the narrower last panel of a matrix whose width is not a multiple of kPanel.
template <class Product, int kWidth, class Epilogue>
inline __attribute__((always_inline)) void narrow_tile(int vectors, const float* a, int64_t a_stride, const float* b,
                                                       int64_t steps, const Epilogue& epilogue) {
  if (vectors == kWidth) {
    tile<Product, kWidth>(a, a_stride, b, steps, epilogue);
  } else if constexpr (kWidth > 1) {
    narrow_tile<Product, kWidth - 1>(vectors, a, a_stride, b, steps, epilogue);
  }
}

// Every 6-row tile of `rows` rows (a multiple of 6) against one panel of `vectors` <= kVecs vectors.
template <class Product, class Epilogue>
__attribute__((noinline)) void multiply_panel(Product, const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t steps,
                                              int vectors, Epilogue epilogue) {
  for (int64_t row = 0; row < rows; row += kTileRows)
    narrow_tile<Product, kVecs>(vectors, a + row * a_stride, a_stride, b, steps, epilogue.from_row(row));
}

}  // namespace
