// Rows of InfoNCE, once the log-sum-exp over the negatives is known: losses, and everything their gradients need.
//
// With z+_ij = s_i q_i.k+_ij + b_ij and x_ij = lse_i - z+_ij,
//   loss_i = sum_j w_ij log(1 + e^x_ij),   slope_ij = w_ij e^x_ij / (1 + e^x_ij)
// (without the positive in the denominator sum_j w_ij x_ij and w_ij), so that with t_i = sum_j slope_ij and O_i = sum_j p_ij k_j
//   dloss_i / d(s_i q_i) = t_i O_i - sum_j slope_ij k+_ij,   dloss_i / dk+_ij = -slope_ij s_i q_i,   dloss_i / dlse_i = t_i.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/softplus.inl"
#include "info_nce/info_nce.h"
#include "similarity/exponential.inl"

namespace {

using kdfast::InfoNceGradients;
using kdfast::InfoNceParams;
using kdfast::InfoNceRows;

inline void store_some(float* p, Vec x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  __builtin_memcpy(p, &x, size_t(count) * sizeof(float));
}

template <class A, class B>
inline float inner_product(const A* a, const B* b, int64_t width) {
  Vec sum = {};
  for (int64_t d = 0; d < width; d += kLanes) sum = multiply_add(load_row(a, d, width), load_row(b, d, width), sum);
  return total(sum);
}

// to += factor x, or to = factor x
template <bool kAdd, class T>
inline void scaled(float* to, float factor, const T* x, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vec product = splat(factor) * load_row(x, d, width);
    store_some(to + d, kAdd ? load_row(to, d, width) + product : product, width - d);
  }
}

// log(1 + e^x) and its derivative.
inline Vec softplus_of(Vec x, Vec* slope) {
  const Vec e = exp_nonpositive(x < Vec{} ? x : -x), one = splat(1.0f);
  *slope = (x < Vec{} ? e : one) / (one + e);
  return larger(Vec{}, x) + log1p_unit(e);
}

// lse + low - z, small where both are large.
inline float gap(float lse, float low, double z) { return float(double(lse) + double(low) - z); }

// Where the positive is among the candidates of the batch; -1: there is none.
inline int64_t column_of(const InfoNceParams& p, int64_t row, int64_t j) {
  const int64_t at = row * p.positives + j;
  return p.columns != nullptr ? p.columns[at] : at - row / p.rows * p.count;
}

// Where its elements begin.
inline int64_t candidate(const InfoNceParams& p, int64_t row, int64_t column) {
  return row / p.rows * p.candidates_batch_stride + column * p.width;
}

inline float upstream(const InfoNceGradients& d, int64_t row) { return d.factor * d.g[row * d.g_stride]; }

// ---- the entries of the dispatch table ------------------------------------------------------------------------------

// Takes off row i's pull what its positives pull by.
template <class C>
void pull_positives(const InfoNceParams& p, const InfoNceRows& r, int64_t i, const C* candidates) {
  for (int64_t j = 0; j < p.positives; ++j)
    if (const int64_t column = column_of(p, i, j); column >= 0)
      scaled<true>(r.pull + i * p.width, -r.slopes[i * p.positives + j], candidates + candidate(p, i, column), p.width);
}

// Makes the product of query and pull, the gradient of the scale, what the scores say it is, less the level that all of them share (the slopes add up
// to 0). Where keys are large and alike, sums of keys lose more of it than there is.
template <class Q, class C>
void straighten(const InfoNceParams& p, const InfoNceRows& r, int64_t i, const Q* queries, const C* candidates) {
  const Q* const query = queries + i * p.width;
  float* const pull = r.pull + i * p.width;
  float sum = r.scores[i];
  for (int64_t j = 0; j < p.positives; ++j)
    if (const int64_t column = column_of(p, i, j); column >= 0)
      sum -= r.slopes[i * p.positives + j] * (inner_product(query, candidates + candidate(p, i, column), p.width) - r.level);
  const float square = inner_product(query, query, p.width);
  if (square > 0x1p-100f) scaled<true>(pull, (sum - inner_product(query, pull, p.width)) / square, query, p.width);
}

// x_ij of the positive, whose column there is; `r` has lse and lse_low.
template <class R, class Q, class C>
float gap_of(const InfoNceParams& p, const R& r, int64_t i, int64_t column, const Q* queries, const C* candidates) {
  const float bias = p.bias != nullptr ? p.bias[i / p.rows * p.bias_batch_stride + column] : 0;
  const float inner = inner_product(queries + i * p.width, candidates + candidate(p, i, column), p.width);
  return gap(r.lse[i], r.lse_low[i], double(p.scale[i]) * double(inner) + double(bias));
}

