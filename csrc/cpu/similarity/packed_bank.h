// The packed copy of a bank: its whole blocks of rows in bf16, as products read them, kept from call to call.
//
// A header, a word for each block that says whether the product can hold its numbers, then the blocks: panels for scores, panels for sums
// (engine/packing.inl). Rows that do not fill a block are in the bank alone.
#pragma once

#include "engine/element.h"

namespace kdfast {

constexpr int64_t kPackedStep = 512;  // rows: whole blocks of every product, so that a bank can be cut there

// What the copy serves: a product that reads its form, on these rows at this address. The version of their tensor, at which it was in step,
// is for the bank to compare.
struct PackedHeader {
  uint64_t form;  // of the panels; see packed_panels.inl
  int64_t rows, width, type, address;
  int64_t version;
  int64_t reserved[2];
};

struct PackedBank {
  Matrix matrix;  // [rows, width], contiguous
  int64_t rows, width, version;
  int32_t* words;  // the copy
};

// One instruction set's.
struct PackedBankKernels {
  int64_t (*packed_words)(const PackedBank&);      // of the copy; 0: there is none
  bool (*packed_in_step)(const PackedBank&);       // whether `words` is the copy of these rows, at this version, for these kernels
  void (*packed_stamp)(const PackedBank&);         // says that it is
  int64_t (*packed_workspace)(const PackedBank&);  // floats, for packed_write
  void (*packed_write)(const PackedBank&, int64_t begin, int64_t end, float* workspace);
};

}  // namespace kdfast
