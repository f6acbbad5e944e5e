// What the Hopper kernels share: 128 rows stay in shared memory, tiles of columns pass by. One warpgroup loads; two have 64 rows each and take
// turns at the matrix units. A tile of columns C serves the scores R C^T and the sums W C, W being weights made of scores, but where the columns
// bring values V of their own, W V. docs/gpu-kernels.md tells why.
#pragma once

#include "hopper.cuh"

namespace kdfast {
namespace {

constexpr int kWarpgroup = 128, kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kGroupRows = 64, kRows = kConsumers * kGroupRows;
constexpr int kReleases = kConsumers * kWarpgroup / 32;  // a warp's last reading of a tile is one arrival
// Registers of a thread, once they have moved; a block has no others than those it was launched with, all that 65536 have for its threads.
constexpr int kLoaderRegisters = 24, kConsumerRegisters = 240, kEntryRegisters = 65536 / kThreads / 8 * 8;
static_assert(kLoaderRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kEntryRegisters, "consumers would wait for ever");

// Columns of a tile and stages of the pipeline, for rows of up to `width`: scores and sums of a thread are columns/2 + width/2 registers,
// weights columns/4; tiles and the rows that stay fill shared memory. `valued`: a tile has values too, of up to `width`.
template <int width, bool valued = false>
struct Tile {
  static constexpr int kWidth = width;
  static constexpr bool kValued = valued;
  static constexpr int kColumns = kWidth == 256 ? 80 : 128, kStages = kWidth == 256 ? 4 : kWidth == 128 ? (valued ? 3 : 5) : (valued ? 6 : 8);
  static constexpr int kSlices = kWidth / device::kSlice;
  static constexpr int kSliceBytes = kColumns * device::kSliceRow, kBytes = (1 + valued) * kSlices * kSliceBytes;
  static constexpr int kSummed = valued ? kSlices * kSliceBytes : 0;  // where what is summed begins
  static constexpr int kRowSliceBytes = kRows * device::kSliceRow, kRowBytes = kSlices * kRowSliceBytes;
  static constexpr int kBarriers = 2 * kStages + 2;
  static constexpr int kShared = device::kPattern + kRowBytes + kStages * kBytes + kBarriers * int(sizeof(device::Barrier));
  static_assert(kShared <= (227 << 10), "beyond a block's shared memory");
};

constexpr int kWidths[] = {64, 128, 256};

inline int64_t columns_of_tile(int64_t width) { return width <= 128 ? Tile<128>::kColumns : Tile<256>::kColumns; }
static_assert(Tile<64>::kColumns == Tile<128>::kColumns);

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// The matrices [entries, rows or columns, width], and how the work is cut: a unit is a tile of rows and a part of the columns.
struct Streamed {
  device::TensorMap stay, pass, values;         // values: only where they are not what passes
  bool stay_shared, pass_shared, values_shared;  // by all entries
  int64_t entries, rows, columns, part_columns;
  const int64_t* valid;  // [entries] columns that count, or null
  int64_t valid_stride;
  int units, blocks;
};

// Null, or what went wrong.
template <class T>
const char* encode_maps(Streamed& p, Element type, int64_t width, const void* stay, const void* pass) {
  const char* const error = encode_map(p.stay, stay, type, p.stay_shared ? 1 : p.entries, p.rows, width, p.rows * width, kRows);
  return error != nullptr ? error : encode_map(p.pass, pass, type, p.pass_shared ? 1 : p.entries, p.columns, width, p.columns * width, T::kColumns);
}

template <class T>
const char* encode_values(Streamed& p, Element type, int64_t width, const void* values) {
  return encode_map(p.values, values, type, p.values_shared ? 1 : p.entries, p.columns, width, p.columns * width, T::kColumns);
}

// Blocks at work at a time have the same columns, which are read from L2.
struct Unit {
  int entry, row, part;   // row: the first
  int first, end, tiles;  // columns

  __device__ Unit(const Streamed& p, int number, int columns) {
    const int row_tiles = int((p.rows + kRows - 1) / kRows), of_part = row_tiles * int(p.entries);
    part = number / of_part, entry = number % of_part / row_tiles, row = number % row_tiles * kRows;
    int64_t count = p.columns;
    if (p.valid != nullptr) count = min(count, p.valid[entry * p.valid_stride]);
    const int64_t begin = part * p.part_columns;
    first = int(begin), end = int(min(count, begin + p.part_columns));
    tiles = end > first ? (end - first + columns - 1) / columns : 0;
  }
};

// Which stage of the ring is next, and the parity of its phase.
template <int kStages>
struct Turn {
  int stage = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

template <class T>
class Memory {
 public:
  __device__ Memory() : base_(device::patterned_memory()) {}
  __device__ char* rows() const { return base_; }
  __device__ char* tile(int stage) const { return base_ + T::kRowBytes + stage * T::kBytes; }
  __device__ device::Barrier* filled(int stage) const { return barriers() + stage; }
  __device__ device::Barrier* emptied(int stage) const { return barriers() + T::kStages + stage; }
  __device__ device::Barrier* rows_filled() const { return barriers() + 2 * T::kStages; }
  __device__ device::Barrier* rows_emptied() const { return barriers() + 2 * T::kStages + 1; }

