// The streaming softmax on Hopper: 128 rows of queries stay in shared memory, the bank passes by in tiles of columns. One warpgroup loads; two
// have 64 rows each and take turns at the matrix units. A tile of keys serves the scores Q K^T and the sums P K. docs/gpu-kernels.md tells why.
#pragma once

#include "hopper.cuh"
#include "similarity/log_sum.cuh"
#include "similarity/similarity.h"

namespace kdfast {
namespace {

constexpr int kWarpgroup = 128, kConsumers = 2, kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kGroupRows = 64, kRows = kConsumers * kGroupRows;
constexpr int kReleases = kConsumers * kWarpgroup / 32;  // a warp's last reading of a tile is one arrival
// Registers of a thread: 24 x 128 + 240 x 256 of 65536.
constexpr int kLoaderRegisters = 24, kConsumerRegisters = 240;

// Columns of a tile and stages of the pipeline, for rows of up to `width`: scores and sums of a thread are columns/2 + width/2 registers,
// weights columns/4; tiles and queries fill shared memory.
template <int kWidth>
struct Tile {
  static constexpr int kColumns = kWidth == 256 ? 80 : 128, kStages = kWidth == 256 ? 4 : kWidth == 128 ? 5 : 8;
  static constexpr int kSlices = kWidth / device::kSlice;
  static constexpr int kSliceBytes = kColumns * device::kSliceRow, kBytes = kSlices * kSliceBytes;
  static constexpr int kQuerySliceBytes = kRows * device::kSliceRow, kQueryBytes = kSlices * kQuerySliceBytes;
  static constexpr int kBarriers = 2 * kStages + 2;
  static constexpr int kShared = device::kPattern + kQueryBytes + kStages * kBytes + kBarriers * int(sizeof(device::Barrier));
  static_assert(kShared <= (227 << 10), "beyond a block's shared memory");
};

struct SoftmaxParams {
  device::TensorMap query, keys;
  SimilarityForward call;
};

// A tile of rows and its part of the bank. Blocks at work at a time have the same columns, which are read from L2.
struct Unit {
  int entry, row, part;   // row: the first
  int first, end, tiles;  // columns

