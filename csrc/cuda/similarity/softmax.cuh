// The streaming softmax on Hopper: queries stay, the bank passes by, and a row's weights are relative to its largest logit so far.
#pragma once

#include "similarity/log_sum.cuh"
#include "similarity/similarity.h"
#include "similarity/stream.cuh"

namespace kdfast {
namespace {

struct SoftmaxParams {
  Streamed streamed;
  SimilarityForward call;
};

template <Element kType, class T, bool kPooled, bool kMasked>
class Softmax : public Consumer<Softmax<kType, T, kPooled, kMasked>, kType, T, kPooled> {
 public:
  using Base = Consumer<Softmax, kType, T, kPooled>;
  __device__ explicit Softmax(const SoftmaxParams& p) : Base(p.streamed), p_(p.call) {}

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
  }

  // What is summed beyond `valid` may be NaN, and its weight of 0 would not undo that: zeros in its place. The other warpgroup writes the same;
  // whatever it reads before, it excludes.
  __device__ void finish(const Unit& unit, int stage) {
    const int left = unit.end - (unit.first + (unit.tiles - 1) * kColumns);
    if (left >= kColumns || unit.end == p_.problem.columns) return;
    char* const summed = memory_.tile(stage) + T::kSummed;
    for (int i = left * device::kSliceRow + thread() % kWarpgroup * 4; i < T::kSliceBytes; i += kWarpgroup * 4)
#pragma unroll
      for (int c = 0; c < T::kSlices; ++c) *reinterpret_cast<uint32_t*>(summed + c * T::kSliceBytes + i) = 0;
    device::shared_written();
    device::named_barrier_wait(Base::kFirstTurn + kConsumers + group(), kWarpgroup);
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
      const float before = top_[h], factor = kMasked && p_.problem.bias != nullptr ? 1.0f : factor_[h];
      top_[h] = fmaxf(before, most * factor);
      const float shift = shift_of(top_[h]);
      rescale_[h] = top_[h] == before ? 1.0f : device::exp2_fast(before - shift);
      float added[2] = {};
#pragma unroll
      for (int i = 2 * h; i < kScores; i += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          scores_[i + e] = device::exp2_fast(fmaf(scores_[i + e], factor, -shift));
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
        const float factor = split || total == 0 ? 1.0f : 1 / total;
        this->store_sums((split ? p_.split.pooled : p_.out.pooled) + at * p_.problem.value_width, p_.problem.value_width, h, factor);
      }
    }
  }

 private:
  using Base::kColumns, Base::kScores, Base::kSpan, Base::kSpans;
  using Base::group, Base::lane, Base::thread, Base::at, Base::row_of;
  using Base::memory_, Base::scores_, Base::sums_;

  const SimilarityForward& p_;
  float factor_[2];  // base-2 logits by scores, positive
  bool flipped_[2];  // whose sign the scores took
  bool flips_;       // any in the warp
  float top_[2];     // level of the sums, in bits
  float total_[2];   // of this thread's columns
  float rescale_[2];

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

  // Excluded columns get the score -inf; with a bias scores become logits in bits. `first`: column of the tile's first score.
  __device__ void exclude(const Unit& unit, int first) {
    if (flips_) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) scores_[i] = flipped_[i / 2 % 2] ? -scores_[i] : scores_[i];
    }
    const int own = 2 * (lane() % 4), left = unit.end - first - own;
    if constexpr (kMasked) {
      if (p_.problem.limit != nullptr) exclude_harder(unit);
      if (p_.problem.bias != nullptr) add_bias(unit, first + own, left);
    }
    if (unit.end - first < kColumns) {
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        if (i / 4 * 8 + i % 2 >= left) scores_[i] = -INFINITY;
    }
    if constexpr (kMasked) {
      if (p_.problem.key_labels != nullptr) exclude_labels(unit, first + own, left);
      if (p_.problem.key_index != nullptr) exclude_indices(unit, first + own);
    }
  }

  __device__ void add_bias(const Unit& unit, int first, int left) {
    const float* const bias = p_.problem.bias + unit.entry * p_.problem.bias_stride + first;
#pragma unroll
    for (int g = 0; g < kScores / 4; ++g)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float bits = 8 * g + e < left ? bias[8 * g + e] * kBitsPerNat : 0.0f;
#pragma unroll
        for (int h = 0; h < 2; ++h) scores_[4 * g + 2 * h + e] = fmaf(scores_[4 * g + 2 * h + e], factor_[h], bits);
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
};

template <Element kType, class T, bool kPooled, bool kMasked>
__global__ void __launch_bounds__(kThreads, 1) softmax_kernel(const __grid_constant__ SoftmaxParams p) {
  if constexpr (device::kHopper) {
    run_block<T>(p.streamed, [&] { Softmax<kType, T, kPooled, kMasked>(p).run(); });
  } else {
    device::stop();
  }
}

}  // namespace
}  // namespace kdfast
