// Scores against sampled bank rows, z_nk = q_n . k_{index_nk}, and weighted sums of them, o_n = sum_k w_nk k_{index_nk}.
//
// Every sampled row is read once, straight into registers. The rows lie anywhere, so the time is that of cache misses:
// a vector's worth of rows is scored together and the rows `ahead` of them are requested while they are.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "gather/gather.h"
#include "engine/simd.h"

namespace {

using kdfast::ElementType;
using kdfast::GatherParams;

constexpr int64_t kAheadBytes = 2048;  // of sampled rows requested before they are used
constexpr int64_t kRun = 128;          // rows added one after another; runs are then added up, which keeps rounding small
constexpr int kPanelVecs = 8;          // vectors of query or sum held in registers: at most half of them

// The sampled rows of one call. An index outside the bank reads row 0 instead and is reported.
template <class T>
struct SampledRows {
  const GatherParams& p;
  const T* const bank;
  const int64_t count, ahead;  // samples in all; how many of them to be ahead by
  bool inside = true;

  explicit SampledRows(const GatherParams& params)
      : p(params),
        bank(static_cast<const T*>(params.bank)),
        count(params.rows * params.samples),
        ahead(round_up(kAheadBytes / (params.width * int64_t(sizeof(T))) + 1, kLanes)) {}

  inline const T* at(int64_t sample) {
    const int64_t index = p.index[sample];
    const bool there = uint64_t(index) < uint64_t(p.columns);
    inside &= there;
    return bank + (there ? index : 0) * p.bank_stride;
  }
  // Only for prefetching.
  inline const T* later(int64_t sample) const { return bank + p.index[smaller(sample + ahead, count - 1)] * p.bank_stride; }
};

template <class T>
inline Vec load_short(const T* p, int64_t width) {
  return width < kLanes ? load_partial(p, width) : load(p);
}

// kWidth vectors of a row, the first at element d. When the row ends inside the last one, that one starts earlier, so
// as to end with the row, and overlaps the one before: `last` is where it starts, `mask` the lanes that only it holds.
struct Panel {
  int64_t d, vectors, last;
  IntVec mask;

  Panel(int64_t begin, int64_t width)
      : d(begin), vectors(smaller(kPanelVecs, (width - d + kLanes - 1) / kLanes)), last(d + (vectors - 1) * kLanes) {
    const int64_t overlap = last + kLanes > width && width >= kLanes ? last + kLanes - width : 0;
    last -= overlap;
    for (int lane = 0; lane < kLanes; ++lane) mask[lane] = lane < overlap ? 0 : -1;
  }
};

// The lines of a panel of `later`, a row that will be needed soon.
template <class T, int kWidth>
inline void prefetch_panel(const T* later) {
  constexpr int kLines = (kWidth * kLanes * int(sizeof(T)) + 63) / 64;
#pragma GCC unroll 8
  for (int line = 0; line < kLines; ++line) __builtin_prefetch(reinterpret_cast<const char*>(later) + 64 * line);
}

// f.run<kWidth>(panel) with kWidth = panel.vectors.
template <int kWidth = kPanelVecs, class F>
inline void with_width(const Panel& panel, const F& f) {
  if (panel.vectors == kWidth) {
    f.template run<kWidth>(panel);
  } else if constexpr (kWidth > 1) {
    with_width<kWidth - 1>(panel, f);
  }
}

// One panel of query . row for kLanes sampled rows: lane sums, added to `lanes` [kLanes][kLanes] except in the first panel.
template <class T>
struct ScorePanel {
  const float* query;
  int64_t width;
  const T *const *rows, *const *later;
  float* lanes;

  template <int kWidth>
  inline void run(const Panel& panel) const {
    Vec q[kWidth];
#pragma GCC unroll 8
    for (int v = 0; v < kWidth - 1; ++v) q[v] = load(query + panel.d + v * kLanes);
    q[kWidth - 1] = (Vec)((IntVec)load_short(query + panel.last, width) & panel.mask);
    for (int r = 0; r < kLanes; ++r) {
      prefetch_panel<T, kWidth>(later[r] + panel.d);
      const T* const row = rows[r];
      Vec even = {}, odd = q[kWidth - 1] * (Vec)((IntVec)load_short(row + panel.last, width) & panel.mask);
#pragma GCC unroll 8
      for (int v = 0; v < kWidth - 1; ++v) {
        Vec& sum = v % 2 == 0 ? even : odd;
        sum = multiply_add(q[v], load(row + panel.d + v * kLanes), sum);
      }
      float* const to = lanes + r * kLanes;
      store(to, panel.d == 0 ? even + odd : load(to) + (even + odd));
    }
  }
};

// Lane r of the result: the sum of row r of `lanes`.
inline Vec row_sums(const float* lanes) {
  float columns[kLanes * kLanes];
  transpose(lanes, kLanes, columns, kLanes);
  Vec sum[4] = {};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) sum[lane % 4] += load(columns + lane * kLanes);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Samples begin .. end of the flattened [N, K].
template <class T>
bool score_samples(const GatherParams& p, int64_t begin, int64_t end) {
  SampledRows<T> sampled(p);
  const T *rows[kLanes], *later[kLanes];
  float lanes[kLanes * kLanes];
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / p.samples, stop = smaller(end, (row + 1) * p.samples);
    for (; at < stop; at += kLanes) {
      const int64_t used = smaller(kLanes, stop - at);
      for (int64_t r = 0; r < kLanes; ++r) {
        rows[r] = sampled.at(at + smaller(r, used - 1));
        later[r] = sampled.later(at + r);
      }
      const ScorePanel<T> score{p.query + row * p.width, p.width, rows, later, lanes};
      for (int64_t d = 0; d < p.width; d += kPanelVecs * kLanes) with_width(Panel(d, p.width), score);
      const Vec z = row_sums(lanes);
      __builtin_memcpy(p.out + at, &z, size_t(used) * sizeof(float));
    }
    at = stop;
  }
  return sampled.inside;
}

