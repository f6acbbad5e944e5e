// Sums over keys that a row of InfoNCE names by their class, all but its own or its own alone, and no score formed: with K_i the sum of row
// i's keys, that of their logits is s_i q_i.K_i + (the sum of their biases). A number e_i for each of these logits' slopes takes e_i K_i off
// what pulls the query.
//
// So keys, and for their gradient rows times e_i, are added up once for each class. All of it is sums of rows by index and inner products with
// these, which is what the kernels of the positives do.
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

// ---- sums ---------------------------------------------------------------------------------------------------------------

constexpr int64_t kChunk = 256;  // rows that are added up in floats; sums of these are doubles

// Sums of the rows of x, each times its weight (null: 1), by their bag, of which there are `bags` (any other: left out): [bags, width].
inline std::vector<double> sums_by_bag(int64_t bags, const std::vector<int64_t>& bag_of, kdfast::Matrix x, int64_t width, const float* weights) {
  const int64_t count = int64_t(bag_of.size()), length = std::clamp<int64_t>(count / std::max<int64_t>(bags, 1), 1, kChunk);
  const auto somewhere = [&](int64_t bag) { return bag >= 0 && bag < bags; };
  std::vector<int64_t> sizes(bags, 0), place(bags), bag_of_chunk;
  for (const int64_t bag : bag_of)
    if (somewhere(bag)) ++sizes[bag];
  for (int64_t bag = 0; bag < bags; ++bag) {
    place[bag] = int64_t(bag_of_chunk.size()) * length;  // where its next row goes
    bag_of_chunk.resize(bag_of_chunk.size() + (sizes[bag] + length - 1) / length, bag);
  }
  const int64_t chunks = int64_t(bag_of_chunk.size());
  std::vector<int64_t> columns(chunks * length, -1);
  std::vector<float> slopes(chunks * length, -1.0f), sums(chunks * width, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    if (!somewhere(bag_of[i])) continue;
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
  std::vector<double> of_bags(bags * width, 0.0);
  for (int64_t c = 0; c < chunks; ++c)
    for (int64_t d = 0; d < width; ++d) of_bags[bag_of_chunk[c] * width + d] += double(sums[c * width + d]);
  return of_bags;
}

// ---- which keys are a row's -------------------------------------------------------------------------------------------

enum class Keys { kOfOthers, kOfItsClass };  // those of any class but the row's, or of none; those of the row's

// Of one batch entry. Rows and keys lie in bags, one for each class of the rows and one, the last, for what has none of these.
struct Bags {
  Keys whose;
  int64_t bags = 1;
  std::vector<int64_t> row_bag, key_bag;  // a key that is no row's: -1
  std::vector<int64_t> skip;              // [rows, key_indices]: keys that a row's bag gives it and its indices take away, each once; -1 none
  std::vector<int64_t> present;           // [rows]: keys of any bag that are there and its indices do not take away

  Bags(const SimilarityParams& p, int64_t batch, Keys whose) : whose(whose), row_bag(p.rows, 0), key_bag(p.columns, -1) {
    const int64_t valid = valid_columns(p, batch);
    const float* const bias = p.bias != nullptr ? p.bias + batch * p.bias_batch_stride : nullptr;
    const auto there = [&](int64_t j) { return j < valid && (bias == nullptr || bias[j] != -std::numeric_limits<float>::infinity()); };
    if (p.query_labels == nullptr) {
      for (int64_t j = 0; j < p.columns; ++j) key_bag[j] = there(j) ? 0 : -1;
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
      for (int64_t j = 0; j < p.columns; ++j) key_bag[j] = there(j) ? bag(of_keys[j]) : -1;
    }
    present.assign(p.rows, std::count_if(key_bag.begin(), key_bag.end(), [](int64_t bag) { return bag >= 0; }));
    if (p.key_indices == 0) return;
    const int64_t* index = p.key_index + batch * p.rows * p.key_indices;
    skip.assign(index, index + p.rows * p.key_indices);
    for (int64_t i = 0; i < p.rows; ++i, index += p.key_indices) {
      for (int64_t e = 0; e < p.key_indices; ++e) {
        const int64_t j = index[e];
        const bool taken = j >= 0 && j < p.columns && key_bag[j] >= 0 && std::find(index, index + e, j) == index + e;
        present[i] -= taken;
        if (!taken || !gives(row_bag[i], key_bag[j])) skip[i * p.key_indices + e] = -1;
      }
    }
  }

  bool gives(int64_t of_row, int64_t of_key) const {
    return of_key == bags - 1 ? whose == Keys::kOfOthers : (of_row == of_key) == (whose == Keys::kOfItsClass);
  }

  // From sums over the bags those over what the bags give: [bags, width].
  std::vector<float> given(const std::vector<double>& of_bags, int64_t width) const {
    std::vector<double> all(width, 0.0);
    for (int64_t bag = 0; bag < bags; ++bag)
      for (int64_t d = 0; d < width; ++d) all[d] += of_bags[bag * width + d];
    std::vector<float> found(bags * width);
    for (int64_t bag = 0; bag < bags; ++bag) {
      const bool last = bag == bags - 1;
      for (int64_t d = 0; d < width; ++d) {
        const double own = last ? 0 : of_bags[bag * width + d];
        found[bag * width + d] = float(whose == Keys::kOfItsClass ? own : all[d] - own);
      }
    }
    return found;
  }

  // Of a number each, in bags bag_of, those sums.
  template <class F>
  std::vector<float> sums(const std::vector<int64_t>& bag_of, const F& number) const {
    std::vector<double> of_bags(bags, 0.0);
    for (int64_t i = 0; i < int64_t(bag_of.size()); ++i)
      if (bag_of[i] >= 0) of_bags[bag_of[i]] += double(number(i));
    return given(of_bags, 1);
  }

  // The same of the rows of x, each times its weight (null: 1): [bags, width]. A bag's rows are added up by themselves, so that sums over the
  // others keep nothing of them.
  std::vector<float> row_sums(const std::vector<int64_t>& bag_of, kdfast::Matrix x, int64_t width, const float* weights) const {
    std::vector<double> of_bags = sums_by_bag(whose == Keys::kOfItsClass ? bags - 1 : bags, bag_of, x, width, weights);  // the last is nobody's
    of_bags.resize(bags * width, 0.0);
    return given(of_bags, width);
  }
};

// ---- problems whose positives are something else ---------------------------------------------------------------------

// One batch entry.
inline InfoNceParams entry(InfoNceParams p, int64_t batch) {
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
inline InfoNceParams with_positives(InfoNceParams p, kdfast::Matrix candidates, int64_t count, const std::vector<int64_t>& columns,
                                    const float* bias) {
  p.candidates = candidates, p.count = count, p.positives = int64_t(columns.size()) / p.rows;
  p.columns = columns.data(), p.bias = bias, p.weights = nullptr;
  return p;
}

inline kdfast::Matrix matrix_of(const std::vector<float>& x) { return {x.data(), kdfast::ElementType::kFloat32}; }

// Minus the sums of the positives' logits by their weights, and these weights.
inline void weighted_logits(const InfoNceParams& p, std::vector<float>& sums, std::vector<float>& weights) {
  const std::vector<float> zero(p.rows, 0.0f);
  sums.resize(p.rows), weights.resize(p.rows * p.positives);
  for_rows(p, [&](int64_t begin, int64_t end) {
    kdfast::cpu_kernels().info_nce_rows(p, {begin, end, false, zero.data(), zero.data(), sums.data(), weights.data(), nullptr});
  });
}

// Takes the positives times their slopes off `to`.
inline void pull(const InfoNceParams& p, const float* slopes, float* to) {
  for_rows(p, [&](int64_t begin, int64_t end) {
    kdfast::cpu_kernels().info_nce_pull(p, {begin, end, false, nullptr, nullptr, nullptr, const_cast<float*>(slopes), to});
  });
}

// ---- the rows, and what they give to the bank -------------------------------------------------------------------------

// The keys of each row of one batch entry: the sums of their logits, how many they are.
struct KeySums {
  std::vector<double> logits, counts;

  KeySums(const InfoNceParams& call, const SimilarityParams& bank, int64_t batch, Keys whose)
      : logits(call.rows), counts(call.rows), bags_(bank, batch, whose), indices_(bank.key_indices), ones_(call.rows * indices_, 1.0f) {
    const InfoNceParams p = entry(call, batch);
    const kdfast::Matrix keys = bank.keys.from(batch * bank.keys_batch_stride);
    const float* const bias = bank.bias != nullptr ? bank.bias + batch * bank.bias_batch_stride : nullptr;
    sums_ = bags_.row_sums(bags_.key_bag, keys, p.width, nullptr);
    given_ = with_positives(p, matrix_of(sums_), bags_.bags, bags_.row_bag, nullptr);
    skipped_ = with_positives(p, keys, bank.columns, bags_.skip, bias);
    skipped_.weights = ones_.data();

    const std::vector<float> number = bags_.sums(bags_.key_bag, [](int64_t) { return 1.0f; });
    const std::vector<float> biases = bags_.sums(bags_.key_bag, [&](int64_t j) { return bias != nullptr ? bias[j] : 0.0f; });
    std::vector<float> less, more(p.rows, 0.0f), weights;
    weighted_logits(given_, less, weights);
    if (indices_ > 0) weighted_logits(skipped_, more, weights);
    for (int64_t i = 0; i < p.rows; ++i) {
      const int64_t bag = bags_.row_bag[i];
      logits[i] = double(biases[bag]) - double(less[i]) + double(more[i]);
      counts[i] = double(number[bag]);
      for (int64_t e = 0; e < indices_; ++e) counts[i] -= bags_.skip[i * indices_ + e] >= 0;
    }
  }

  // Whether the row has one key, and there is no other.
  bool only(int64_t i) const { return counts[i] == 1 && bags_.present[i] == 1; }

  // Takes e_i times the sum of its keys off each row of `to`.
  void pull_by(const float* e, float* to) const {
    pull(given_, e, to);
    if (indices_ == 0) return;
    std::vector<float> back(given_.rows * indices_);
    for (int64_t at = 0; at < int64_t(back.size()); ++at) back[at] = -e[at / indices_];
    pull(skipped_, back.data(), to);
  }

 private:
  Bags bags_;
  int64_t indices_;
  std::vector<float> sums_, ones_;
  InfoNceParams given_, skipped_;  // the sum of its keys as a row's one positive; keys that its indices take away as its positives
};

// Takes off the gradients of keys and bias, [batch, columns, ...] or null, what e_i for each of a row's keys comes to under upstream gradients d.g.
inline void spread_to_bank(const InfoNceParams& call, const SimilarityParams& bank, Keys whose, const InfoNceGradients& d, const float* e,
                           float* dkeys, float* dbias) {
  const int64_t rows = call.rows, indices = bank.key_indices;
  if (rows == 0) return;
  for (int64_t b = 0; b < call.batch; ++b) {
    InfoNceParams p = call;
    p.columns = nullptr, p.weights = nullptr, p.bias = nullptr;
    p = entry(p, b);
    const Bags in(bank, b, whose);
    float* const of_keys = dkeys == nullptr ? nullptr : dkeys + b * bank.columns * p.width;
    float* const of_bias = dbias == nullptr ? nullptr : dbias + b * bank.columns;
    const auto upstream = [&](int64_t i) { return d.factor * d.g[(b * rows + i) * d.g_stride] * e[b * rows + i]; };
    if (of_keys != nullptr) {
      std::vector<float> weights(rows);
      for (int64_t i = 0; i < rows; ++i) weights[i] = upstream(i) * p.scale[i];
      const std::vector<float> sums = in.row_sums(in.row_bag, p.query, p.width, weights.data());
      InfoNceParams keys = p;
      keys.rows = bank.columns;
      const std::vector<float> ones(bank.columns, 1.0f);
      pull(with_positives(keys, matrix_of(sums), in.bags, in.key_bag, nullptr), ones.data(), of_keys);
    }
    if (of_bias != nullptr) {
      const std::vector<float> sums = in.sums(in.row_bag, upstream);
      for (int64_t j = 0; j < bank.columns; ++j)
        if (in.key_bag[j] >= 0) of_bias[j] -= sums[in.key_bag[j]];
    }
    if (indices == 0) continue;
    std::vector<float> slopes(rows * indices);
    for (int64_t at = 0; at < rows * indices; ++at) slopes[at] = -e[b * rows + at / indices];
    InfoNceGradients skipped{};
    skipped.g = d.g + b * rows * d.g_stride, skipped.g_stride = d.g_stride, skipped.factor = d.factor;
    skipped.slopes = slopes.data(), skipped.dcandidates = of_keys, skipped.dbias = of_bias;
    kdfast::cpu_kernels().info_nce_grad_candidates(with_positives(p, {}, bank.columns, in.skip, nullptr), skipped);
  }
}

}  // namespace
