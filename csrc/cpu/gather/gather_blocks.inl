// The same scores and sums from matrix products with one block of bank rows after another, when rows of the bank are drawn many times.
//
// Scores: S = Q K^T for the block, from which the sampled ones are picked. Sums: weights are spread into a block W of
// zeros, and O += W K. Each bank row is read once for all queries, and D multiply-adds for a pair that nobody sampled are
// cheaper than a cache miss for one that somebody did, up to a point: see gather_block.
#pragma once

#include "gather/gather.inl"
#include "engine/stream.inl"

namespace {

using kdfast::GatherBlocks;

constexpr int64_t kBlockWords = int64_t(1) << 17;  // of a packed block: half a megabyte stays in a core's L2
constexpr int64_t kMostColumns = 2048;             // of a block
constexpr double kNearBytes = 1 << 21;             // of L2

// Multiply-adds a cycle: two of vectors; on tiles 16 x 16 x 32 in 16 cycles, kTerms of them for one of floats.
template <class Product>
constexpr double multiply_adds() {
  if constexpr (Product::kParts > 1) return 512.0 / Product::kTerms;
  return 2.0 * kLanes;
}

// The scratch of one thread.
struct BlockSpace {
  int64_t rows;  // padded
  Rows queries;
  Sums sums;
  Streamed bank;
  Tile tile;
  float* finite;   // [block, width]: a block of bank rows, zeros in place of those with an infinity or NaN
  float* special;  // [block]: 1 for these
  float* run;      // [block]: sums of a run of weights; zero in between

  template <class Product>
  BlockSpace(Product product, const GatherParams& p, const GatherBlocks& b, Arena& arena) {
    rows = round_up(b.row_end - b.row_begin, Product::kRowMultiple);
    queries.plan(product, p.query != nullptr ? rows : 0, p.width, arena);
    sums.plan(rows, p.width, arena);
    bank.matrix = {p.bank, p.type};
    bank.panels.plan(product, p.width, b.block, true, true, arena);
    tile.plan(product, rows, b.block, arena);
    finite = arena.take(b.block * p.width);
    special = arena.take(b.block);
    run = arena.take(b.block);
  }
};

// Whether parts in bf16 can hold these numbers: finite ones, and no larger than a bf16 can be.
template <class T>
inline bool parts_hold(const T* x, int64_t count) {
  IntVec held = ~IntVec{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec v = load_row(x, i, count);
    held &= (v <= splat(0x1.fep127f)) & (v >= splat(-0x1.fep127f));
  }
  int32_t all = -1;
  for (int lane = 0; lane < kLanes; ++lane) all &= held[lane];
  return all != 0;
}

// Blocks first .. last of a call, on one thread.
template <class Product>
struct BlockPass {
  const GatherParams& p;
  const GatherBlocks& b;
  BlockSpace& s;
  const int64_t count = b.row_end - b.row_begin;

  // Adds scores to b.value, in which -inf stays. False, with nothing done: the product cannot hold the queries.
  bool scores(int64_t first, int64_t last) const {
    bool sound = true;
    const Matrix queries{p.query, ElementType::kFloat32};
    for (int64_t i = 0; i < count; ++i) sound &= Packing<Product>::pack_row(queries, b.row_begin + i, p.width, false, s.queries.at(i));
    if (!sound) return false;
    __builtin_memset(s.queries.at(count), 0, size_t(4 * (s.rows - count) * s.queries.stride));
    s.bank.panels.rows = Product::kParts > 1 ? nullptr : s.bank.panels.rows;
    for (int64_t block = first; block < last; ++block) {
      const int64_t column = block * b.block, columns = smaller(b.block, p.columns - column), padded = round_up(columns, kPanel);
      const bool special = pack(column, columns);
      each_chunk([&](int64_t row, int64_t rows) {
        score_rows(Product{}, s.queries.at(row), s.queries.stride, rows, s.bank.panels, padded, s.tile.scores(0), s.tile.stride);
        each_row(block, row, rows, [&](int64_t begin, int64_t end, int64_t i) {
          const float* const scores = s.tile.scores(i - row);
          for (int64_t at = begin; at < end; ++at) b.value[at] = b.value[at] == -kInfinity ? -kInfinity : b.value[at] + scores[b.column[at]];
          if (special) score_special(begin, end, column, i);
        });
      });
    }
    return true;
  }

