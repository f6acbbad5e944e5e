// Where the packed copy of a bank has what (packed_bank.h), and its panels for a pass that streams the bank.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/stream.inl"
#include "similarity/packed_bank.h"

namespace {

using kdfast::PackedBank;
using kdfast::PackedHeader;

// Products of pairs of bf16 have one. Floats have none: both panels of theirs would take longer to fetch from memory than to make.
template <class Product>
constexpr bool keeps_panels() {
  return Product::kParts == 1 && !__is_base_of(RegisterTiles<1>, Product);
}

// A code for the layout of Packing<Product>::pack_block; equal codes, equal layouts.
template <class Product>
constexpr uint64_t packed_form() {
  return uint64_t(0x6b646261) << 32 | uint64_t(Product::kRowMultiple) << 24 | uint64_t(kLanes) << 16 | uint64_t(kPanel) << 8 | uint64_t(Product::kBlock / 16);
}

// In words. Rows so wide that a pass takes smaller blocks of them have no copy.
struct PackedLayout {
  int64_t blocks, sound, first, stride;  // `first` of the blocks' panels

  template <class Product>
  PackedLayout(Product, const PackedBank& bank) {
    const bool whole = keeps_panels<Product>() && block_columns<Product>(bank.rows, bank.width) == Product::kBlock;
    blocks = whole ? bank.rows / Product::kBlock : 0;
    sound = int64_t(sizeof(PackedHeader)) / 4;
    first = sound + round_up(blocks, 16);
    stride = Product::kBlock * Product::words(bank.width) + Product::words(Product::kBlock) * round_up(bank.width, kLanes);
  }
  int64_t words() const { return blocks == 0 ? 0 : first + blocks * stride; }
};

template <class Product>
inline PackedHeader packed_header(Product, const PackedBank& bank) {
  return {packed_form<Product>(), bank.rows, bank.width, int64_t(bank.matrix.type), int64_t(bank.matrix.data), bank.version, {}};
}

// The blocks, where `bank.words` is the copy of these rows for this product; else none.
template <class Product>
inline PackedPanels packed_panels(Product, const PackedBank& bank) {
  const PackedLayout at(Product{}, bank);
  if (bank.words == nullptr || at.blocks == 0) return {};
  const PackedHeader wanted = packed_header(Product{}, bank);
  if (__builtin_memcmp(bank.words, &wanted, __builtin_offsetof(PackedHeader, version)) != 0) return {};
  return {reinterpret_cast<const float*>(bank.words + at.first), bank.words + at.sound, at.blocks, at.stride};
}

}  // namespace
