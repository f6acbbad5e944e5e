// The second derivative of InfoNCE's rows along a direction: what is beside the pass over the bank.
//
// Along the direction (u, sigma, kappa+) of (q, s, k+), with e = s u + sigma q, row i's loss moves at
//   sum_j slope_ij (r_i - r+_ij),   r_i = mean of the logits' rates under p,   r+_ij = e_i.k+_ij + s_i q_i.kappa+_ij,
// the rates of the bank's logits being e_i.k_j + s_i q_i.kappa_j. With c_ij = slope_ij sigmoid(-x_ij) (r_i - r+_ij) (without the positive in the
// denominator 0), t_i = sum_j slope_ij, kappa_i the mean of the kappa_j, and
//   V_i = t_i sum_j p_ij (rate_ij - r_i) k_j + sum_j c_ij (O_i - k+_ij) + t_i kappa_i - sum_j slope_ij kappa+_ij,
// its derivatives are
//   in q: s V + sigma pull,   in s: q.V + u.pull,   in k+: -(c s q + slope e).
// The pass has sum_j p_ij (rate_ij - r_i) k_j, for the slopes -r_i and h = e. With t = 1 and no positives this is the second derivative of lse.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "info_nce/info_nce.inl"

namespace {

using kdfast::InfoNceTangent;

inline float upstream(const InfoNceTangent& t, int64_t row) { return t.factor * t.g[row * t.g_stride]; }

// t_i = dloss_i / dlse_i
inline float total_slope(const InfoNceParams& p, const InfoNceTangent& t, int64_t row) {
  if (t.slopes == nullptr) return 1;
  float sum = 0;
  for (int64_t j = row * p.positives; j < (row + 1) * p.positives; ++j) sum += t.slopes[j];
  return sum;
}

// Of row i: e = s u + sigma q.
template <class Q>
void direct(const InfoNceParams& p, const InfoNceTangent& t, int64_t i, const Q* queries) {
  float* const e = t.direction + i * p.width;
  scaled<false>(e, t.scale != nullptr ? t.scale[i] : 0, queries + i * p.width, p.width);
  if (t.query.data == nullptr) return;
  with_elements(t.query, [&](const auto* u) { scaled<true>(e, p.scale[i], u + i * p.width, p.width); });
}

// O from the pull, t O - sum_j slope_ij k+_ij. Where no slope is left, neither is a derivative.
template <class C>
void pool(const InfoNceParams& p, const InfoNceTangent& t, int64_t i, const C* candidates) {
  float* const pooled = t.pooled + i * p.width;
  const float sum = total_slope(p, t, i);
  __builtin_memcpy(pooled, t.pull + i * p.width, size_t(4 * p.width));
  for (int64_t j = 0; j < p.positives; ++j)
    if (const int64_t column = column_of(p, i, j); column >= 0)
      scaled<true>(pooled, t.slopes[i * p.positives + j], candidates + candidate(p, i, column), p.width);
  scaled<false>(pooled, sum > 0x1p-126f ? 1 / sum : 0, pooled, p.width);
}

// sum_d a_d (b_d - c_d)
template <class C>
inline float inner_difference(const float* a, const float* b, const C* c, int64_t width) {
  Vec sum = {};
  for (int64_t d = 0; d < width; d += kLanes) sum = multiply_add(load_row(a, d, width), load_row(b, d, width) - load_row(c, d, width), sum);
  return total(sum);
}

template <class Q>
inline float product_with(const Matrix& matrix, int64_t at, const Q* row, int64_t width) {
  float product = 0;
  with_elements(matrix, [&](const auto* elements) { product = inner_product(elements + at, row, width); });
  return product;
}

template <class Q, class C>
void info_nce_direction_of(const InfoNceParams& p, const InfoNceTangent& t, int64_t begin, int64_t end, const Q* queries, const C* candidates) {
  for (int64_t i = begin; i < end; ++i) {
    const Q* const query = queries + i * p.width;
    const float *const e = t.direction + i * p.width, *const pooled = t.pooled + i * p.width;
    direct(p, t, i, queries);
    pool(p, t, i, candidates);
    const float of_mean = t.keys_mean != nullptr ? p.scale[i] * inner_product(query, t.keys_mean + i * p.width, p.width) : 0;
    t.slope[i] = -(inner_product(e, pooled, p.width) + of_mean);
    float moved = t.slopes == nullptr ? -t.slope[i] : 0;
    for (int64_t j = 0; j < p.positives; ++j) {
      const int64_t at = i * p.positives + j, column = column_of(p, i, j);
      t.curvature[at] = 0;
      if (column < 0) continue;
      const int64_t from = candidate(p, i, column);
      const float of_own = t.candidates.data != nullptr ? p.scale[i] * product_with(t.candidates, from, query, p.width) : 0;
      const float apart = inner_difference(e, pooled, candidates + from, p.width) + (of_mean - of_own);
      moved += t.slopes[at] * apart;
      if (!t.include_positive) continue;
      Vec rest;  // 1 - sigmoid(x)
      softplus_of(splat(-gap_of(p, t, i, column, queries, candidates)), &rest);
      t.curvature[at] = t.slopes[at] * rest[0] * apart;
    }
    if (t.dg != nullptr) t.dg[i] = moved;
  }
}

// Makes V where the gradient of the query will be.
template <class C>
void info_nce_second_row(const InfoNceParams& p, const InfoNceTangent& t, int64_t i, const C* candidates) {
  const int64_t width = p.width;
  float *const v = t.dquery + i * width, *const pooled = t.pooled + i * width;
  // rounding errors that all keys share are divided out, and taken off (first_order.py)
  const float sum = total_slope(p, t, i), mass = t.mass[i] == 0 ? 1 : t.mass[i], excess = t.mass[i] == 0 ? 0 : t.total[i] / mass;
  scaled<false>(v, sum / mass, t.rows + i * width, width);
  scaled<true>(v, -sum * excess, pooled, width);
  if (t.keys_mean != nullptr) scaled<true>(v, sum, t.keys_mean + i * width, width);
  for (int64_t j = 0; j < p.positives; ++j) {
    const int64_t at = i * p.positives + j, column = column_of(p, i, j);
    if (column < 0) continue;
    const int64_t from = candidate(p, i, column);
    scaled<true>(v, t.curvature[at], pooled, width);
    scaled<true>(v, -t.curvature[at], candidates + from, width);
    if (t.candidates.data != nullptr)
      with_elements(t.candidates, [&](const auto* directions) { scaled<true>(v, -t.slopes[at], directions + from, width); });
  }
}

// ---- the entries of the dispatch table ------------------------------------------------------------------------------

void info_nce_direction(const InfoNceParams& p, const InfoNceTangent& t, int64_t begin, int64_t end) {
  with_elements(p.query, [&](const auto* queries) {
    with_elements(p.candidates, [&](const auto* candidates) { info_nce_direction_of(p, t, begin, end, queries, candidates); });
  });
}

void info_nce_second_rows(const InfoNceParams& p, const InfoNceTangent& t, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = i * p.width;
    const float g = upstream(t, i), *const pull = t.pull + at;
    float* const v = t.dquery + at;
    with_elements(p.candidates, [&](const auto* candidates) { info_nce_second_row(p, t, i, candidates); });
    if (t.dscale != nullptr) {
      const float of_query = t.query.data != nullptr ? product_with(t.query, at, pull, p.width) : 0;
      t.dscale[i] = g * (product_with(p.query, at, v, p.width) + of_query);
    }
    scaled<false>(v, g * p.scale[i], v, p.width);
    if (t.scale != nullptr) scaled<true>(v, g * t.scale[i], pull, p.width);
  }
}

// Row after row: several may name one candidate.
void info_nce_second_candidates(const InfoNceParams& p, const InfoNceTangent& t) {
  with_elements(p.query, [&](const auto* queries) {
    for (int64_t i = 0; i < p.batch * p.rows; ++i) {
      const float g = upstream(t, i);
      for (int64_t j = 0; j < p.positives; ++j) {
        const int64_t at = i * p.positives + j, column = column_of(p, i, j);
        if (column < 0) continue;
        float* const to = t.dcandidates + (i / p.rows * p.count + column) * p.width;
        scaled<true>(to, -g * t.curvature[at] * p.scale[i], queries + i * p.width, p.width);
        scaled<true>(to, -g * t.slopes[at], t.direction + i * p.width, p.width);
      }
    }
  });
}

}  // namespace