  __device__ void make_barriers() const {
    for (int s = 0; s < T::kStages; ++s) device::barrier_init(filled(s), 1), device::barrier_init(emptied(s), kReleases);
    device::barrier_init(rows_filled(), 1), device::barrier_init(rows_emptied(), kReleases);
    device::barriers_made();
  }

 private:
  char* base_;
  __device__ device::Barrier* barriers() const { return reinterpret_cast<device::Barrier*>(base_ + T::kRowBytes + T::kStages * T::kBytes); }
};

// One thread: every tile that the block's units need, as soon as its stage is free.
template <class T>
__device__ void load(const Streamed& p) {
  const Memory<T> memory;
  device::prefetch_map(&p.stay), device::prefetch_map(&p.pass);
  if constexpr (T::kValued) device::prefetch_map(&p.values);
  Turn<T::kStages> turn;
  unsigned rows = 0;
  for (int number = int(blockIdx.x); number < p.units; number += p.blocks) {
    const Unit unit(p, number, T::kColumns);
    if (unit.tiles == 0) continue;
    device::barrier_wait(memory.rows_emptied(), rows ^ 1);
    device::barrier_expect(memory.rows_filled(), T::kRowBytes);
    for (int c = 0; c < T::kSlices; ++c)
      device::copy_box(memory.rows() + c * T::kRowSliceBytes, &p.stay, c * device::kSlice, unit.row, p.stay_shared ? 0 : unit.entry, memory.rows_filled());
    rows ^= 1;
    const int entry = p.pass_shared ? 0 : unit.entry;
    for (int t = 0; t < unit.tiles; ++t, turn.next()) {
      device::Barrier* const filled = memory.filled(turn.stage);
      device::barrier_wait(memory.emptied(turn.stage), turn.parity ^ 1);
      device::barrier_expect(filled, T::kBytes);
      for (int c = 0; c < T::kSlices; ++c)
        device::copy_box(memory.tile(turn.stage) + c * T::kSliceBytes, &p.pass, c * device::kSlice, unit.first + t * T::kColumns, entry, filled);
      if constexpr (T::kValued) {
        char* const values = memory.tile(turn.stage) + T::kSummed;
        for (int c = 0; c < T::kSlices; ++c)
          device::copy_box(values + c * T::kSliceBytes, &p.values, c * device::kSlice, unit.first + t * T::kColumns, p.values_shared ? 0 : unit.entry, filled);
      }
    }
  }
}

// A warpgroup's 64 rows. Of its tiles a thread has rows r and r + 8, and of every eight columns two: number 4 g + 2 h + e of an array is column
// 8 g + 2 (lane % 4) + e of row r + 8 h. Self has, of a unit: begin, weigh (scores of a tile become weights), rescale and store; and
// finish, before the last tile is added. kSums: else scores are weighed and no weights multiplied.
template <class Self, Element kType, class T, bool kSums>
class Consumer {
 public:
  __device__ void run() {
    if (group() == 1) device::named_barrier_arrive(kFirstTurn, kConsumers * kWarpgroup);
#pragma unroll 1
    for (int number = int(blockIdx.x); number < streamed_.units; number += streamed_.blocks) {
      const Unit unit(streamed_, number, T::kColumns);
      self().begin(unit);
      if constexpr (kSums) {
#pragma unroll
        for (int s = 0; s < kSpans; ++s)
#pragma unroll
          for (int i = 0; i < kSpan / 2; ++i) sums_[s][i] = 0;
      }
      if (unit.tiles > 0) stream(unit);
      self().store(unit);
    }
    if (group() == 0) device::named_barrier_wait(kFirstTurn, kConsumers * kWarpgroup);
  }

 protected:
  static constexpr int kWidth = T::kWidth;
  static constexpr int kFirstTurn = 1;  // of the named barriers: two for turns, two of a warpgroup each; 0 is the block's
  static constexpr int kColumns = T::kColumns, kScores = kColumns / 2;
  // sums of 128 columns are one product
  static constexpr int kSpan = kWidth < 128 ? kWidth : 128, kSpans = kWidth / kSpan;

  const Streamed& streamed_;
  const Memory<T> memory_;
  float scores_[kScores];
  float sums_[kSpans][kSpan / 2];

  __device__ explicit Consumer(const Streamed& streamed) : streamed_(streamed) {}

  // Told from the thread's index each time: registers are scarcer than instructions.
  __device__ static int thread() { return device::known_here(int(threadIdx.x)); }
  __device__ static int group() { return thread() / kWarpgroup - 1; }
  __device__ static int lane() { return thread() % 32; }
  __device__ static int row() { return thread() % kWarpgroup / 32 * 16 + thread() % 32 / 4; }

  // Of row h of the thread's two, among its entry's rows and among all; beyond them the last. Not kept through the loop.
  __device__ int row_of(const Unit& unit, int h) const { return device::known_here(unit.row) + group() * kGroupRows + row() + 8 * h; }
  __device__ int64_t at(const Unit& unit, int h) const { return unit.entry * streamed_.rows + min(int64_t(row_of(unit, h)), streamed_.rows - 1); }

