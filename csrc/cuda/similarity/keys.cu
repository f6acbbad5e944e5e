// The bank's gradient of a loss of lse alone, on Hopper: keys stay and queries pass by, so no two blocks write one row.
#include "similarity/log_sum.cuh"
#include "similarity/similarity.h"
#include "similarity/stream.cuh"

namespace kdfast {
namespace {

constexpr int kTermThreads = 256;
constexpr int kMaskedWidth = 128;  // beyond it, what exclusions need would not fit beside the sums

struct KeysParams {
  Streamed streamed;
  SimilarityKeyGradient call;
};

struct alignas(8) Term {
  float factor, level;  // a weight is 2^(factor score - level), with the sign that the level's lowest bit says
};
struct alignas(16) TermPair {
  Term x[2];
};

union Bits {
  float value;
  uint32_t bits;
};

// |slope s| p = 2^(log2 |slope s| + z - lse), in bits. Queries beyond the last, and those without weight, have the level inf.
__global__ void __launch_bounds__(kTermThreads) terms_kernel(SimilarityKeyGradient p) {
  const int64_t number = int64_t(blockIdx.x) * kTermThreads + threadIdx.x, column = number % p.term_columns;
  if (number >= p.problem.batch * p.term_columns) return;
  Term term{0, INFINITY};
  if (column < p.problem.rows) {
    const int64_t at = number / p.term_columns * p.problem.rows + column;
    const float scale = p.problem.scale[at], lse = p.lse[at], low = p.lse_low == nullptr ? 0.0f : p.lse_low[at], weight = p.slope[at] * scale;
    Bits level{(lse == -INFINITY ? INFINITY : lse * kBitsPerNat) + (low * kBitsPerNat - log2f(fabsf(weight)))};
    if (fabsf(level.value) < INFINITY) level.bits = (level.bits & ~1u) | uint32_t(weight < 0);
    term = {scale * kBitsPerNat, level.value};
  }
  reinterpret_cast<Term*>(p.terms)[number] = term;
}

template <Element kType, int kWidth, bool kMasked>
class Keys : public Consumer<Keys<kType, kWidth, kMasked>, kType, Tile<kWidth>, true> {
 public:
  using Base = Consumer<Keys, kType, Tile<kWidth>, true>;
  __device__ explicit Keys(const KeysParams& p) : Base(p.streamed), p_(p.call) {}

  __device__ void begin(const Unit&) {}
  __device__ void rescale() {}
  __device__ void finish(const Unit&, int) {}

  __device__ void weigh(const Unit& unit, int first) {
    const int own = first + 2 * (lane() % 4);
    const TermPair* const terms = reinterpret_cast<const TermPair*>(reinterpret_cast<const Term*>(p_.terms) + unit.entry * p_.term_columns + own);
    float bias[2] = {};  // of the thread's keys, in bits
    if constexpr (kMasked) {
      const float* const biases = p_.problem.bias + unit.entry * p_.problem.bias_stride;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (p_.problem.bias != nullptr) bias[h] = biases[min(int64_t(row_of(unit, h)), p_.problem.columns - 1)] * kBitsPerNat;
    }
#pragma unroll
    for (int g = 0; g < kScores / 4; ++g) {
      const TermPair pair = terms[4 * g];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Bits level{pair.x[e].level};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float shift = kMasked ? bias[h] - level.value : -level.value;
          Bits weight{device::exp2_fast(fmaf(scores_[4 * g + 2 * h + e], pair.x[e].factor, shift))};
          weight.bits ^= level.bits << 31;
          scores_[4 * g + 2 * h + e] = weight.value;
        }
      }
    }
    if constexpr (kMasked) {
      if (p_.problem.key_labels != nullptr) exclude_labels(unit, own);
      if (p_.problem.key_index != nullptr) exclude_indices(unit, own);
    }
  }

  __device__ void store(const Unit& unit) {
    int64_t count = p_.problem.columns;
    if (p_.problem.valid != nullptr) count = min(count, p_.problem.valid[unit.entry * p_.problem.valid_stride]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row_of(unit, h);
      if (row >= p_.problem.columns) continue;
      float* const to = p_.keys + at(unit, h) * p_.problem.width;
      if (row < count) {
        this->store_sums(to, p_.problem.width, h, 1.0f);
      } else {
        for (int64_t d = lane() % 4; d < p_.problem.width; d += 4) to[d] = 0;
      }
    }
  }

