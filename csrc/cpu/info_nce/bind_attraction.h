// Rows of InfoNCE that the keys of their class attract. Included by bind_info_nce.cpp.
//
// With c_i keys of row i's class, S_i the sum of their logits, J more positives of logits z+_ij, n_i = c_i + J, and L_i the log-sum-exp of all
// that is in the denominator, loss_i = L_i - (S_i + sum_j z+_ij) / n_i. The keys there give lse_i, so that with the positives among the others
//   dloss_i / dlse_i = t_i = e^(lse_i - L_i),   dloss_i / dz+_ij = e^(z+_ij - L_i) - 1 / n_i,
// and of the logit of a key of the class e_i = 1 / n_i is taken off. A row without a positive, or with nothing in the denominator, has loss 0.
#pragma once

#include <cmath>
#include <deque>

#include "info_nce/bind_class_sums.h"

namespace {

struct Attraction {
  const InfoNceParams& call;
  std::deque<KeySums> classes;  // of each batch entry

  Attraction(const InfoNceParams& call, const SimilarityParams& bank) : call(call) {
    for (int64_t b = 0; b < call.batch && call.rows > 0; ++b) classes.emplace_back(call, bank, b, Keys::kOfItsClass);
  }

  // Losses and slopes, and t and e of every row.
  void find(const InfoNceRows& r, float* of_lse, float* spread) const {
    const int64_t rows = call.rows, positives = call.positives;
    for (int64_t b = 0; b < int64_t(classes.size()); ++b) {
      const std::vector<float> logits = logits_of_positives(b);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = b * rows + i;
        const float *const z = logits.data() + i * positives;
        const double lse = double(r.lse[row]) + double(r.lse_low[row]);
        const double level = r.include_positive ? level_with(lse, z) : lse, n = classes[b].counts[i] + double(positives);
        const bool counts = n > 0 && level != -std::numeric_limits<double>::infinity();
        double sum = classes[b].logits[i];
        for (int64_t j = 0; j < positives; ++j) sum += double(z[j]);
        const bool alone = r.include_positive && positives == 0 && classes[b].only(i);  // both are one logit, whose two products round apart
        r.losses[row] = counts ? float(level - (alone ? level : sum / n)) : 0;
        spread[row] = counts ? float(1 / n) : 0;
        of_lse[row] = !counts ? 0 : positives > 0 && r.include_positive ? float(std::exp(lse - level)) : 1;
        for (int64_t j = 0; j < positives; ++j)
          r.slopes[row * positives + j] = !counts ? 0 : float(1 / n - (r.include_positive ? std::exp(double(z[j]) - level) : 0));
      }
    }
  }

  // Times a factor for each row; none: 1.
  void scale(const InfoNceRows& r, const std::vector<float>& factors, float* of_lse, float* spread) const {
    for (int64_t i = 0; i < int64_t(factors.size()); ++i) {
      r.losses[i] *= factors[i], spread[i] *= factors[i], of_lse[i] *= factors[i];
      for (int64_t j = 0; j < call.positives; ++j) r.slopes[i * call.positives + j] *= factors[i];
    }
  }

  // From sum_j p_ij k_j to what pulls the query.
  void pull_rows(const InfoNceRows& r, const float* of_lse, const float* spread) const {
    const int64_t width = call.width;
    for_rows(call, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float t = of_lse[i];
        float* const to = r.pull + i * width;
        if (t == 0) std::fill_n(to, width, 0.0f);  // whatever the row holds
        if (t != 0 && t != 1) std::transform(to, to + width, to, [t](float x) { return t * x; });
      }
    });
    pull(call, r.slopes, r.pull);
    for (int64_t b = 0; b < int64_t(classes.size()); ++b) classes[b].pull_by(spread + b * call.rows, r.pull + b * call.rows * width);
  }

 private:
  // [rows, positives] of a batch entry.
  std::vector<float> logits_of_positives(int64_t b) const {
    const InfoNceParams p = entry(call, b);
    std::vector<float> found(p.rows * p.positives), minus, weights;
    std::vector<int64_t> columns(p.rows);
    for (int64_t j = 0; j < p.positives; ++j) {
      for (int64_t i = 0; i < p.rows; ++i) columns[i] = i * p.positives + j;
      weighted_logits(with_positives(p, p.candidates, p.count, columns, nullptr), minus, weights);
      for (int64_t i = 0; i < p.rows; ++i) found[i * p.positives + j] = -minus[i];
    }
    return found;
  }

  // The log-sum-exp of lse and a row's positives.
  double level_with(double lse, const float* z) const {
    if (call.positives == 0) return lse;
    double top = lse, sum = 0;
    for (int64_t j = 0; j < call.positives; ++j) top = double(z[j]) > top ? double(z[j]) : top;
    if (std::isinf(top)) return top;
    for (int64_t j = 0; j < call.positives; ++j) sum += std::exp(double(z[j]) - top);
    return top + std::log(sum + std::exp(lse - top));
  }
};

}  // namespace
