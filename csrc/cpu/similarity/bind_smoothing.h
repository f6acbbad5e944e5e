// What label smoothing adds to the rows of InfoNCE. Included by bind_info_nce.cpp.
//
// With z+_ij the logits of row i's positives, w_ij their weights, W_i = sum_j w_ij, c_i the number of keys that row i admits, K_i their
// sum and S_i = s_i q_i.K_i + (the sum of their biases) that of their logits, a share `a` of the target adds
//   a sum_j w_ij (z+_ij - (z+_ij + S_i) / (1 + c_i)) = a (c_i sum_j w_ij z+_ij - W_i S_i) / (1 + c_i)
// to the loss, a w_ij c_i / (1 + c_i) to the gradient of a positive's logit, and takes e_i = a W_i / (1 + c_i) off that of each admitted one.
//
// So no score is formed: keys, and for their gradient rows times e_i, are added up once for each class. All of it is sums of rows by index
// and inner products with these, which is what the kernels of the positives do.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "similarity/bind_similarity.h"

namespace {

using kdfast::InfoNceGradients;
using kdfast::InfoNceParams;
using kdfast::InfoNceRows;

// f(begin, end) over the rows; how they are cut changes no bit of the result.
template <class F>
void for_rows(const InfoNceParams& p, const F& f) {
  const int64_t rows = p.batch * p.rows;
  const double work = double(rows) * double(p.positives + 1) * double(p.width) * 2;
  const int64_t workers = std::clamp<int64_t>(int64_t(work / kMinWork), 1, torch::stable::get_num_threads());
  for_each_task(workers, workers, [&](int64_t, int64_t t) { f(t * rows / workers, (t + 1) * rows / workers); });
}

// ---- which keys a row admits ------------------------------------------------------------------------------------------

// Of one batch entry. Rows and keys lie in bags, one for each class of the rows and one, the last, for what has none of these; a row admits
// the keys of all bags but its own, of the last bag always.
struct Admission {
  int64_t bags = 1;
  std::vector<int64_t> row_bag, key_bag;  // a key that no row admits: -1
  std::vector<int64_t> skip;              // [rows, key_indices]: keys that a row's bag admits and its indices do not, each once; -1 none

  Admission(const SimilarityParams& p, int64_t batch) : row_bag(p.rows, 0), key_bag(p.columns, -1) {
    const int64_t valid = valid_columns(p, batch);
    const float* const bias = p.bias != nullptr ? p.bias + batch * p.bias_batch_stride : nullptr;
    const auto admitted = [&](int64_t j) { return j < valid && (bias == nullptr || bias[j] != -std::numeric_limits<float>::infinity()); };
    if (p.query_labels == nullptr) {
      for (int64_t j = 0; j < p.columns; ++j) key_bag[j] = admitted(j) ? 0 : -1;
    } else {
      const int64_t *const of_rows = p.query_labels + batch * p.rows, *const of_keys = p.key_labels + batch * p.key_labels_batch_stride;
      std::vector<int64_t> classes(of_rows, of_rows + p.rows);
      std::sort(classes.begin(), classes.end());
      classes.erase(std::unique(classes.begin(), classes.end()), classes.end());
      bags = int64_t(classes.size()) + 1;
      const auto bag = [&](int64_t label) {
        const auto place = std::lower_bound(classes.begin(), classes.end(), label);
        return place != classes.end() && *place == label ? place - classes.begin() : bags - 1;
      };
      std::transform(of_rows, of_rows + p.rows, row_bag.begin(), bag);
      for (int64_t j = 0; j < p.columns; ++j) key_bag[j] = admitted(j) ? bag(of_keys[j]) : -1;
    }
    if (p.key_indices == 0) return;
    const int64_t* const index = p.key_index + batch * p.rows * p.key_indices;
    skip.assign(index, index + p.rows * p.key_indices);
    for (int64_t i = 0; i < p.rows; ++i) {
      int64_t* const of_row = skip.data() + i * p.key_indices;
      for (int64_t e = 0; e < p.key_indices; ++e) {
        const int64_t j = of_row[e];
        const bool there = j >= 0 && j < p.columns && key_bag[j] >= 0 && admits(row_bag[i], key_bag[j]);
        if (!there || std::find(of_row, of_row + e, j) != of_row + e) of_row[e] = -1;
      }
    }
  }

