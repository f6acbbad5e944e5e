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
template <class T>
struct ScaledRow {
  const T* elements;
  float scale;

  template <bool kWhole>
  Vec at(int64_t d, int64_t width) const {
    return scaled(kWhole ? load(elements + d) : load_partial(elements + d, width - d), splat(scale));
  }
};

constexpr int64_t kAhead = 4;  // triplets whose rows are brought near before they are needed

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// f(d, Constant: whether a whole vector is there) for the vectors of a row.
template <class F>
inline void for_vectors(int64_t width, const F& f) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) f(d, Constant<true>{});
  if (d < width) f(d, Constant<false>{});
}

template <bool kWhole>
inline Vec load_some(const float* x, int64_t d, int64_t width) {
  return kWhole ? load(x + d) : load_partial(x + d, width - d);
}
template <bool kWhole>
inline void store_some(float* x, int64_t d, int64_t width, Vec v) {
  kWhole ? store(x + d, v) : store_row(x, d, width, v);
}

// The rows of a call, by the type of their elements.
template <class X, class Y>
struct ChosenRows {
  const ChosenParams& p;
  const X* x;
  const Y* y;

  ScaledRow<X> x_row(int64_t i) const { return {x + i * p.width, p.x_scale != nullptr ? p.x_scale[i] : 1}; }
  ScaledRow<Y> y_row(int64_t j) const { return {y + j * p.width, p.y_scale != nullptr ? p.y_scale[j] : 1}; }
};

template <class X, class Y>
inline ChosenRows<X, Y> chosen_rows(const ChosenParams& p, const X* x, const Y* y) {
  return {p, x, y};
}

template <class F>
inline void with_rows(const ChosenParams& p, const F& f) {
  with_elements(p.x.matrix, [&](const auto* x) { with_elements(p.y.matrix, [&](const auto* y) { f(chosen_rows(p, x, y)); }); });
}

// In double: distances are subtracted from each other.
template <class U, class V>
inline double pair_distance(const ChosenParams& p, const ScaledRow<U>& u, const ScaledRow<V>& v) {
  const bool cosine = p.metric == Metric::kCosine;
  Vec sum = {};
  for_vectors(p.width, [&](int64_t d, auto whole) {
    const Vec a = u.template at<whole.value>(d, p.width), b = v.template at<whole.value>(d, p.width);
    sum = cosine ? multiply_add(a, b, sum) : multiply_add(a - b, a - b, sum);
  });
  if (cosine) return 1 - wide_total(sum);
  return p.metric == Metric::kEuclidean ? __builtin_sqrt(wide_total(sum)) : wide_total(sum);
}

// The factor of a pair's gradient, from the derivative of the loss in its distance.
inline float pair_factor(Metric metric, float slope, double distance) {
  if (metric == Metric::kCosine) return slope;
  if (metric == Metric::kSquaredEuclidean) return 2 * slope;
  return distance == 0 ? 0 : float(slope / distance);
}

// What the gradient of the distance of u and v in u is a multiple of.
inline Vec direction(bool cosine, Vec u, Vec v) { return cosine ? -v : u - v; }

// to += factor times the gradient of the distance of u and v in u
template <class U, class V>
inline void add_pair(const ChosenParams& p, float factor, const ScaledRow<U>& u, const ScaledRow<V>& v, float* to) {
  const bool cosine = p.metric == Metric::kCosine;
  for_vectors(p.width, [&](int64_t d, auto whole) {
    const Vec along = direction(cosine, u.template at<whole.value>(d, p.width), v.template at<whole.value>(d, p.width));
    store_some<whole.value>(to, d, p.width, multiply_add(splat(factor), along, load_some<whole.value>(to, d, p.width)));
  });
}

// The same for one u and many v, a few at a time, so that u and the sum are seldom read.
template <class U, class V>
struct AddedPairs {
  static constexpr int kTogether = 8;

  const ChosenParams& p;
  ScaledRow<U> u;
  float* to;
  int waiting = 0;
  float factors[kTogether] = {};
  ScaledRow<V> others[kTogether] = {};

  AddedPairs(const ChosenParams& p, const ScaledRow<U>& u, float* to) : p(p), u(u), to(to) {}

  void add(float factor, const ScaledRow<V>& v) {
    if (factor == 0) return;
    prefetch_row(v.elements, p.width);
    factors[waiting] = factor, others[waiting] = v;
    if (++waiting == kTogether) add_all();
  }
  void finish() {
    for (int i = 0; i < waiting; ++i) add_pair(p, factors[i], u, others[i], to);
  }

 private:
  void add_all() {
    const bool cosine = p.metric == Metric::kCosine;
    for_vectors(p.width, [&](int64_t d, auto whole) {
      const Vec own = u.template at<whole.value>(d, p.width);
      Vec sum = load_some<whole.value>(to, d, p.width);
#pragma GCC unroll 8
      for (int i = 0; i < kTogether; ++i)
        sum = multiply_add(splat(factors[i]), direction(cosine, own, others[i].template at<whole.value>(d, p.width)), sum);
      store_some<whole.value>(to, d, p.width, sum);
    });
    waiting = 0;
  }
};

template <class X, class Y>
inline AddedPairs<X, Y> added_pairs(const ChosenRows<X, Y>& rows, int64_t anchor, float* to) {
  return {rows.p, rows.x_row(anchor), to};
}

