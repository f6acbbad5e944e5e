// Statistics of a row of scores, and their derivatives: log-sum-exp, and the noise-contrastive loss.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "gather/gather.inl"
#include "engine/softplus.inl"

namespace {

using kdfast::RowStatistic;

// f(elements d to d + kLanes) replaces them; the row's end is filled up with -inf. Returns the sum over k of what f(z, &z) returns, by lanes.
template <class F>
inline Vec replace_row(float* z, int64_t count, const F& f) {
  Vec sum = {};
  for (int64_t begin = 0; begin < count; begin += kRun * kLanes) {  // in runs, which keeps rounding small
    const int64_t end = smaller(count, begin + kRun * kLanes);
    Vec run = {};
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes) {
      Vec x = load(z + k);
      run += f(x, &x);
      store(z + k, x);
    }
    if (k < end) {
      float rest[kLanes];
      store(rest, splat(-kInfinity));
      __builtin_memcpy(rest, z + k, size_t(end - k) * sizeof(float));
      Vec x = load(rest);
      run += f(x, &x);
      store_row(z, k, end, x);
    }
    sum += run;
  }
  return sum;
}

// log sum_k exp z_k; z becomes its softmax, 0 where nothing is above -inf.
inline float log_sum_exp(float* z, int64_t count) {
  Vec best = splat(-kInfinity);
  replace_row(z, count, [&](Vec x, Vec*) __attribute__((always_inline)) {
    best = larger(x, best);
    return Vec{};
  });
  const float maximum = largest(best), shift = maximum == -kInfinity ? 0 : maximum;
  const float sum = total(replace_row(z, count, [&](Vec x, Vec* to) __attribute__((always_inline)) {
    return *to = exp2_nonpositive((x - splat(shift)) * splat(kLog2e));
  }));
  const Vec factor = splat(sum == 0 ? 0 : 1 / sum);
  for (int64_t k = 0; k < count; k += kLanes) store_row(z, k, count, load_row(z, k, count) * factor);
  return shift + float(__builtin_log(double(sum)));
}

// softplus(a - z_0) + sum of the other softplus(z_k - a); `positive` is where z_0 lies.
inline float noise_contrast(float* z, int64_t count, int64_t positive, float a) {
  Vec derivative;
  const float own = softplus(splat(a - z[positive]), &derivative)[0];
  z[positive] = -kInfinity;
  const float others = total(replace_row(z, count, [&](Vec x, Vec* to) __attribute__((always_inline)) { return softplus(x - splat(a), to); }));
  z[positive] = -derivative[0];
  return own + others;
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Row `row`'s value; its K scores, that of sample 0 at `positive`, become weights.
void gather_row_statistic(const GatherParams& p, const RowStatistic& s, int64_t row, float* scores, int64_t positive) {
  s.value[row] = s.shift == nullptr ? log_sum_exp(scores, p.samples) : noise_contrast(scores, p.samples, positive, s.shift[row * s.shift_stride]);
}

// Rows begin .. end, one sampled row after another: values and, where p.out is given, weighted sums. `scores` [K] is scratch.
bool gather_statistic(const GatherParams& p, const RowStatistic& s, int64_t begin, int64_t end, float* scores) {
  bool inside = true;
  for (int64_t row = begin; row < end; ++row) {
    GatherParams one = p;
    one.rows = 1, one.query = p.query + row * p.width, one.index = p.index + row * p.samples, one.weight = scores;
    one.out = scores;
    inside &= gather_similarity(one, 0, p.samples);
    if (s.offset != nullptr) {
      const float* const offset = s.offset + row * p.samples;
      for (int64_t k = 0; k < p.samples; ++k) scores[k] = offset[k] == -kInfinity ? -kInfinity : scores[k] + offset[k];
    }
    gather_row_statistic(p, s, row, scores, 0);
    if (p.out == nullptr) continue;
    one.out = p.out + row * p.width;
    gather_weighted_sum(one, 0, 1);
  }
  return inside;
}

}  // namespace