  __device__ Unit(const SimilarityForward& p, int number, int columns) {
    const int row_tiles = int((p.problem.rows + kRows - 1) / kRows), of_part = row_tiles * int(p.problem.batch);
    part = number / of_part, entry = number % of_part / row_tiles, row = number % row_tiles * kRows;
    int64_t count = p.problem.columns;
    if (p.problem.valid != nullptr) count = min(count, p.problem.valid[entry * p.problem.valid_stride]);
    const int64_t begin = part * p.split.columns;
    first = int(begin), end = int(min(count, begin + p.split.columns));
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

template <int kWidth>
class Memory {
 public:
  using T = Tile<kWidth>;
  __device__ Memory() : base_(device::patterned_memory()) {}
  __device__ char* queries() const { return base_; }
  __device__ char* tile(int stage) const { return base_ + T::kQueryBytes + stage * T::kBytes; }
  __device__ device::Barrier* filled(int stage) const { return barriers() + stage; }
  __device__ device::Barrier* emptied(int stage) const { return barriers() + T::kStages + stage; }
  __device__ device::Barrier* queries_filled() const { return barriers() + 2 * T::kStages; }
  __device__ device::Barrier* queries_emptied() const { return barriers() + 2 * T::kStages + 1; }

  __device__ void make_barriers() const {
    for (int s = 0; s < T::kStages; ++s) device::barrier_init(filled(s), 1), device::barrier_init(emptied(s), kReleases);
    device::barrier_init(queries_filled(), 1), device::barrier_init(queries_emptied(), kReleases);
    device::barriers_made();
  }

 private:
  char* base_;
  __device__ device::Barrier* barriers() const { return reinterpret_cast<device::Barrier*>(base_ + T::kQueryBytes + T::kStages * T::kBytes); }
};

// One thread: every tile that the block's units need, as soon as its stage is free.
template <int kWidth>
__device__ void load(const SoftmaxParams& p) {
  using T = Tile<kWidth>;
  const Memory<kWidth> memory;
  device::prefetch_map(&p.query), device::prefetch_map(&p.keys);
  Turn<T::kStages> turn;
  unsigned queries = 0;
  for (int number = int(blockIdx.x); number < p.call.units; number += p.call.blocks) {
    const Unit unit(p.call, number, T::kColumns);
    if (unit.tiles == 0) continue;
    device::barrier_wait(memory.queries_emptied(), queries ^ 1);
    device::barrier_expect(memory.queries_filled(), T::kQueryBytes);
    for (int c = 0; c < T::kSlices; ++c)
      device::copy_box(memory.queries() + c * T::kQuerySliceBytes, &p.query, c * device::kSlice, unit.row, unit.entry, memory.queries_filled());
    queries ^= 1;
    const int entry = p.call.problem.keys_stride == 0 ? 0 : unit.entry;
    for (int t = 0; t < unit.tiles; ++t, turn.next()) {
      device::Barrier* const filled = memory.filled(turn.stage);
      device::barrier_wait(memory.emptied(turn.stage), turn.parity ^ 1);
      device::barrier_expect(filled, T::kBytes);
      for (int c = 0; c < T::kSlices; ++c)
        device::copy_box(memory.tile(turn.stage) + c * T::kSliceBytes, &p.keys, c * device::kSlice, unit.first + t * T::kColumns, entry, filled);
    }
  }
}

// A warpgroup's 64 rows. Of its tiles a thread has rows r and r + 8, and of every eight columns two: number 4 g + 2 h + e of an array is column
// 8 g + 2 (lane % 4) + e of row r + 8 h.
template <Element kType, int kWidth, bool kPooled, bool kMasked>
class Consumer {
 public:
  __device__ explicit Consumer(const SimilarityForward& p) : p_(p) {}

  __device__ void run() {
    if (group() == 1) device::named_barrier_arrive(kFirstTurn, kConsumers * kWarpgroup);
#pragma unroll 1
    for (int number = int(blockIdx.x); number < p_.units; number += p_.blocks) {
      const Unit unit(p_, number, T::kColumns);
      begin(unit);
      if (unit.tiles > 0) stream(unit);
      store(unit);
    }
    if (group() == 0) device::named_barrier_wait(kFirstTurn, kConsumers * kWarpgroup);
  }

 private:
  using T = Tile<kWidth>;
  static constexpr int kFirstTurn = 1;  // of the named barriers: two for turns, two of a warpgroup each; 0 is the block's
  static constexpr int kColumns = T::kColumns, kScores = kColumns / 2;
  // sums of 128 columns are one product
  static constexpr int kSpan = kWidth < 128 ? kWidth : 128, kSpans = kWidth / kSpan;

  const SimilarityForward& p_;
  const Memory<kWidth> memory_;
  Turn<T::kStages> turn_;
  unsigned queries_ = 0;

  float factor_[2];  // base-2 logits by scores, positive
  bool flipped_[2];  // whose sign the scores took
  bool flips_;       // any in the warp
  float top_[2];     // level of the sums, in bits
  float total_[2];   // of this thread's columns
  float rescale_[2];
  float scores_[kScores];
  float sums_[kSpans][kSpan / 2];
  uint32_t weights_[kColumns / 16][4];

  // Told from the thread's index each time: registers are scarcer than instructions.
  __device__ static int thread() { return device::known_here(int(threadIdx.x)); }
  __device__ static int group() { return thread() / kWarpgroup - 1; }
  __device__ static int lane() { return thread() % 32; }
  __device__ static int row() { return thread() % kWarpgroup / 32 * 16 + thread() % 32 / 4; }

  // Of row h of the thread's two, among its batch entry's rows and among all; beyond them the last. Not kept through the loop.
  __device__ int row_of(const Unit& unit, int h) const { return device::known_here(unit.row) + group() * kGroupRows + row() + 8 * h; }
  __device__ int64_t at(const Unit& unit, int h) const { return unit.entry * p_.problem.rows + min(int64_t(row_of(unit, h)), p_.problem.rows - 1); }

  __device__ void begin(const Unit& unit) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float scale = p_.problem.scale[at(unit, h)];
      flipped_[h] = scale < 0;
      factor_[h] = fabsf(scale) * kBitsPerNat;
      if (factor_[h] == 0) factor_[h] = 0x1p-126f;  // 0 times the -inf of an excluded column were NaN
      top_[h] = -INFINITY, total_[h] = 0;
    }
    flips_ = __any_sync(~0u, flipped_[0] || flipped_[1]);
    if (p_.problem.start_logit != nullptr && unit.part == 0) start(unit);
    if constexpr (kPooled) {
#pragma unroll
      for (int s = 0; s < kSpans; ++s)
#pragma unroll
        for (int i = 0; i < kSpan / 2; ++i) sums_[s][i] = 0;
    }
  }

  // Exactly: the start's weight is 2^(start - level), where the level is start rounded. The first of the four lanes of a row has it.
  __device__ void start(const Unit& unit) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float nats = p_.problem.start_logit[at(unit, h)], level = nats * kBitsPerNat;
      const float rest = fmaf(nats, kBitsPerNat, -level) + nats * kBitsPerNatLow;
      top_[h] = level;
      if (lane() % 4 == 0 && nats != -INFINITY) total_[h] = device::exp2_fast(fabsf(level) < INFINITY ? rest : level);
    }
  }