  // Row h of the sums times `factor`, as row `to` of a matrix [, width].
  __device__ void store_sums(float* to, int64_t width, int h, float factor) const {
    float* const out = to + 2 * (lane() % 4);
#pragma unroll
    for (int g = 0; g < kWidth / 8; ++g) {
      if (8 * g >= width) continue;
      const float* const pair = &sums_[g / (kSpan / 8)][g % (kSpan / 8) * 4 + 2 * h];
      *reinterpret_cast<Pair*>(out + 8 * g) = Pair{{pair[0] * factor, pair[1] * factor}};
    }
  }

 private:
  struct alignas(8) Pair {
    float x[2];
  };

  Turn<T::kStages> turn_;
  unsigned rows_ = 0;  // parity of their phase
  uint32_t weights_[kColumns / 16][4];

  __device__ __forceinline__ Self& self() { return *static_cast<Self*>(this); }

  __device__ void stream(const Unit& unit) {
    device::barrier_wait(memory_.rows_filled(), rows_);
    rows_ ^= 1;
    Turn<T::kStages> before = turn_;
    await_turn();
    score();
    pass_turn();
    device::products_wait<0>(scores_);
    finish_scores(unit, 0);
    self().weigh(unit, unit.first);
    pack();
#pragma unroll 1
    for (int t = 1; t < unit.tiles; ++t) {
      await_turn();
      score();
      if constexpr (kSums) add(before.stage);
      pass_turn();
      device::products_wait<kSums ? 1 : 0>(scores_);
      finish_scores(unit, t);
      self().weigh(unit, unit.first + t * kColumns);
      if constexpr (kSums) {
        settle(before.stage);
        self().rescale();
        pack();
      }
      before.next();
    }
    if constexpr (kSums) {
      self().finish(unit, before.stage);
      device::products_begin();
      add(before.stage);
      settle(before.stage);
    }
  }

  // The matrix units are one warpgroup's until it has given its products; meanwhile the other weighs its scores.
  __device__ void await_turn() {
    device::barrier_wait(memory_.filled(turn_.stage), turn_.parity);
    device::named_barrier_wait(kFirstTurn + group(), kConsumers * kWarpgroup);
    device::products_begin();
  }
  __device__ void pass_turn() { device::named_barrier_arrive(kFirstTurn + 1 - group(), kConsumers * kWarpgroup); }

  __device__ void score() {
    const uint32_t rows = device::shared_address(memory_.rows()) + uint32_t(group() * kGroupRows * device::kSliceRow);
    const uint32_t columns = device::shared_address(memory_.tile(turn_.stage));
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) {
      const int slice = k / 4, within = k % 4 * 32;  // bytes
      const uint64_t a = device::descriptor(rows + uint32_t(slice * T::kRowSliceBytes + within), T::kRowSliceBytes);
      const uint64_t b = device::descriptor(columns + uint32_t(slice * T::kSliceBytes + within), T::kSliceBytes);
      if (k == 0) {
        device::multiply<kType, false>(scores_, a, b);
      } else {
        device::multiply<kType, true>(scores_, a, b);
      }
    }
    device::products_commit();
  }

  __device__ void add(int stage) {
    const uint32_t columns = device::shared_address(memory_.tile(stage)) + T::kSummed;
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
      for (int s = 0; s < kSpans; ++s) {
        const int slice = s * (kSpan / device::kSlice);
        device::multiply<kType>(sums_[s], weights_[k], device::descriptor(columns + uint32_t(slice * T::kSliceBytes + k * 16 * device::kSliceRow), T::kSliceBytes));
      }
    device::products_commit();
  }

  __device__ void settle(int stage) {
#pragma unroll
    for (int s = 0; s < kSpans; ++s) device::products_wait<0>(sums_[s]);
    release(memory_.emptied(stage));
  }

  __device__ void release(device::Barrier* barrier) {
    if (lane() == 0) device::barrier_arrive(barrier);
  }

  __device__ void finish_scores(const Unit& unit, int t) {
    if constexpr (!kSums) release(memory_.emptied(turn_.stage));
    if (t + 1 == unit.tiles) release(memory_.rows_emptied());
    turn_.next();
  }

  // Weights in 16 bits, as the first matrix of a product wants them: of 16 columns, rows r and r + 8 of the first eight, then of the others.
  __device__ void pack() {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights_[k][i] = device::pair_of<kType>(scores_[8 * k + 2 * i], scores_[8 * k + 2 * i + 1]);
  }
};

// A block of kThreads threads. `consume`: what the threads of the other warpgroups do.
template <class T, class Consume>
__device__ __forceinline__ void run_block(const Streamed& p, const Consume& consume) {
  if (threadIdx.x == 0) Memory<T>().make_barriers();
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    device::give_registers<kLoaderRegisters>();
    if (threadIdx.x == 0) load<T>(p);
  } else {
    device::take_registers<kConsumerRegisters>();
    consume();
  }
}

}  // namespace
}  // namespace kdfast
