// What label smoothing adds to the rows of InfoNCE. Included by bind_info_nce.cpp.
//
// With z+_ij the logits of row i's positives, w_ij their weights, W_i = sum_j w_ij, c_i the number of keys that row i admits and S_i the sum of
// their logits, a share `a` of the target adds
//   a sum_j w_ij (z+_ij - (z+_ij + S_i) / (1 + c_i)) = a (c_i sum_j w_ij z+_ij - W_i S_i) / (1 + c_i)
// to the loss, a w_ij c_i / (1 + c_i) to the gradient of a positive's logit, and takes e_i = a W_i / (1 + c_i) off that of each admitted one.
#pragma once

#include "info_nce/bind_class_sums.h"

namespace {

// Brings losses, slopes and pull of info_nce_rows to those of the smoothed loss. Leaves dloss / dlse and e of every row.
inline void smooth_rows(const InfoNceParams& call, const SimilarityParams& bank, double smoothing, const InfoNceRows& found, float* of_lse,
                        float* spread) {
  const int64_t rows = call.rows, positives = call.positives;
  if (rows == 0) return;
  for (int64_t b = 0; b < call.batch; ++b) {
    const InfoNceParams p = entry(call, b);
    const KeySums keys(call, bank, b, Keys::kOfOthers);
    std::vector<float> logits, weights;
    weighted_logits(p, logits, weights);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = b * rows + i;
      double weight = 0, slope = 0;
      for (int64_t j = 0; j < positives; ++j) weight += weights[i * positives + j], slope += found.slopes[row * positives + j];
      const double count = keys.counts[i], share = smoothing / (1 + count);
      const double spread_score = weight != 0 ? weight * keys.logits[i] : 0;  // whatever the score of a row without a positive
      found.losses[row] += float(-share * (count * double(logits[i]) + spread_score));
      of_lse[row] = float(slope), spread[row] = float(share * weight);
      for (int64_t j = 0; j < positives; ++j) {
        float& extra = weights[i * positives + j];
        extra = float(-share * count * double(extra));
        found.slopes[row * positives + j] += extra;
      }
    }
    if (found.pull == nullptr) continue;
    float* const to = found.pull + b * rows * p.width;
    pull(p, weights.data(), to);
    keys.pull_by(spread + b * rows, to);
  }
}

}  // namespace
