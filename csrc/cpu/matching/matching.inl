// Losses in which every row has one match among the columns (CLIP, NT-Xent), once the log-sum-exps over the other pairs are known.
//
// With z_i = s x_i.y_i, y_i the row's match, loss_i is the mean over sides of log(1 + e^(lse_i - z_i)), slope_i that side's derivative in lse_i.
// With the sums over the other pairs (symmetric.inl) and pull_i = g_i times the sum of the slopes,
//   dx_i = s (sum_j W_ij y_j - pull_i y_i),   dy_i = sum_j W_ji s x_j - pull_i s x_i,
//   ds = sum_i (sum_j W_ij x_i.y_j - pull_i x_i.y_i) = sum_i (sum_j W_ij (x_i.y_j - l) - pull_i (x_i.y_i - l)),
// whatever the level l: the W add up to what the pull_i do. Without the match in the denominator the loss is the mean of lse_i - z_i, the slope 1.
//
// Of label smoothing a share `a` of each side's target is spread over its N candidates, which adds a s (x_i.y_i - r x_i.Y - c y_i.X) to loss_i: Y and X
// are the mean rows, r and c the shares of the rows' and of the columns' side. So no score is formed; g_i a is taken off pull_i and, with
// e_i = g_i a, v_i = e_i r Y + c mean_k e_k y_k off the sum of dx_i, x_i.v_i - e_i l off ds, s (e_i c X + r mean_k e_k x_k) off dy_i.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "info_nce/info_nce.inl"
#include "matching/matching.h"

namespace {

using kdfast::Matching;
using kdfast::MatchingGradients;
using kdfast::MatchingLosses;

template <class T>
void matching_losses_of(const Matching& m, const MatchingLosses& out, const T* x) {
  const T* const y = static_cast<const T*>(m.y.data);
  const Vec share = splat(1 / float(out.sides));
  for (int64_t row = 0; row < m.rows; row += kLanes) {
    const int64_t count = smaller(kLanes, m.rows - row);
    alignas(64) float gaps[2][kLanes] = {}, more[kLanes] = {};
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = row + k;
      const double match = double(m.scale) * double(inner_product(x + i * m.width, y + m.partner(i) * m.width, m.width));
      for (int64_t side = 0; side < out.sides; ++side) gaps[side][k] = gap(out.lse[side][i], out.low[side][i], match);
      if (m.smoothing != 0) {
        const float all = inner_product(x + i * m.width, m.y_mean, m.width) + inner_product(y + i * m.width, m.x_mean, m.width);
        more[k] = float(double(m.smoothing) * (match - double(m.scale) * double(all)));
      }
    }
    Vec losses = load(more);
    for (int64_t side = 0; side < out.sides; ++side) {
      Vec slopes = splat(1.0f);
      losses += share * (out.include ? softplus_of(load(gaps[side]), &slopes) : load(gaps[side]));
      store_some(out.slopes[side] + row, share * slopes, count);
    }
    store_some(out.losses + row, losses, count);
  }
}

template <class G, class T>
void matching_gradients_in(const Matching& m, const MatchingGradients& out, int64_t begin, int64_t end, const T* x) {
  const T* const y = static_cast<const T*>(m.y.data);
  const Vec scale = splat(m.scale);
  for (int64_t i = begin; i < end; ++i) {
    const T *const xi = x + i * m.width, *const yi = y + m.partner(i) * m.width;
    const int64_t at = i * m.width;
    const Vec pull = splat(out.pull[i]);
    for (int64_t d = 0; d < m.width; d += kLanes) {
      const Vec x_d = load_row(xi, d, m.width);
      if (out.dx != nullptr) {
        Vec sum = load_row(out.x_sums + at, d, m.width) - pull * load_row(yi, d, m.width);
        if (out.spread != nullptr) sum -= splat(out.spread[i]) * load_row(m.y_mean, d, m.width) + load_row(out.y_common, d, m.width);
        store_row(static_cast<G*>(out.dx) + at, d, m.width, scale * sum);
      }
      if (out.dy != nullptr) {
        Vec sum = load_row(out.y_sums + at, d, m.width) - pull * scale * x_d;
        if (out.spread != nullptr) sum -= scale * (splat(out.spread[i]) * load_row(m.x_mean, d, m.width) + load_row(out.x_common, d, m.width));
        store_row(static_cast<G*>(out.dy) + at, d, m.width, sum);
      }
    }
    if (out.dscale == nullptr) continue;
    out.dscale[i] = out.scores[i] - out.pull[i] * (inner_product(xi, yi, m.width) - out.level);
    if (out.spread == nullptr) continue;
    const float of_means = out.spread[i] * inner_product(xi, m.y_mean, m.width) + inner_product(xi, out.y_common, m.width);
    out.dscale[i] -= of_means - out.spread[i] * out.level;
  }
}

template <class T>
void matching_gradients_of(const Matching& m, const MatchingGradients& out, int64_t begin, int64_t end, const T* x) {
  out.floats ? matching_gradients_in<float>(m, out, begin, end, x) : matching_gradients_in<T>(m, out, begin, end, x);
}

// ---- the entries of the dispatch table ------------------------------------------------------------------------------

void matching_losses(const Matching& m, const MatchingLosses& out) {
  with_elements(m.x, [&](const auto* x) { matching_losses_of(m, out, x); });
}

// Rows begin .. end.
void matching_gradients(const Matching& m, const MatchingGradients& out, int64_t begin, int64_t end) {
  with_elements(m.x, [&](const auto* x) { matching_gradients_of(m, out, begin, end, x); });
}

}  // namespace