  __device__ void stream(const Unit& unit) {
    device::barrier_wait(memory_.queries_filled(), queries_);
    queries_ ^= 1;
    Turn<T::kStages> before = turn_;
    await_turn();
    score();
    pass_turn();
    device::products_wait<0>(scores_);
    finish_scores(unit, 0);
    weigh(unit, unit.first);
    pack();
#pragma unroll 1
    for (int t = 1; t < unit.tiles; ++t) {
      await_turn();
      score();
      if constexpr (kPooled) add(before.stage);
      pass_turn();
      device::products_wait<kPooled ? 1 : 0>(scores_);
      finish_scores(unit, t);
      weigh(unit, unit.first + t * kColumns);
      if constexpr (kPooled) {
        settle(before.stage);
        rescale();
        pack();
      }
      before.next();
    }
    if constexpr (kPooled) {
      const int left = unit.end - (unit.first + (unit.tiles - 1) * kColumns);
      if (left < kColumns && unit.end < p_.problem.columns) blank(before.stage, left);
      device::products_begin();
      add(before.stage);
      settle(before.stage);
    }
  }

  // Keys beyond `valid` may be NaN, and their weight of 0 would not undo that. The other warpgroup writes the same zeros; whatever it reads
  // before, it excludes.
  __device__ void blank(int stage, int left) {
    char* const keys = memory_.tile(stage);
    for (int i = left * device::kSliceRow + thread() % kWarpgroup * 4; i < T::kSliceBytes; i += kWarpgroup * 4)
#pragma unroll
      for (int c = 0; c < T::kSlices; ++c) *reinterpret_cast<uint32_t*>(keys + c * T::kSliceBytes + i) = 0;
    device::shared_written();
    device::named_barrier_wait(kFirstTurn + kConsumers + group(), kWarpgroup);
  }

  // The matrix units are one warpgroup's until it has given its products; meanwhile the other weighs its scores.
  __device__ void await_turn() {
    device::barrier_wait(memory_.filled(turn_.stage), turn_.parity);
    device::named_barrier_wait(kFirstTurn + group(), kConsumers * kWarpgroup);
    device::products_begin();
  }
  __device__ void pass_turn() { device::named_barrier_arrive(kFirstTurn + 1 - group(), kConsumers * kWarpgroup); }

