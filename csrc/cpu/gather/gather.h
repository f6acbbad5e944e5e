// What the gather kernels are given: plain pointers, 64-bit sizes, no torch.
#pragma once

#include "engine/element.h"

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

// The samples of some rows of a call, each row's ordered by the block of bank rows they fall in, in a block by k.
struct GatherBlocks {
  int64_t row_begin, row_end;
  int64_t block, blocks;  // block is a power of two, at least 64, so a multiple of every panel
  uint16_t* column;       // [row_end - row_begin, K]: bank row, counted from the first of its block
  float* value;           // [row_end - row_begin, K]: weight; or what is added to the score, then the score
  const int64_t* begin;   // [row_end - row_begin, blocks + 1]: where each block's begin
};

// What becomes of a row of scores z: its value and, in their place, the derivatives of the value.
struct RowStatistic {
  const float* shift;    // a: softplus(a - z_0) + sum_{k > 0} softplus(z_k - a); null: log sum_k exp(z_k)
  int64_t shift_stride;  // 1: one for each row, 0: one for all
  const float* offset;   // [N, K]: added to the scores; -inf leaves a sample out; null: 0
  float* value;          // [N]
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

// One instruction set's.
struct GatherKernels {
  // Items begin .. end: of the N K scores, of the N rows. False: an index was outside the bank.
  bool (*gather_similarity)(const GatherParams&, int64_t begin, int64_t end);
  bool (*gather_weighted_sum)(const GatherParams&, int64_t begin, int64_t end);
  // The statistic of one row of scores, which become weights; and of rows begin .. end with their weighted sums.
  void (*gather_row_statistic)(const GatherParams&, const RowStatistic&, int64_t row, float* scores, int64_t positive);
  bool (*gather_statistic)(const GatherParams&, const RowStatistic&, int64_t begin, int64_t end, float* scores);
  int64_t (*gather_block)(const GatherParams&);  // bank rows in a block, 0 where single rows are faster
  int64_t (*gather_blocks_workspace)(const GatherParams&, const GatherBlocks&);  // floats
  // Blocks first .. last: scores added to the samples' values; the sums of their samples into sums [rows, width].
  void (*gather_blocks_scores)(const GatherParams&, const GatherBlocks&, int64_t first, int64_t last, float* workspace);
  void (*gather_blocks_sums)(const GatherParams&, const GatherBlocks&, int64_t first, int64_t last, float* workspace, float* sums);
  int64_t (*gather_scatter_workspace)(const ScatterParams&);  // floats
  void (*gather_scatter)(const ScatterParams&, int64_t first, int64_t last, float* workspace);  // blocks first .. last
};

}  // namespace kdfast