// The gradient in a row of its scaled self, turned into that in the row.
template <class T>
inline void through_length(const MetricRows& m, const ScaledRow<T>& row, float* g) {
  if (!m.normalize) return;
  Vec along = {};
  for_vectors(m.width, [&](int64_t d, auto whole) {
    along = multiply_add(row.template at<whole.value>(d, m.width), load_some<whole.value>(g, d, m.width), along);
  });
  const bool unit = row.scale < 1e12f;  // shorter rows are divided by a constant
  const Vec projection = splat(unit ? total(along) : 0), scale = splat(row.scale);
  for_vectors(m.width, [&](int64_t d, auto whole) {
    const Vec u = row.template at<whole.value>(d, m.width), v = load_some<whole.value>(g, d, m.width);
    store_some<whole.value>(g, d, m.width, (v - u * projection) * scale);
  });
}

// g times a pair's factor; a triplet that adds nothing stays out of it, whatever g is.
inline float pair_weight(const ChosenGradients& out, const float* factor, int64_t t) { return factor[t] == 0 ? 0 : out.g[t] * factor[t]; }

// Adds to rows begin .. end of `to`, the gradient in the references, what they get as positives and negatives: shown(row) for each.
template <class X, class Y, class Shown>
inline void add_references(const ChosenRows<X, Y>& rows, const ChosenGradients& out, int64_t begin, int64_t end, float* to, const Shown& shown) {
  const ChosenParams& p = rows.p;
  const auto add = [&](float factor, int64_t u, const auto& v) {
    if (factor == 0 || u < begin || u >= end) return;
    shown(u);
    add_pair(p, factor, rows.y_row(u), v, to + u * p.width);
  };
  for (int64_t t = 0; t < p.rows * p.each; ++t) {
    const int64_t positive = p.positive[t], negative = p.negative[t];
    if (t + kAhead < p.rows * p.each && p.negative[t + kAhead] >= 0) {
      const int64_t next = p.negative[t + kAhead];
      prefetch_row(rows.y + next * p.width, p.width);
      if (next >= begin && next < end) prefetch_row(to + next * p.width, p.width);
    }
    if (positive < 0 || negative < 0) continue;
    const ScaledRow<X> anchor = rows.x_row(t / p.each);
    add(pair_weight(out, out.a_p, t), positive, anchor);
    add(pair_weight(out, out.a_n, t), negative, anchor);
    if (!p.swap) continue;
    const float p_n = pair_weight(out, out.p_n, t);
    add(p_n, positive, rows.y_row(negative));
    add(p_n, negative, rows.y_row(positive));
  }
}

// Chosen triplets `begin` .. `end`: losses and factors.
template <class X, class Y>
inline void chosen_losses(const ChosenRows<X, Y>& rows, const ChosenLosses& out, int64_t begin, int64_t end) {
  const ChosenParams& p = rows.p;
  for (int64_t t = begin; t < end; ++t) {
    out.loss[t] = out.a_p[t] = out.a_n[t] = 0;
    if (p.swap) out.p_n[t] = 0;
    if (t + kAhead < end && p.negative[t + kAhead] >= 0) prefetch_row(rows.y + p.negative[t + kAhead] * p.width, p.width);
    if (p.positive[t] < 0 || p.negative[t] < 0) continue;
    const ScaledRow<X> anchor = rows.x_row(t / p.each);
    const ScaledRow<Y> positive = rows.y_row(p.positive[t]), negative = rows.y_row(p.negative[t]);
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

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Rows begin .. end.
void row_scales(const MetricRows& m, int64_t begin, int64_t end, float* scale) {
  for (int64_t i = begin; i < end; ++i) scale[i] = row_scale(m, i);
}

// Triplets of the anchors begin .. end.
void triplet_chosen(const ChosenParams& p, const ChosenLosses& out, int64_t begin, int64_t end) {
  with_rows(p, [&](const auto& rows) { chosen_losses(rows, out, begin * p.each, end * p.each); });
}

// Rows begin .. end of dx.
void triplet_chosen_grad_x(const ChosenParams& p, const ChosenGradients& out, int64_t begin, int64_t end) {
  with_rows(p, [&](const auto& rows) {
    for (int64_t i = begin; i < end; ++i) {
      float* const to = out.dx + i * p.width;
      __builtin_memset(to, 0, size_t(p.width) * 4);
      auto pairs = added_pairs(rows, i, to);
      for (int64_t t = i * p.each; t < (i + 1) * p.each; ++t) {
        if (p.positive[t] < 0 || p.negative[t] < 0) continue;
        pairs.add(pair_weight(out, out.a_p, t), rows.y_row(p.positive[t]));
        pairs.add(pair_weight(out, out.a_n, t), rows.y_row(p.negative[t]));
      }
      pairs.finish();
    }
    if (p.in_batch) add_references(rows, out, begin, end, out.dx, [](int64_t) {});
    for (int64_t i = begin; i < end; ++i) through_length(p.x, rows.x_row(i), out.dx + i * p.width);
  });
}

// Rows begin .. end of dy. `touched` [columns]: scratch.
void triplet_chosen_grad_y(const ChosenParams& p, const ChosenGradients& out, int64_t begin, int64_t end, bool* touched) {
  __builtin_memset(out.dy + begin * p.width, 0, size_t((end - begin) * p.width) * 4);
  __builtin_memset(touched + begin, 0, size_t(end - begin));
  with_rows(p, [&](const auto& rows) {
    add_references(rows, out, begin, end, out.dy, [&](int64_t row) { touched[row] = true; });
    for (int64_t j = begin; j < end; ++j)
      if (touched[j]) through_length(p.y, rows.y_row(j), out.dy + j * p.width);
  });
}

}  // namespace