// Losses and slopes, kLanes positives at once: a logarithm and an exponential for each are most of a row's time.
template <class Q, class C>
void losses_of(const InfoNceParams& p, const InfoNceRows& r, const Q* queries, const C* candidates) {
  for (int64_t i = r.begin; i < r.end; ++i) r.losses[i] = 0;
  const int64_t end = r.end * p.positives;
  for (int64_t at = r.begin * p.positives; at < end; at += kLanes) {
    const int64_t count = smaller(kLanes, end - at);
    alignas(64) float x[kLanes] = {}, value[kLanes], slope[kLanes], weight[kLanes];
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = (at + k) / p.positives, column = column_of(p, i, (at + k) % p.positives);
      weight[k] = column < 0 ? 0 : p.weights != nullptr ? p.weights[at + k] : 1 / float(p.positives);
      x[k] = column < 0 ? 0 : gap_of(p, r, i, column, queries, candidates);
    }
    Vec slopes = splat(1.0f);
    store(value, r.include_positive ? softplus_of(load(x), &slopes) : load(x));
    store(slope, slopes);
    for (int64_t k = 0; k < count; ++k) {
      r.losses[(at + k) / p.positives] += weight[k] * value[k];
      r.slopes[at + k] = weight[k] * slope[k];
    }
  }
}

template <class Q, class C>
void info_nce_rows_of(const InfoNceParams& p, const InfoNceRows& r, const Q* queries, const C* candidates) {
  losses_of(p, r, queries, candidates);
  for (int64_t i = r.begin; i < r.end && r.pull != nullptr; ++i) {
    float* const pull = r.pull + i * p.width;
    float sum = 0;
    for (int64_t j = i * p.positives; j < (i + 1) * p.positives; ++j) sum += r.slopes[j];
    scaled<false>(pull, sum, pull, p.width);
    pull_positives(p, r, i, candidates);
  }
}

void info_nce_rows(const InfoNceParams& p, const InfoNceRows& r) {
  with_elements(p.query, [&](const auto* queries) {
    with_elements(p.candidates, [&](const auto* candidates) { info_nce_rows_of(p, r, queries, candidates); });
  });
}

void info_nce_pull(const InfoNceParams& p, const InfoNceRows& r) {
  with_elements(p.candidates, [&](const auto* candidates) {
    for (int64_t i = r.begin; i < r.end; ++i) pull_positives(p, r, i, candidates);
    if (r.scores == nullptr) return;
    with_elements(p.query, [&](const auto* queries) {
      for (int64_t i = r.begin; i < r.end; ++i) straighten(p, r, i, queries, candidates);
    });
  });
}

// Rows begin .. end; what belongs to the candidates is not touched.
void info_nce_grad_rows(const InfoNceParams& p, const InfoNceGradients& d, int64_t begin, int64_t end) {
  with_elements(p.query, [&](const auto* queries) {
    for (int64_t i = begin; i < end; ++i) {
      const float* const pull = d.pull + i * p.width;
      const float g = upstream(d, i);
      if (d.dquery != nullptr) scaled<false>(d.dquery + i * p.width, d.g[i * d.g_stride] * (d.factor * p.scale[i]), pull, p.width);
      if (d.dscale != nullptr) d.dscale[i] = g * inner_product(queries + i * p.width, pull, p.width);
      float sum = 0;
      for (int64_t j = i * p.positives; j < (i + 1) * p.positives; ++j) {
        sum += d.slopes[j];
        if (d.dpositive != nullptr)
          scaled<false>(d.dpositive + j * p.width, -g * p.scale[i] * d.slopes[j], queries + i * p.width, p.width);
      }
      if (d.dlse != nullptr) d.dlse[i] = g * sum;
    }
  });
}

// Added to the gradients of the candidates, row after row: several may name one candidate.
void info_nce_grad_candidates(const InfoNceParams& p, const InfoNceGradients& d) {
  with_elements(p.query, [&](const auto* queries) {
    for (int64_t i = 0; i < p.batch * p.rows; ++i) {
      for (int64_t j = 0; j < p.positives; ++j) {
        const int64_t column = column_of(p, i, j), at = i / p.rows * p.count + column;
        if (column < 0) continue;
        const float slope = upstream(d, i) * d.slopes[i * p.positives + j];
        if (d.dcandidates != nullptr) scaled<true>(d.dcandidates + at * p.width, -slope * p.scale[i], queries + i * p.width, p.width);
        if (d.dbias != nullptr) d.dbias[at] -= slope;
      }
    }
  });
}

}  // namespace