  // The sums over these blocks' samples. False: the product cannot hold the weights.
  bool sums(int64_t first, int64_t last, float* out) const {
    bool sound = true;
    s.bank.panels.columns = nullptr;
    __builtin_memset(s.sums.at(0), 0, size_t(4 * s.rows * s.sums.stride));
    __builtin_memset(s.run, 0, size_t(4 * b.block));
    for (int64_t block = first; block < last; ++block) {
      const int64_t column = block * b.block, columns = smaller(b.block, p.columns - column), padded = round_up(columns, kPanel);
      const bool special = pack(column, columns);
      each_chunk([&](int64_t row, int64_t rows) {
        for (int64_t i = 0; i < rows; ++i) __builtin_memset(s.tile.scores(i), 0, size_t(4 * padded));
        each_row(block, row, rows, [&](int64_t begin, int64_t end, int64_t i) {
          spread(begin, end, s.tile.scores(i - row));
          if (special) add_special(begin, end, column, s.tile.scores(i - row), s.sums.at(i));
        });
        for (int64_t i = 0; i < rows; ++i) sound &= store_weights(i, padded);
        multiply_sums(row, rows, columns);
      });
    }
    for (int64_t i = 0; i < count; ++i) __builtin_memcpy(out + i * p.width, s.sums.at(i), size_t(4 * p.width));
    return sound;
  }

 private:
  template <class F>
  void each_chunk(const F& f) const {
    for (int64_t row = 0; row < s.rows; row += Product::kRowChunk) {
      const int64_t left = s.rows - row;
      f(row, smaller(left, Product::kRowChunk));
    }
  }

  // f(begin, end, row) for the block's samples of each of the chunk's rows.
  template <class F>
  void each_row(int64_t block, int64_t row, int64_t rows, const F& f) const {
    for (int64_t i = row; i < smaller(count, row + rows); ++i) {
      const int64_t* const range = b.begin + i * (b.blocks + 1) + block;
      f(range[0], range[1], i);
    }
  }

  // Adds weights to a row of the tile. Where one column may come very often, a run of samples is added up before the next.
  void spread(int64_t begin, int64_t end, float* row) const {
    if (end - begin <= 4 * kRun) {
      for (int64_t at = begin; at < end; ++at) row[b.column[at]] += b.value[at];
      return;
    }
    for (int64_t stop; begin < end; begin = stop) {
      stop = smaller(begin + kRun, end);
      for (int64_t at = begin; at < stop; ++at) s.run[b.column[at]] += b.value[at];
      for (int64_t at = begin; at < stop; ++at) {
        row[b.column[at]] += s.run[b.column[at]];
        s.run[b.column[at]] = 0;
      }
    }
  }

  // A row of the tile as the product wants it.
  bool store_weights(int64_t i, int64_t padded) const {
    if constexpr (Product::kParts == 1) return true;
    const float* const row = s.tile.scores(i);
    Vec zero = {};
    for (int64_t j = 0; j < padded; j += 2 * kLanes) {
      const Vec x0 = load(row + j), x1 = load(row + j + kLanes);
      zero += (x0 - x0) + (x1 - x1);
      Packing<Product>::store_weights(s.tile.weights(i), j, x0, x1);
    }
    return total(zero) == 0;
  }

  // O += W K, kStepChunk steps at a time, so that the panel stays in L1.
  void multiply_sums(int64_t row, int64_t rows, int64_t columns) const {
    const Panels& k = s.bank.panels;
    for (int64_t d = 0; d < k.padded_width; d += kPanel) {
      const int64_t panel = smaller(kPanel, k.padded_width - d), steps = Product::steps(columns);
      for (int64_t step = 0; step < steps; step += Product::kStepChunk) {
        const int64_t left = steps - step;
        multiply_panel(Product{}, s.tile.weights(0) + step, s.tile.stride, rows, k.rows + d * k.block_words + step * panel,
                       smaller(left, Product::kStepChunk), int(panel / kLanes), AddTile{s.sums.at(row) + d, s.sums.stride});
      }
    }
  }

  // Packs a block, zeros in place of rows with an infinity or NaN: 0 times these is not 0, and parts cannot hold them. Returns whether
  // there are any; their samples are scored, or added, one by one.
  bool pack(int64_t column, int64_t columns) const {
    bool special = false;
    with_elements(s.bank.matrix.from(column * p.width), [&](const auto* rows) {
      special = !parts_hold(rows, columns * p.width);
      for (int64_t j = 0; special && j < columns; ++j) {
        const bool held = parts_hold(rows + j * p.width, p.width);
        s.special[j] = held ? 0 : 1;
        for (int64_t d = 0; d < p.width; d += kLanes)
          store_row(s.finite + j * p.width, d, p.width, held ? load_row(rows + j * p.width, d, p.width) : Vec{});
      }
    });
    const Matrix finite{s.finite, ElementType::kFloat32};
    Packing<Product>::pack_block(s.bank.panels, special ? finite : s.bank.matrix, special ? 0 : column, columns, round_up(columns, kPanel));
    return special;
  }