 private:
  using Base::kScores;
  using Base::lane, Base::at, Base::row_of;
  using Base::scores_;

  const SimilarityKeyGradient& p_;

  __device__ void exclude_labels(const Unit& unit, int first) {
    const int64_t* const keys = p_.problem.key_labels + unit.entry * p_.problem.labels_stride;
    const int64_t* const labels = p_.problem.query_labels + unit.entry * p_.problem.rows + first;
    const int left = unit.end - first;
    const int64_t last = p_.problem.columns - 1, own[2] = {keys[min(int64_t(row_of(unit, 0)), last)], keys[min(int64_t(row_of(unit, 1)), last)]};
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      if (i / 2 * 8 + i % 2 >= left) continue;
      const int64_t label = labels[i / 2 * 8 + i % 2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (label == own[h]) scores_[i / 2 * 4 + 2 * h + i % 2] = 0;
    }
  }

  __device__ void exclude_indices(const Unit& unit, int first) {
    const int64_t indices = p_.problem.indices;
    const int64_t* const listed = p_.problem.key_index + (unit.entry * p_.problem.rows + first) * indices;
    const int own = row_of(unit, 0), left = unit.end - first;
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      if (i / 2 * 8 + i % 2 >= left) continue;
#pragma unroll 1
      for (int64_t x = 0; x < indices; ++x) {
        const int key = int(listed[(i / 2 * 8 + i % 2) * indices + x]) - own;
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (key == 8 * h) scores_[i / 2 * 4 + 2 * h + i % 2] = 0;
      }
    }
  }
};

template <Element kType, int kWidth, bool kMasked>
__global__ void __launch_bounds__(kThreads, 1) keys_kernel(const __grid_constant__ KeysParams p) {
  if constexpr (device::kHopper) {
    run_block<Tile<kWidth>>(p.streamed, [&] { Keys<kType, kWidth, kMasked>(p).run(); });
  } else {
    device::stop();
  }
}

template <int kWidth>
const char* launch_keys(const SimilarityKeyGradient& call, void* stream) {
  const SimilarityProblem& p = call.problem;
  constexpr Element kType = Element::kBFloat16;  // float16 has no room for weights that carry an upstream gradient
  KeysParams params{};
  params.call = call;
  Streamed& s = params.streamed;
  s.entries = p.batch, s.rows = p.columns, s.columns = p.rows, s.part_columns = call.term_columns;
  s.stay_shared = p.keys_stride == 0;
  const int64_t units = p.batch * ceil_div(p.columns, kRows), seats = processors();
  if (units > INT32_MAX / 2) return "too many keys";
  s.units = int(units), s.blocks = int(units < seats ? units : seats);
  const char* const error = encode_maps<Tile<kWidth>>(s, kType, p.width, p.keys, p.query);
  if (error != nullptr) return error;
  const Launch how{s.blocks, kThreads, Tile<kWidth>::kShared, 1, stream};
  if (!p.masked()) return launch(keys_kernel<kType, kWidth, false>, how, params);
  if constexpr (kWidth <= kMaskedWidth) return launch(keys_kernel<kType, kWidth, true>, how, params);
  return "rows are too wide for bias and exclusions";
}

}  // namespace

void similarity_keys_plan(SimilarityKeyGradient& p) {
  const int64_t tile = columns_of_tile(p.problem.width);
  p.term_columns = ceil_div(p.problem.rows, tile) * tile;
}

const char* similarity_keys_gradient(const SimilarityKeyGradient& p, void* stream) {
  const char* const error = launch(terms_kernel, {ceil_div(p.problem.batch * p.term_columns, kTermThreads), kTermThreads, 0, 1, stream}, p);
  if (error != nullptr) return error;
  if (p.problem.width <= kWidths[0]) return launch_keys<kWidths[0]>(p, stream);
  return p.problem.width <= kWidths[1] ? launch_keys<kWidths[1]>(p, stream) : launch_keys<kWidths[2]>(p, stream);
}

}  // namespace kdfast
