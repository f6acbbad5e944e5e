// The parts of a split bank joined, always in the same order: a thread has four columns of a row.
#include "similarity/log_sum.cuh"
#include "similarity/similarity.h"

namespace kdfast {
namespace {

constexpr int kThreads = 256, kWidth = 4;

struct alignas(16) Four {
  float x[kWidth];
};

__global__ void __launch_bounds__(kThreads) merge_kernel(SimilarityForward p) {
  const SimilarityParts& in = p.split;
  const int64_t rows = p.problem.batch * p.problem.rows;
  const int64_t groups = p.out.pooled != nullptr ? p.problem.value_width / kWidth : 1, at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = at / groups, group = at % groups;
  if (row >= rows) return;
  float top = -INFINITY;
  for (int64_t s = 0; s < in.parts; ++s) top = fmaxf(top, in.top[s * rows + row]);
  const float shift = shift_of(top);
  float total = 0;
  Four sums{};
  for (int64_t s = 0; s < in.parts; ++s) {
    const float weight = device::exp2_fast(in.top[s * rows + row] - shift);
    total = fmaf(weight, in.total[s * rows + row], total);
    if (p.out.pooled == nullptr) continue;
    const Four part = *reinterpret_cast<const Four*>(in.pooled + (s * rows + row) * p.problem.value_width + group * kWidth);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums.x[i] = fmaf(weight, part.x[i], sums.x[i]);
  }
  if (group == 0) {
    const LogSum sum = log_sum(top, total);
    p.out.lse[row] = sum.nats, p.out.lse_low[row] = sum.low;
  }
  if (p.out.pooled == nullptr) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums.x[i] /= total == 0 ? 1.0f : total;
  *reinterpret_cast<Four*>(p.out.pooled + row * p.problem.value_width + group * kWidth) = sums;
}

}  // namespace

const char* similarity_merge(const SimilarityForward& p, void* stream) {
  const int64_t threads = p.problem.batch * p.problem.rows * (p.out.pooled != nullptr ? p.problem.value_width / kWidth : 1);
  return launch(merge_kernel, {(threads + kThreads - 1) / kThreads, kThreads, 0, 1, stream}, p);
}

}  // namespace kdfast