  bool admits(int64_t of_row, int64_t of_key) const { return of_row != of_key || of_key == bags - 1; }
};

// Of numbers in bags: for each bag their sum over those that it admits.
template <class F>
std::vector<double> admitted_sums(int64_t bags, const std::vector<int64_t>& bag_of, const F& number) {
  std::vector<double> sums(bags, 0.0);
  for (int64_t i = 0; i < int64_t(bag_of.size()); ++i)
    if (bag_of[i] >= 0) sums[bag_of[i]] += number(i);
  double all = 0;
  for (const double sum : sums) all += sum;
  for (double& sum : sums) sum = all - sum;
  sums.back() = all;
  return sums;
}

constexpr int64_t kChunk = 256;  // rows that are added up in floats; sums of these are doubles

// The same of the rows of x, each times its weight (null: 1): [bags, width]. A bag's rows are added up by themselves, so that sums over the
// others keep nothing of them.
std::vector<float> admitted_rows(int64_t bags, const std::vector<int64_t>& bag_of, kdfast::Matrix x, int64_t width, const float* weights) {
  const int64_t count = int64_t(bag_of.size()), length = std::clamp<int64_t>(count / bags, 1, kChunk);
  std::vector<int64_t> sizes(bags, 0), place(bags), bag_of_chunk;
  for (const int64_t bag : bag_of)
    if (bag >= 0) ++sizes[bag];
  for (int64_t bag = 0; bag < bags; ++bag) {
    place[bag] = int64_t(bag_of_chunk.size()) * length;  // where its next row goes
    bag_of_chunk.resize(bag_of_chunk.size() + (sizes[bag] + length - 1) / length, bag);
  }
  const int64_t chunks = int64_t(bag_of_chunk.size());
  std::vector<int64_t> columns(chunks * length, -1);
  std::vector<float> slopes(chunks * length, -1.0f), sums(chunks * width, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    if (bag_of[i] < 0) continue;
    const int64_t at = place[bag_of[i]]++;
    columns[at] = i;
    if (weights != nullptr) slopes[at] = -weights[i];
  }
  InfoNceParams p{};
  p.batch = 1, p.rows = chunks, p.positives = length, p.count = count, p.width = width;
  p.candidates = x, p.columns = columns.data();
  for_rows(p, [&](int64_t begin, int64_t end) {
    kdfast::cpu_kernels().info_nce_pull(p, {begin, end, false, nullptr, nullptr, nullptr, slopes.data(), sums.data()});
  });

  std::vector<double> of_bags(bags * width, 0.0), all(width, 0.0);
  std::vector<float> found(bags * width);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t d = 0; d < width; ++d) of_bags[bag_of_chunk[c] * width + d] += double(sums[c * width + d]);
  for (int64_t bag = 0; bag < bags; ++bag)
    for (int64_t d = 0; d < width; ++d) all[d] += of_bags[bag * width + d];
  for (int64_t bag = 0; bag < bags; ++bag)
    for (int64_t d = 0; d < width; ++d) found[bag * width + d] = float(bag == bags - 1 ? all[d] : all[d] - of_bags[bag * width + d]);
  return found;
}

// ---- problems whose positives are something else ---------------------------------------------------------------------

// One batch entry.
InfoNceParams entry(InfoNceParams p, int64_t batch) {
  const int64_t row = batch * p.rows;
  p.query = p.query.from(row * p.width), p.candidates = p.candidates.from(batch * p.candidates_batch_stride);
  p.scale += row;
  if (p.columns != nullptr) p.columns += row * p.positives;
  if (p.weights != nullptr) p.weights += row * p.positives;
  if (p.bias != nullptr) p.bias += batch * p.bias_batch_stride;
  p.batch = 1;
  return p;
}

// With rows of `candidates`, named by `columns` [rows, positives], in place of the positives.
InfoNceParams with_positives(InfoNceParams p, kdfast::Matrix candidates, int64_t count, const std::vector<int64_t>& columns,
                             const float* bias) {
  p.candidates = candidates, p.count = count, p.positives = int64_t(columns.size()) / p.rows;
  p.columns = columns.data(), p.bias = bias, p.weights = nullptr;
  return p;
}

inline kdfast::Matrix matrix_of(const std::vector<float>& x) { return {x.data(), kdfast::ElementType::kFloat32}; }

// Minus the sums of the positives' logits by their weights, and these weights.
void weighted_logits(const InfoNceParams& p, std::vector<float>& sums, std::vector<float>& weights) {
  const std::vector<float> zero(p.rows, 0.0f);
  sums.resize(p.rows), weights.resize(p.rows * p.positives);
  for_rows(p, [&](int64_t begin, int64_t end) {
    kdfast::cpu_kernels().info_nce_rows(p, {begin, end, false, zero.data(), zero.data(), sums.data(), weights.data(), nullptr});
  });
}

// Takes the positives times their slopes off pull.
void pull(const InfoNceParams& p, std::vector<float>& slopes, float* to) {
  for_rows(p, [&](int64_t begin, int64_t end) {
    kdfast::cpu_kernels().info_nce_pull(p, {begin, end, false, nullptr, nullptr, nullptr, slopes.data(), to});
  });
}

// ---- the rows, and what they give to the bank -------------------------------------------------------------------------