  void score_special(int64_t begin, int64_t end, int64_t column, int64_t i) const {
    with_elements(s.bank.matrix, [&](const auto* bank) {
      const float* const query = p.query + (b.row_begin + i) * p.width;
      for (int64_t at = begin; at < end; ++at) {
        if (s.special[b.column[at]] == 0 || b.value[at] == -kInfinity) continue;
        const auto* const row = bank + (column + b.column[at]) * p.width;
        Vec sum = {};
        for (int64_t d = 0; d < p.width; d += kLanes) sum = multiply_add(load_row(query, d, p.width), load_row(row, d, p.width), sum);
        b.value[at] += total(sum);
      }
    });
  }

  void add_special(int64_t begin, int64_t end, int64_t column, float* weights, float* sum) const {
    with_elements(s.bank.matrix, [&](const auto* bank) {
      for (int64_t at = begin; at < end; ++at) {
        if (s.special[b.column[at]] == 0) continue;
        const auto* const row = bank + (column + b.column[at]) * p.width;
        const Vec w = splat(b.value[at]);
        for (int64_t d = 0; d < p.width; d += kLanes) store(sum + d, multiply_add(w, load_row(row, d, p.width), load(sum + d)));
        weights[b.column[at]] = 0;
      }
    });
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Bank rows in a block, 0 where single rows are faster, from what each way costs in cycles. Products run at the instruction set's rate; the
// rest was measured on one AVX-512 core: row by row 5 a sample and 0.12 a byte (0.04 where the bank fits in L2); by blocks 16 a sample, for
// the ordering, and packing an element 0.8, in parts 2. With D = 128 and N = 64 blocks win up to M = 9 K in fp32, 3 K in bf16.
int64_t gather_block(const GatherParams& p) {
  if (p.bank_stride != p.width) return 0;
  return with_product(Precision::kFloat32, [&](auto product) {
    using Product = decltype(product);
    int64_t block = kPanel;
    while (block < kMostColumns && block < p.columns && 2 * block * Product::words(p.width) <= kBlockWords) block *= 2;
    const double samples = double(p.rows) * double(p.samples), elements = double(p.columns) * double(p.width);
    const double element_bytes = double(Matrix{p.bank, p.type}.element_bytes());
    const double byte = elements * element_bytes <= kNearBytes ? 0.04 : 0.12, packing = Product::kParts > 1 ? 2 : 0.8;
    const double by_row = samples * (5 + byte * element_bytes * double(p.width));
    const double by_block = samples * 16 + elements * (packing + double(round_up(p.rows, Product::kRowMultiple)) / multiply_adds<Product>());
    return by_block < by_row ? block : 0;
  });
}

// Words.
int64_t gather_blocks_workspace(const GatherParams& p, const GatherBlocks& b) {
  return scratch_words(Precision::kFloat32, [&](auto product) {
    Arena arena{nullptr};
    BlockSpace(product, p, b, arena);
    return arena.words;
  });
}

// f(pass), which returns whether the product could hold its operands; else again, in plain floats.
template <class F>
inline void with_block_pass(const GatherParams& p, const GatherBlocks& b, float* workspace, const F& f) {
  with_sound_product(Precision::kFloat32, [&](auto product) {
    using Product = decltype(product);
    Arena arena{workspace};
    BlockSpace space(product, p, b, arena);
    [[maybe_unused]] typename Product::Session session;
    return f(BlockPass<Product>{p, b, space});
  });
}

void gather_blocks_scores(const GatherParams& p, const GatherBlocks& b, int64_t first, int64_t last, float* workspace) {
  with_block_pass(p, b, workspace, [&](const auto& pass) { return pass.scores(first, last); });
}

void gather_blocks_sums(const GatherParams& p, const GatherBlocks& b, int64_t first, int64_t last, float* workspace, float* sums) {
  with_block_pass(p, b, workspace, [&](const auto& pass) { return pass.sums(first, last, sums); });
}

}  // namespace
