// Sums of the weights of a pass by columns.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/stream.inl"

namespace {

// Sums of a block's weights by columns, in floats over a few rows and in double beyond.
struct ColumnWeights {
  double* to = nullptr;   // [columns]; null: not wanted
  float* part = nullptr;  // [block]
  int64_t first = 0, columns = 0, rows = 0;

  static constexpr int64_t kRows = 64;

  void plan(int64_t block, Arena& arena) { part = arena.take(block); }

  void begin_block(const Block& block) {
    flush();
    first = block.first, columns = block.columns;
    __builtin_memset(part, 0, size_t(4 * block.padded));
  }
  void add(int64_t j, Vec weight) const {
    if (to != nullptr) store(part + j, load(part + j) + weight);
  }
  void end_row() {
    if (++rows == kRows) flush();
  }
  void flush() {
    if (to != nullptr && rows > 0) {
      for (int64_t j = 0; j < columns; ++j) to[first + j] += double(part[j]);
      __builtin_memset(part, 0, size_t(4 * columns));
    }
    rows = 0;
  }
};

}  // namespace