// Brings losses, slopes and pull of info_nce_rows to those of the smoothed loss. Leaves dloss / dlse and e of every row.
void smooth_rows(const InfoNceParams& call, const SimilarityParams& bank, double smoothing, const InfoNceRows& found, float* of_lse,
                 float* spread) {
  const int64_t rows = call.rows, positives = call.positives, indices = bank.key_indices;
  if (rows == 0) return;
  for (int64_t b = 0; b < call.batch; ++b) {
    const InfoNceParams p = entry(call, b);
    const kdfast::Matrix keys = bank.keys.from(b * bank.keys_batch_stride);
    const float* const bias = bank.bias != nullptr ? bank.bias + b * bank.bias_batch_stride : nullptr;
    const Admission in(bank, b);
    const std::vector<float> sums = admitted_rows(in.bags, in.key_bag, keys, p.width, nullptr);
    const std::vector<double> counts = admitted_sums(in.bags, in.key_bag, [](int64_t) { return 1.0; });
    const std::vector<double> biases = admitted_sums(in.bags, in.key_bag, [&](int64_t j) { return bias != nullptr ? bias[j] : 0.0f; });

    const InfoNceParams admitted = with_positives(p, matrix_of(sums), in.bags, in.row_bag, nullptr);
    const std::vector<float> ones(rows * indices, 1.0f);
    InfoNceParams skipped = with_positives(p, keys, bank.columns, in.skip, bias);
    skipped.weights = ones.data();
    std::vector<float> logits, weights, scores, of_sums, left_out(rows, 0.0f), of_skipped;
    weighted_logits(p, logits, weights);
    weighted_logits(admitted, scores, of_sums);
    if (indices > 0) weighted_logits(skipped, left_out, of_skipped);

    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = b * rows + i;
      const int64_t bag = in.row_bag[i];
      double count = counts[bag], weight = 0, slope = 0;
      for (int64_t e = 0; e < indices; ++e) count -= in.skip[i * indices + e] >= 0;
      for (int64_t j = 0; j < positives; ++j) weight += weights[i * positives + j], slope += found.slopes[row * positives + j];
      const double score = biases[bag] - double(scores[i]) + double(left_out[i]);
      const double share = smoothing / (1 + count);
      const double spread_score = weight != 0 ? weight * score : 0;  // whatever the score of a row without a positive
      found.losses[row] += float(-share * (count * double(logits[i]) + spread_score));
      of_lse[row] = float(slope), spread[row] = of_sums[i] = float(share * weight);
      for (int64_t j = 0; j < positives; ++j) {
        float& extra = weights[i * positives + j];
        extra = float(-share * count * double(extra));
        found.slopes[row * positives + j] += extra;
      }
      for (int64_t e = 0; e < indices; ++e) of_skipped[i * indices + e] = -spread[row];
    }
    if (found.pull == nullptr) continue;
    float* const to = found.pull + b * rows * p.width;
    pull(p, weights, to);
    pull(admitted, of_sums, to);
    if (indices > 0) pull(skipped, of_skipped, to);
  }
}

// Takes off the gradients of keys and bias, [batch, columns, ...] or null, what the spreads e of rows with upstream gradients d.g come to.
void smooth_bank(const InfoNceParams& call, const SimilarityParams& bank, const InfoNceGradients& d, const float* spread, float* dkeys,
                 float* dbias) {
  const int64_t rows = call.rows, indices = bank.key_indices;
  if (rows == 0) return;
  for (int64_t b = 0; b < call.batch; ++b) {
    InfoNceParams p = call;
    p.columns = nullptr, p.weights = nullptr, p.bias = nullptr;
    p = entry(p, b);
    const Admission in(bank, b);
    float* const of_keys = dkeys == nullptr ? nullptr : dkeys + b * bank.columns * p.width;
    float* const of_bias = dbias == nullptr ? nullptr : dbias + b * bank.columns;
    const auto upstream = [&](int64_t i) { return d.factor * d.g[(b * rows + i) * d.g_stride] * spread[b * rows + i]; };
    if (of_keys != nullptr) {
      std::vector<float> weights(rows);
      for (int64_t i = 0; i < rows; ++i) weights[i] = upstream(i) * p.scale[i];
      const std::vector<float> sums = admitted_rows(in.bags, in.row_bag, p.query, p.width, weights.data());
      InfoNceParams keys = p;
      keys.rows = bank.columns;
      std::vector<float> ones(bank.columns, 1.0f);
      pull(with_positives(keys, matrix_of(sums), in.bags, in.key_bag, nullptr), ones, of_keys);
    }
    if (of_bias != nullptr) {
      const std::vector<double> sums = admitted_sums(in.bags, in.row_bag, upstream);
      for (int64_t j = 0; j < bank.columns; ++j)
        if (in.key_bag[j] >= 0) of_bias[j] -= float(sums[in.key_bag[j]]);
    }
    if (indices == 0) continue;
    std::vector<float> slopes(rows * indices);
    for (int64_t at = 0; at < rows * indices; ++at) slopes[at] = -spread[b * rows + at / indices];
    InfoNceGradients skipped{};
    skipped.g = d.g + b * rows * d.g_stride, skipped.g_stride = d.g_stride, skipped.factor = d.factor;
    skipped.slopes = slopes.data(), skipped.dcandidates = of_keys, skipped.dbias = of_bias;
    kdfast::cpu_kernels().info_nce_grad_candidates(with_positives(p, {}, bank.columns, in.skip, nullptr), skipped);
  }
}

}  // namespace
