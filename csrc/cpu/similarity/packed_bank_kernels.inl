// Writes the packed copy of a bank, all of it or a few rows, and tells whether it is in step.
//
// A unit compiled once for each instruction set, and its part of the dispatch table.
#include "similarity/packed_panels.inl"

namespace {

using kdfast::Precision;

int64_t packed_words(const PackedBank& bank) {
  return with_product(Precision::kBFloat16, [&](auto product) { return PackedLayout(product, bank).words(); });
}

bool packed_in_step(const PackedBank& bank) {
  return with_product(Precision::kBFloat16, [&](auto product) {
    const PackedHeader wanted = packed_header(product, bank);
    return packed_panels(product, bank).count > 0 && __builtin_memcmp(bank.words, &wanted, sizeof wanted) == 0;
  });
}

void packed_stamp(const PackedBank& bank) {
  with_product(Precision::kBFloat16, [&](auto product) {
    const PackedHeader header = packed_header(product, bank);
    __builtin_memcpy(bank.words, &header, sizeof header);
    return 0;
  });
}

// A block's packed rows, before they are turned.
int64_t packed_workspace(const PackedBank& bank) {
  return with_product(Precision::kBFloat16, [&](auto product) { return decltype(product)::kBlock * decltype(product)::words(bank.width); });
}

// Rows `begin` to `end`, with the others of their groups of kLanes. Two threads must not write in one block.
void packed_write(const PackedBank& bank, int64_t begin, int64_t end, float* workspace) {
  with_product(Precision::kBFloat16, [&](auto product) {
    using Product = decltype(product);
    if constexpr (keeps_panels<Product>()) {
      const PackedLayout at(product, bank);
      float* const blocks = reinterpret_cast<float*>(bank.words + at.first);
      Arena none{nullptr};
      Panels p;
      p.plan(product, bank.width, Product::kBlock, true, true, none);
      p.staging = workspace;
      end = smaller(end, at.blocks * Product::kBlock);
      for (int64_t from = begin / kLanes * kLanes; from < end;) {
        const int64_t block = from / Product::kBlock, first = block * Product::kBlock;
        int32_t& sound = bank.words[at.sound + block];
        if (sound == 0) from = first;  // what the product could not hold may be gone now
        const int64_t to = sound == 0 ? first + Product::kBlock : smaller(round_up(end, kLanes), first + Product::kBlock);
        p.columns = blocks + block * at.stride;
        p.rows = p.columns + Product::kBlock * p.row_words;
        sound = Packing<Product>::pack_block(p, bank.matrix, first, to - first, to - first, from - first);
        from = to;
      }
    }
    return 0;
  });
}

}  // namespace

namespace kdfast {
extern const PackedBankKernels KDFAST_UNIT(packed_bank);
const PackedBankKernels KDFAST_UNIT(packed_bank) = {
    .packed_words = packed_words,
    .packed_in_step = packed_in_step,
    .packed_stamp = packed_stamp,
    .packed_workspace = packed_workspace,
    .packed_write = packed_write,
};
}  // namespace kdfast