  __device__ void score() {
    const uint32_t queries = device::shared_address(memory_.queries()) + uint32_t(group() * kGroupRows * device::kSliceRow);
    const uint32_t keys = device::shared_address(memory_.tile(turn_.stage));
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) {
      const int slice = k / 4, within = k % 4 * 32;  // bytes
      const uint64_t a = device::descriptor(queries + uint32_t(slice * T::kQuerySliceBytes + within), T::kQuerySliceBytes);
      const uint64_t b = device::descriptor(keys + uint32_t(slice * T::kSliceBytes + within), T::kSliceBytes);
      if (k == 0) {
        device::multiply<kType, false>(scores_, a, b);
      } else {
        device::multiply<kType, true>(scores_, a, b);
      }
    }
    device::products_commit();
  }

  __device__ void add(int stage) {
    const uint32_t keys = device::shared_address(memory_.tile(stage));
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
      for (int s = 0; s < kSpans; ++s) {
        const int slice = s * (kSpan / device::kSlice);
        device::multiply<kType>(sums_[s], weights_[k], device::descriptor(keys + uint32_t(slice * T::kSliceBytes + k * 16 * device::kSliceRow), T::kSliceBytes));
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
    if constexpr (!kPooled) release(memory_.emptied(turn_.stage));
    if (t + 1 == unit.tiles) release(memory_.queries_emptied());
    turn_.next();
  }

  // Excluded columns get the score -inf. `first`: column of the tile's first score.
  __device__ void exclude(const Unit& unit, int first) {
    if (flips_) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) scores_[i] = flipped_[i / 2 % 2] ? -scores_[i] : scores_[i];
    }
    const int own = 2 * (lane() % 4), left = unit.end - first - own;
    if (unit.end - first < kColumns) {
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        if (i / 4 * 8 + i % 2 >= left) scores_[i] = -INFINITY;
    }
    if constexpr (kMasked) {
      if (p_.problem.key_labels != nullptr) exclude_labels(unit, first + own, left);
      if (p_.problem.key_index != nullptr) exclude_indices(unit, first + own);
      if (p_.problem.limit != nullptr) exclude_harder(unit);
    }
  }

  __device__ void exclude_labels(const Unit& unit, int first, int left) {
    const int64_t* const labels = p_.problem.key_labels + unit.entry * p_.problem.labels_stride + first;
    const int64_t own[2] = {p_.problem.query_labels[at(unit, 0)], p_.problem.query_labels[at(unit, 1)]};
#pragma unroll
    for (int g = 0; g < kScores / 4; ++g)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (8 * g + e >= left) continue;
        const int64_t label = labels[8 * g + e];
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (label == own[h]) scores_[4 * g + 2 * h + e] = -INFINITY;
      }
  }

  __device__ void exclude_indices(const Unit& unit, int first) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll 1
      for (int64_t i = 0; i < p_.problem.indices; ++i) {
        const int64_t column = p_.problem.key_index[at(unit, h) * p_.problem.indices + i] - first;
        if (column < 0 || column >= kColumns) continue;
#pragma unroll
        for (int g = 0; g < kScores / 4; ++g)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (8 * g + e == int(column)) scores_[4 * g + 2 * h + e] = -INFINITY;
      }
  }

  __device__ void exclude_harder(const Unit& unit) {
    const float scale[2] = {fabsf(p_.problem.scale[at(unit, 0)]), fabsf(p_.problem.scale[at(unit, 1)])};
    const float limit[2] = {p_.problem.limit[at(unit, 0)], p_.problem.limit[at(unit, 1)]};
#pragma unroll
    for (int i = 0; i < kScores; ++i)
      if (scores_[i] * scale[i / 2 % 2] > limit[i / 2 % 2]) scores_[i] = -INFINITY;
  }

  // Scores become weights 2^(z - level), and rescale_ what sums so far are to be multiplied by.
  __device__ void weigh(const Unit& unit, int first) {
    exclude(unit, first);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = -INFINITY;
#pragma unroll
      for (int i = 2 * h; i < kScores; i += 4) most = fmaxf(most, fmaxf(scores_[i], scores_[i + 1]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float before = top_[h];
      top_[h] = fmaxf(before, most * factor_[h]);
      const float shift = shift_of(top_[h]);
      rescale_[h] = top_[h] == before ? 1.0f : device::exp2_fast(before - shift);
      float added[2] = {};
#pragma unroll
      for (int i = 2 * h; i < kScores; i += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          scores_[i + e] = device::exp2_fast(fmaf(scores_[i + e], factor_[h], -shift));
          added[e] += scores_[i + e];
        }
      total_[h] = fmaf(total_[h], rescale_[h], added[0] + added[1]);
    }
  }

  // Where a largest logit has risen, which it does in ever fewer tiles.
  __device__ void rescale() {
    if (!__any_sync(~0u, rescale_[0] != 1.0f || rescale_[1] != 1.0f)) return;
#pragma unroll
    for (int s = 0; s < kSpans; ++s)
#pragma unroll
      for (int i = 0; i < kSpan / 2; ++i) sums_[s][i] *= rescale_[i / 2 % 2];
  }

  // Weights in 16 bits, as the first matrix of a product wants them: of 16 columns, rows r and r + 8 of the first eight, then of the others.
  __device__ void pack() {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) weights_[k][i] = device::pair_of<kType>(scores_[8 * k + 2 * i], scores_[8 * k + 2 * i + 1]);
  }

  __device__ void store(const Unit& unit) {
    const int64_t rows = p_.problem.batch * p_.problem.rows;
    const bool split = p_.split.parts > 1;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = total_[h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      if (row_of(unit, h) >= p_.problem.rows) continue;
      const int64_t at = this->at(unit, h) + (split ? unit.part * rows : 0);
      if (lane() % 4 == 0 && split) p_.split.top[at] = top_[h], p_.split.total[at] = total;
      if (lane() % 4 == 0 && !split) {
        const LogSum sum = log_sum(top_[h], total);
        p_.out.lse[at] = sum.nats, p_.out.lse_low[at] = sum.low;
      }
      if constexpr (kPooled) {
        float* const out = (split ? p_.split.pooled : p_.out.pooled) + at * p_.problem.width + 2 * (lane() % 4);
        const float factor = split || total == 0 ? 1.0f : 1 / total;
#pragma unroll
        for (int g = 0; g < kWidth / 8; ++g) {
          if (8 * g >= p_.problem.width) continue;
          const float* const pair = &sums_[g / (kSpan / 8)][g % (kSpan / 8) * 4 + 2 * h];
          *reinterpret_cast<Pair*>(out + 8 * g) = Pair{{pair[0] * factor, pair[1] * factor}};
        }
      }
    }
  }

  struct alignas(8) Pair {
    float x[2];
  };
};

template <Element kType, int kWidth, bool kPooled, bool kMasked>
__global__ void __launch_bounds__(kThreads, 1) softmax_kernel(const __grid_constant__ SoftmaxParams p) {
  if constexpr (device::kHopper) {
    if (threadIdx.x == 0) Memory<kWidth>().make_barriers();
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
      device::give_registers<kLoaderRegisters>();
      if (threadIdx.x == 0) load<kWidth>(p);
    } else {
      device::take_registers<kConsumerRegisters>();
      Consumer<kType, kWidth, kPooled, kMasked>(p.call).run();
    }
  }
}

}  // namespace
}  // namespace kdfast