// One panel of a weighted sum of `terms`: at(k) is a row, weight(k) its weight, fetch<lines>(k, d) asks for what comes later.
template <class Terms>
struct SumPanel {
  Terms& terms;
  int64_t width;
  float* out;  // [width]

  template <int kWidth>
  inline void run(const Panel& panel) const {
    constexpr int kSets = 2 * kWidth <= kPanelVecs ? 2 : 1;  // rows added side by side: the multiply-add's latency
    Vec sum[kWidth] = {};
    for (int64_t begin = 0; begin < terms.count; begin += kRun) {
      const int64_t end = smaller(begin + kRun, terms.count);
      Vec acc[kSets][kWidth] = {};
      const auto add = [&](Vec* to, int64_t k) __attribute__((always_inline)) {
        terms.template fetch<kWidth>(k, panel.d);
        const auto* const from = terms.at(k);
        const Vec w = splat(terms.weight(k));
#pragma GCC unroll 8
        for (int v = 0; v < kWidth - 1; ++v) to[v] = multiply_add(w, load(from + panel.d + v * kLanes), to[v]);
        to[kWidth - 1] = multiply_add(w, load_short(from + panel.last, width), to[kWidth - 1]);
      };
      int64_t k = begin;
      for (; k + kSets <= end; k += kSets)
#pragma GCC unroll 2
        for (int set = 0; set < kSets; ++set) add(acc[set], k + set);
      if (k < end) add(acc[0], k);
#pragma GCC unroll 8
      for (int v = 0; v < kWidth; ++v) sum[v] += kSets == 2 ? acc[0][v] + acc[kSets - 1][v] : acc[0][v];
    }
    for (int v = 0; v < kWidth - 1; ++v) store(out + panel.d + v * kLanes, sum[v]);
    __builtin_memcpy(out + panel.last, &sum[kWidth - 1], size_t(smaller(kLanes, width)) * sizeof(float));
  }
};

template <class Terms>
inline void add_terms(Terms& terms, int64_t width, float* out) {
  for (int64_t d = 0; d < width; d += kPanelVecs * kLanes) with_width(Panel(d, width), SumPanel<Terms>{terms, width, out});
}

// The bank rows sampled for one row, with its weights.
template <class T>
struct SampledTerms {
  SampledRows<T>& sampled;
  const float* weights;
  int64_t first, count;

  inline const T* at(int64_t k) { return sampled.at(first + k); }
  inline float weight(int64_t k) const { return weights[k]; }
  template <int kWidth>
  inline void fetch(int64_t k, int64_t d) const {
    prefetch_panel<T, kWidth>(sampled.later(first + k) + d);
  }
};

// Rows begin .. end.
template <class T>
bool sum_samples(const GatherParams& p, int64_t begin, int64_t end) {
  SampledRows<T> sampled(p);
  for (int64_t row = begin; row < end; ++row) {
    SampledTerms<T> terms{sampled, p.weight + row * p.samples, row * p.samples, p.samples};
    add_terms(terms, p.width, p.out + row * p.width);
  }
  return sampled.inside;
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

bool gather_similarity(const GatherParams& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case ElementType::kFloat32:
      return score_samples<float>(p, begin, end);
    case ElementType::kBFloat16:
      return score_samples<BFloat16>(p, begin, end);
    case ElementType::kFloat16:
      return score_samples<Half>(p, begin, end);
  }
  return false;
}

bool gather_weighted_sum(const GatherParams& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case ElementType::kFloat32:
      return sum_samples<float>(p, begin, end);
    case ElementType::kBFloat16:
      return sum_samples<BFloat16>(p, begin, end);
    case ElementType::kFloat16:
      return sum_samples<Half>(p, begin, end);
  }
  return false;
}

}  // namespace
