// The same scores and sums from matrix products with one block of bank rows after another, when rows of the bank are drawn many times.
//
// Scores: S = Q K^T for the block, from which the sampled ones are picked. Sums: weights are spread into a block W of
// zeros, and O += W K. Each bank row is read once for all queries, and D multiply-adds for a pair that nobody sampled are
// cheaper than a cache miss for one that somebody did, up to a point: see gather_by_blocks.
#pragma once

#include "gather.inl"
#include "panel.h"

namespace {

using kdfast::BlockSample;
using kdfast::GatherBlocks;

constexpr int64_t kBlockRows = 192;   // rows of a tile of S or W
constexpr int64_t kBlockSteps = 128;  // inner steps of a product: 128 x 64 floats = 32 KB of panel, inside L1

// The scratch of one thread, carved from one allocation, in floats.
struct BlockSpace {
  int64_t rows, width, stride;         // padded rows; padded width; from one row of the tile to the next
  float *panels, *tile, *operand;      // of the block; S or W; queries or sums, [rows, width]
  float* special;                      // [block]: 1 for bank rows with an infinity or NaN
  float* run;                          // [block]: sums of a run of weights; zero in between
  int64_t floats;

  BlockSpace(const GatherParams& p, const GatherBlocks& b, float* base)
      : rows(round_up(b.row_end - b.row_begin, kTileRows)),
        width(round_up(p.width, kLanes)),
        stride(b.block + kLanes),  // not a power of two: six rows must not share one L1 set
        floats(0) {
    const auto take = [&](int64_t count) {
      float* const at = base == nullptr ? nullptr : base + floats;
      floats += round_up(count, 16);
      return at;
    };
    panels = take(b.block * width);
    tile = take(smaller(rows, kBlockRows) * stride);
    operand = take(rows * width);
    special = take(b.block);
    run = take(b.block);
  }
};

// Blocks first .. last of a call, on one thread.
template <class T>
struct BlockPass {
  const GatherParams& p;
  const GatherBlocks& b;
  const BlockSpace& s;
  const T* const bank = static_cast<const T*>(p.bank);
  const int64_t count = b.row_end - b.row_begin;

  void scores(int64_t first, int64_t last) const {
    for (int64_t i = 0; i < s.rows; ++i)
      for (int64_t d = 0; d < s.width; d += kLanes)
        store(s.operand + i * s.width + d, i < count ? load_row(p.query + (b.row_begin + i) * p.width, d, p.width) : Vec{});
    for (int64_t block = first; block < last; ++block) {
      const int64_t column = block * b.block, columns = smaller(b.block, p.columns - column);
      pack_columns(column, columns);
      for (int64_t row = 0; row < count; row += kBlockRows) {
        const int64_t rows = smaller(kBlockRows, s.rows - row);
        for (int64_t j = 0; j < columns; j += kPanel) multiply_scores(row, rows, j);
        each_row(block, row, [](BlockSample* begin, BlockSample* end, const float* tile_row, int64_t) {
          for (BlockSample* sample = begin; sample < end; ++sample) sample->value = tile_row[sample->column];
        });
      }
    }
  }

  void sums(int64_t first, int64_t last, float* out) const {
    __builtin_memset(s.operand, 0, size_t(s.rows * s.width) * sizeof(float));
    __builtin_memset(s.run, 0, size_t(b.block) * sizeof(float));
    for (int64_t block = first; block < last; ++block) {
      const int64_t column = block * b.block, columns = smaller(b.block, p.columns - column);
      const bool special = pack_rows(column, columns);
      for (int64_t row = 0; row < count; row += kBlockRows) {
        const int64_t rows = smaller(kBlockRows, s.rows - row);
        __builtin_memset(s.tile, 0, size_t(rows * s.stride) * sizeof(float));
        each_row(block, row, [&](BlockSample* begin, BlockSample* end, float* tile_row, int64_t i) {
          if (special) {
            for (BlockSample* sample = begin; sample < end; ++sample) {
              if (s.special[sample->column] == 0) continue;
              add_row(*sample, column, i);
              sample->value = 0;
            }
          }
          spread(begin, end, tile_row);
        });
        multiply_sums(row, rows, columns);
      }
    }
    for (int64_t i = 0; i < count; ++i) __builtin_memcpy(out + i * p.width, s.operand + i * s.width, size_t(p.width) * sizeof(float));
  }

 private:
  // f(begin, end, row of the tile, row) for the block's samples of each of the tile's rows.
  template <class F>
  void each_row(int64_t block, int64_t row, const F& f) const {
    for (int64_t i = row; i < smaller(count, row + kBlockRows); ++i) {
      const int64_t* const range = b.begin + i * (b.blocks + 1) + block;
      f(b.samples + range[0], b.samples + range[1], s.tile + (i - row) * s.stride, i);
    }
  }

  // Adds weights to the tile. Where one row may have been drawn very often, a run of samples is added up before the next.
  void spread(const BlockSample* begin, const BlockSample* end, float* tile_row) const {
    if (end - begin <= 4 * kRun) {
      for (; begin < end; ++begin) tile_row[begin->column] += begin->value;
      return;
    }
    for (const BlockSample* stop; begin < end; begin = stop) {
      stop = begin + smaller(kRun, end - begin);
      for (const BlockSample* sample = begin; sample < stop; ++sample) s.run[sample->column] += sample->value;
      for (const BlockSample* sample = begin; sample < stop; ++sample) {
        tile_row[sample->column] += s.run[sample->column];
        s.run[sample->column] = 0;
      }
    }
  }

