// What the gather kernels are given: plain pointers, 64-bit sizes, no torch.
#pragma once

#include "element.h"

namespace kdfast {

// One call over bank rows k_m and sampled rows index_nk. Everything but the bank is contiguous.
struct GatherParams {
  ElementType type;                        // of the bank
  int64_t rows, samples, columns, width;   // N, K, M, D
  int64_t bank_stride;                     // elements from one bank row to the next
  const float* query;                      // [N, D]; null for a weighted sum
  const float* weight;                     // [N, K]; null for scores
  const void* bank;                        // [M, D], each row contiguous
  const int64_t* index;                    // [N, K]
  float* out;                              // scores [N, K] or weighted sums [N, D]
};

// A sample: its bank row, counted from the first of the row's block, and its weight, or its score once that is known.
struct BlockSample {
  int32_t column;
  float value;
};

// The samples of some rows of a call, each row's ordered by the block of `block` bank rows they fall in.
struct GatherBlocks {
  int64_t row_begin, row_end;
  int64_t block, blocks;  // block is a multiple of 64, so of every panel
  BlockSample* samples;   // [row_end - row_begin, K]
  const int64_t* begin;   // [row_end - row_begin, blocks + 1]: where in `samples` each block's begin
};

// A sample on its way to the bank row whose gradient it is part of.
struct ScatterEntry {
  int32_t row;     // n
  int32_t column;  // of the bank, counted from the first of its block
  float weight;
};

// out_m = sum over (n, k) with index_nk = m of w_nk q_n. The samples are ordered by block of bank rows, in a block by n, then k.
struct ScatterParams {
  ElementType type;                // of out
  int64_t rows, columns, width;    // N, M, D
  const float* query;              // [N, D]
  int64_t block, blocks, largest;  // bank rows in a block; blocks; samples in the fullest
  const ScatterEntry* entries;
  const int64_t* begin;            // [blocks + 1]: where in `entries` each block's begin
  void* out;                       // [M, D]
};

}  // namespace kdfast
