// Losses of chosen triplets and their gradients, from the rows themselves: O(triplets x width).
//
// With u, v the rows as the metric sees them and d their distance, d(||u - v||)/du = (u - v) / d, 0 at d = 0; of ||u - v||^2 it is 2 (u - v), of
// 1 - u.v it is -v. A triplet is two such pairs (a, p) and (a, n), or with `swap` (p, n); the forward pass leaves each pair's factor. Rows brought to
// unit length pull a gradient g back as (g - u (u.g)) / |x|.
//
// A task owns rows of the gradient and adds to them what all triplets give, in their order: the same bits for any number of tasks.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/chosen.h"
#include "triplet/metric.inl"

namespace {

using kdfast::ChosenGradients;
using kdfast::ChosenLosses;
using kdfast::ChosenParams;

// A row and its scale.
struct ScaledRow {
  Matrix elements;
  float scale;
};

inline ScaledRow x_row(const ChosenParams& p, int64_t i) { return {p.x.matrix.from(i * p.width), p.x_scale != nullptr ? p.x_scale[i] : 1}; }
inline ScaledRow y_row(const ChosenParams& p, int64_t j) { return {p.y.matrix.from(j * p.width), p.y_scale != nullptr ? p.y_scale[j] : 1}; }

// f(vector of u, vector of v, d) for all their elements.
template <class F>
inline void for_pair(const ScaledRow& u, const ScaledRow& v, int64_t width, const F& f) {
  const Vec u_scale = splat(u.scale), v_scale = splat(v.scale);
  with_elements(u.elements, [&](const auto* ue) {
    with_elements(v.elements, [&](const auto* ve) {
      for (int64_t d = 0; d < width; d += kLanes) f(scaled(load_row(ue, d, width), u_scale), scaled(load_row(ve, d, width), v_scale), d);
    });
  });
}

// The sum of the lanes, by halves.
inline double wide_total(Vec x) {
  double sum[kLanes];
  for (int i = 0; i < kLanes; ++i) sum[i] = double(x[i]);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}

// In double: distances are subtracted from each other.
inline double pair_distance(const ChosenParams& p, const ScaledRow& u, const ScaledRow& v) {
  Vec sum = {};
  if (p.metric == Metric::kCosine) {
    for_pair(u, v, p.width, [&](Vec a, Vec b, int64_t) { sum = multiply_add(a, b, sum); });
    return 1 - wide_total(sum);
  }
  for_pair(u, v, p.width, [&](Vec a, Vec b, int64_t) { sum = multiply_add(a - b, a - b, sum); });
  return p.metric == Metric::kEuclidean ? __builtin_sqrt(wide_total(sum)) : wide_total(sum);
}

// The factor of a pair's gradient, from the derivative of the loss in its distance.
inline float pair_factor(Metric metric, float slope, double distance) {
  if (metric == Metric::kCosine) return slope;
  if (metric == Metric::kSquaredEuclidean) return 2 * slope;
  return distance == 0 ? 0 : float(slope / distance);
}

// to += factor times the gradient of the distance of u and v in u
inline void add_pair(const ChosenParams& p, float factor, const ScaledRow& u, const ScaledRow& v, float* to) {
  const Vec times = splat(factor);
  const bool cosine = p.metric == Metric::kCosine;
  for_pair(u, v, p.width, [&](Vec a, Vec b, int64_t d) {
    store_row(to, d, p.width, multiply_add(times, cosine ? -b : a - b, load_row(to, d, p.width)));
  });
}

// The gradient in a row of its scaled self, turned into that in the row.
inline void through_length(const MetricRows& m, const ScaledRow& row, float* g) {
  if (!m.normalize) return;
  Vec along = {};
  const ScaledRow gradient{{g, ElementType::kFloat32}, 1};
  for_pair(row, gradient, m.width, [&](Vec u, Vec v, int64_t) { along = multiply_add(u, v, along); });
  const bool unit = row.scale < 1e12f;  // shorter rows are divided by a constant
  const Vec projection = splat(unit ? total(along) : 0), scale = splat(row.scale);
  for_pair(row, gradient, m.width, [&](Vec u, Vec v, int64_t d) { store_row(g, d, m.width, (v - u * projection) * scale); });
}

// g times a pair's factor; a triplet that adds nothing stays out of it, whatever g is.
inline float pair_weight(const ChosenGradients& out, const float* factor, int64_t t) { return factor[t] == 0 ? 0 : out.g[t] * factor[t]; }

// Adds to rows begin .. end of `to`, the gradient in the references, what they get as positives and negatives: shown(row) for each.
template <class Shown>
inline void add_references(const ChosenParams& p, const ChosenGradients& out, int64_t begin, int64_t end, float* to, const Shown& shown) {
  const auto inside = [&](int64_t row) { return row >= begin && row < end; };
  const auto add = [&](float factor, int64_t u, const ScaledRow& v) {
    if (factor == 0 || !inside(u)) return;
    shown(u);
    add_pair(p, factor, y_row(p, u), v, to + u * p.width);
  };
  for (int64_t t = 0; t < p.rows * p.each; ++t) {
    const int64_t positive = p.positive[t], negative = p.negative[t];
    if (positive < 0 || negative < 0 || !(inside(positive) || inside(negative))) continue;
    const ScaledRow anchor = x_row(p, t / p.each);
    add(pair_weight(out, out.a_p, t), positive, anchor);
    add(pair_weight(out, out.a_n, t), negative, anchor);
    if (!p.swap) continue;
    const float p_n = pair_weight(out, out.p_n, t);
    add(p_n, positive, y_row(p, negative));
    add(p_n, negative, y_row(p, positive));
  }
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Rows begin .. end.
void row_scales(const MetricRows& m, int64_t begin, int64_t end, float* scale) {
  for (int64_t i = begin; i < end; ++i) scale[i] = row_scale(m, i);
}

// Triplets of the anchors begin .. end.
void triplet_chosen(const ChosenParams& p, const ChosenLosses& out, int64_t begin, int64_t end) {
  for (int64_t t = begin * p.each; t < end * p.each; ++t) {
    out.loss[t] = out.a_p[t] = out.a_n[t] = 0;
    if (p.swap) out.p_n[t] = 0;
    if (p.positive[t] < 0 || p.negative[t] < 0) continue;
    const ScaledRow anchor = x_row(p, t / p.each), positive = y_row(p, p.positive[t]), negative = y_row(p, p.negative[t]);
    const double d_ap = pair_distance(p, anchor, positive), d_pn = p.swap ? pair_distance(p, positive, negative) : 0;
    double d_an = pair_distance(p, anchor, negative);
    const bool swapped = p.swap && d_pn < d_an;
    if (swapped) d_an = d_pn;
    const float z = float(p.sign * (d_ap - d_an) + p.margin);
    float slope = z > 0 ? 1 : z == z ? 0 : z;
    if (p.soft) {
      const float e = __builtin_expf(-__builtin_fabsf(z));  // neither overflows
      out.loss[t] = (z > 0 || z != z ? z : 0) + __builtin_log1pf(e);
      slope = (z > 0 ? 1 : e) / (1 + e);
    } else {
      out.loss[t] = z > 0 || z != z ? z : 0;
    }
    out.a_p[t] = pair_factor(p.metric, p.sign * slope, d_ap);
    (swapped ? out.p_n : out.a_n)[t] = pair_factor(p.metric, -p.sign * slope, d_an);
  }
}

// Rows begin .. end of dx.
void triplet_chosen_grad_x(const ChosenParams& p, const ChosenGradients& out, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    float* const to = out.dx + i * p.width;
    __builtin_memset(to, 0, size_t(p.width) * 4);
    for (int64_t t = i * p.each; t < (i + 1) * p.each; ++t) {
      if (const float c = pair_weight(out, out.a_p, t); c != 0) add_pair(p, c, x_row(p, i), y_row(p, p.positive[t]), to);
      if (const float c = pair_weight(out, out.a_n, t); c != 0) add_pair(p, c, x_row(p, i), y_row(p, p.negative[t]), to);
    }
  }
  if (p.in_batch) add_references(p, out, begin, end, out.dx, [](int64_t) {});
  for (int64_t i = begin; i < end; ++i) through_length(p.x, x_row(p, i), out.dx + i * p.width);
}

// Rows begin .. end of dy. `touched` [columns]: scratch.
void triplet_chosen_grad_y(const ChosenParams& p, const ChosenGradients& out, int64_t begin, int64_t end, bool* touched) {
  __builtin_memset(out.dy + begin * p.width, 0, size_t((end - begin) * p.width) * 4);
  __builtin_memset(touched + begin, 0, size_t(end - begin));
  add_references(p, out, begin, end, out.dy, [&](int64_t row) { touched[row] = true; });
  for (int64_t j = begin; j < end; ++j)
    if (touched[j]) through_length(p.y, y_row(p, j), out.dy + j * p.width);
}

}  // namespace