  // K^T in panels, [columns / panel][width][panel], zero beyond the last column.
  void pack_columns(int64_t column, int64_t columns) const {
    float square[kLanes * kLanes];
    for (int64_t j = 0; j < round_up(columns, kPanel); j += kLanes) {
      for (int64_t d = 0; d < s.width; d += kLanes) {
        for (int64_t r = 0; r < kLanes; ++r)
          store(square + r * kLanes, j + r < columns ? load_row(bank + (column + j + r) * p.bank_stride, d, p.width) : Vec{});
        transpose(square, kLanes, s.panels + (j / kPanel * s.width + d) * kPanel + j % kPanel, kPanel);
      }
    }
  }

  // K in panels, [width / panel][columns][panel]. A row that is not finite is packed as zeros, for 0 times it is not 0:
  // its samples are added one by one. Returns whether there is one.
  bool pack_rows(int64_t column, int64_t columns) const {
    bool any = false;
    for (int64_t j = 0; j < columns; ++j) {
      const T* const row = bank + (column + j) * p.bank_stride;
      Vec zero = {};
      for (int64_t d0 = 0; d0 < s.width; d0 += kPanel) {
        const int64_t panel = smaller(kPanel, s.width - d0);
        float* const to = s.panels + d0 * b.block + j * panel;
        for (int64_t d = 0; d < panel; d += kLanes) {
          const Vec x = load_row(row, d0 + d, p.width);
          zero += x * Vec{};
          store(to + d, x);
        }
      }
      const bool finite = total(zero) == 0;
      s.special[j] = finite ? 0 : 1;
      if (finite) continue;
      any = true;
      for (int64_t d0 = 0; d0 < s.width; d0 += kPanel) {
        const int64_t panel = smaller(kPanel, s.width - d0);
        __builtin_memset(s.panels + d0 * b.block + j * panel, 0, size_t(panel) * sizeof(float));
      }
    }
    return any;
  }

  void multiply_scores(int64_t row, int64_t rows, int64_t j) const {
    for (int64_t k = 0; k < s.width; k += kBlockSteps) {
      const float* const q = s.operand + row * s.width + k;
      const float* const panel = s.panels + j * s.width + k * kPanel;
      const int64_t steps = smaller(kBlockSteps, s.width - k);
      if (k == 0) {
        multiply_panel(Float32Product{}, q, s.width, rows, panel, steps, kVecs, StoreTile{s.tile + j, s.stride});
      } else {
        multiply_panel(Float32Product{}, q, s.width, rows, panel, steps, kVecs, AddTile{s.tile + j, s.stride});
      }
    }
  }

  void multiply_sums(int64_t row, int64_t rows, int64_t columns) const {
    for (int64_t d = 0; d < s.width; d += kPanel) {
      const int64_t panel = smaller(kPanel, s.width - d);
      for (int64_t k = 0; k < columns; k += kBlockSteps)
        multiply_panel(Float32Product{}, s.tile + k, s.stride, rows, s.panels + d * b.block + k * panel, smaller(kBlockSteps, columns - k),
                       int(panel / kLanes), AddTile{s.operand + row * s.width + d, s.width});
    }
  }

  void add_row(const BlockSample& sample, int64_t column, int64_t i) const {
    const T* const row = bank + (column + sample.column) * p.bank_stride;
    float* const to = s.operand + i * s.width;
    const Vec w = splat(sample.value);
    for (int64_t d = 0; d < s.width; d += kLanes) store(to + d, multiply_add(w, load_row(row, d, p.width), load(to + d)));
  }
};

template <class T>
void gather_blocks_of(const GatherParams& p, const GatherBlocks& b, int64_t first, int64_t last, float* workspace, float* sums) {
  const BlockSpace space(p, b, workspace);
  const BlockPass<T> pass{p, b, space};
  if (p.query != nullptr) {
    pass.scores(first, last);
  } else {
    pass.sums(first, last, sums);
  }
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Whether blocks are the faster way, from what each way was measured to take on one AVX-512 core, in nanoseconds.
// Row by row a sample costs 2, and 0.045 for each of its bytes (0.015 where the bank fits in L2). By blocks it costs 3.3
// for the ordering, a pair of query and bank row 0.011 for each of their D multiply-adds (in proportion to the vector's
// length), and packing 0.25 an element. With D = 128 and N = 64 in fp32 blocks win up to M = 11 K, in bf16 up to 5 K.
bool gather_by_blocks(const GatherParams& p) {
  const double samples = double(p.rows) * double(p.samples), elements = double(p.columns) * double(p.width);
  const double element_bytes = p.type == ElementType::kFloat32 ? 4 : 2;
  const double byte = elements * element_bytes <= 2e6 ? 0.015 : 0.045;
  const double by_row = samples * (2 + byte * element_bytes * double(p.width));
  const double by_block = samples * 3.3 + elements * (0.25 + double(round_up(p.rows, kTileRows)) * 0.18 / kLanes);
  return by_block < by_row;
}

int64_t gather_blocks_workspace(const GatherParams& p, const GatherBlocks& b) { return BlockSpace(p, b, nullptr).floats; }

// Blocks first .. last: scores into the samples, or the sums over these blocks' samples into `sums` [rows, width].
void gather_blocks(const GatherParams& p, const GatherBlocks& b, int64_t first, int64_t last, float* workspace, float* sums) {
  switch (p.type) {
    case ElementType::kFloat32:
      return gather_blocks_of<float>(p, b, first, last, workspace, sums);
    case ElementType::kBFloat16:
      return gather_blocks_of<BFloat16>(p, b, first, last, workspace, sums);
    case ElementType::kFloat16:
      return gather_blocks_of<Half>(p, b, first, last, workspace, sums);
  }
}

}  // namespace
