// kdfast::triplet_extrema, triplet_facenet and triplet_weighted on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "triplet/bind_triplet.h"

namespace {

kdfast::ScanParams scan_params(const Tensor& x, const Tensor& y, const OptionalTensor& centre, bool normalize, int64_t metric,
                               const Tensor& label, const Tensor& own, const Tensor& first, const Tensor& skip, const Tensor& count,
                               const Tensor& sequence, const Tensor& ref_label, const Tensor& order, const Tensor& exists, int64_t precision) {
  kdfast::ScanParams p{};
  p.precision = precision_of(precision);
  p.metric = metric_of(metric);
  p.x = metric_rows("x", x, normalize, centre), p.y = metric_rows("y", y, normalize, centre);
  STD_TORCH_CHECK(p.x.width == p.y.width, "y must have the width of x, ", p.x.width, ", got ", p.y.width);
  const int64_t rows = x.size(0), columns = y.size(0);
  check("exists", exists, ScalarType::Bool, {columns});
  STD_TORCH_CHECK(exists.is_contiguous(), "exists must be contiguous");
  p.classes = {rows, columns,
               packed<int64_t>("label", label, {rows}), packed<int64_t>("own", own, {rows}), packed<int64_t>("first", first, {rows}),
               packed<int64_t>("skip", skip, {rows}), packed<int64_t>("count", count, {rows}),
               packed<int64_t>("ref_label", ref_label, {columns}), packed<int64_t>("order", order, {columns}), data<bool>(exists)};
  p.sequence = packed<int64_t>("sequence", sequence, {rows});
  const auto inside = [](const int64_t* at, int64_t size, int64_t end) {
    return std::all_of(at, at + size, [&](int64_t i) { return i >= 0 && i < end; });
  };
  STD_TORCH_CHECK(inside(p.classes.order, columns, columns), "order must lie in [0, ", columns, ")");
  STD_TORCH_CHECK(inside(p.sequence, rows, rows), "sequence must lie in [0, ", rows, ")");
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(p.classes.first[i] >= 0 && p.classes.count[i] >= 0 && p.classes.skip[i] >= 0 &&
                        p.classes.first[i] + p.classes.size(i) <= columns,
                    "the class of anchor ", i, " must lie in [0, ", columns, ")");
  return p;
}

// f(begin, end, workspace) over the anchors, `words` of workspace for each thread.
template <class Words, class F>
void for_each_anchors(const kdfast::ScanParams& p, const Words& words, const F& f) {
  const int64_t rows = p.classes.rows;
  const int64_t workers = workers_for(double(rows) * double(p.classes.columns) * double(p.x.width));
  const int64_t each = words((rows + workers - 1) / workers + kRowsApart);
  const Tensor workspace = scratch(each * workers);
  for_each_rows(workers, rows, [&](int64_t worker, int64_t begin, int64_t end) { f(begin, end, written<float>(workspace) + worker * each); });
}

void extrema_of(const kdfast::ExtremaParams& p) {
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  for_each_anchors(
      p.scan, [&](int64_t most) { return kernels.triplet_extrema_workspace(p, most); },
      [&](int64_t begin, int64_t end, float* workspace) { kernels.triplet_extrema(p, begin, end, workspace); });
}

// The nearest negatives of a batch from half its pairs; false where rows are not fit for that. Tasks are ranges of rows with equal shares of the
// triangle; what each finds for a column is then compared.
bool nearest_by_triangle(const kdfast::ExtremaParams& p) {
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t rows = p.scan.classes.rows, padded = rows + kPanelPad;
  const int64_t workers = workers_for(double(rows) * double(rows) / 2 * double(p.scan.x.width));
  std::vector<int64_t> first(size_t(workers) + 1, rows);
  for (int64_t t = 0; t < workers; ++t) {
    const double left = std::sqrt(1 - double(t) / double(workers));
    first[size_t(t)] = std::min(rows, int64_t(double(rows) * (1 - left)) / kRowsApart * kRowsApart);
  }
  int64_t most = 0;
  for (int64_t t = 0; t < workers; ++t) most = std::max(most, first[size_t(t) + 1] - first[size_t(t)]);
  const int64_t words = kernels.triplet_triangle_workspace(p, most);
  const Tensor workspace = scratch((words + 2 * padded) * workers);
  float* const work = written<float>(workspace);
  const auto closeness = [&](int64_t t) { return work + workers * words + 2 * t * padded; };
  const auto nearest = [&](int64_t t) { return reinterpret_cast<int32_t*>(closeness(t) + padded); };
  std::vector<char> sound(size_t(workers), 1);
  for_each_task(workers, workers, [&](int64_t worker, int64_t t) {
    std::fill_n(closeness(t), padded, -std::numeric_limits<float>::infinity());
    std::fill_n(nearest(t), padded, -1);
    sound[size_t(t)] = kernels.triplet_triangle(p, first[size_t(t)], first[size_t(t) + 1], closeness(t), nearest(t), work + worker * words);
  });
  if (std::count(sound.begin(), sound.end(), 0) > 0) return false;
  for (int64_t i = 0; i < rows; ++i) {
    int64_t best = 0;  // rows of a later task are later rows
    for (int64_t t = 1; t < workers; ++t)
      if (closeness(t)[i] > closeness(best)[i]) best = t;
    p.nearest_negative[i] = nearest(best)[i];
  }
  return true;
}

std::tuple<Tensor, Tensor> triplet_extrema(const Tensor& x, const Tensor& y, const OptionalTensor& centre, bool normalize, int64_t metric,
                                           const Tensor& label, const Tensor& own, const Tensor& first, const Tensor& skip,
                                           const Tensor& count, const Tensor& sequence, const Tensor& ref_label, const Tensor& order,
                                           const Tensor& exists, int64_t beyond, bool farthest_negative, int64_t precision) {
  kdfast::ExtremaParams p{};
  p.scan = scan_params(x, y, centre, normalize, metric, label, own, first, skip, count, sequence, ref_label, order, exists, precision);
  p.beyond_farthest = beyond == 1, p.beyond_nearest = beyond == 2;
  p.farthest_negative = farthest_negative;
  const int64_t rows = p.scan.classes.rows;
  Tensor index = output(x, {4, rows}, ScalarType::Long), unordered = output(x, {rows}, ScalarType::Bool);
  int64_t* const found = written<int64_t>(index);
  p.farthest_positive = found, p.nearest_positive = found + rows;
  p.nearest_negative = found + 2 * rows, p.most_distant_negative = found + 3 * rows;
  p.unordered = written<bool>(unordered);
  if (kdfast::cpu_kernels().triplet_triangle_serves(p)) {
    kdfast::ExtremaParams half = p;
    half.scan.precision = kdfast::Precision::kFloat32, half.scan.positives_alone = true;
    extrema_of(half);
    if (nearest_by_triangle(half)) return {index, unordered};
  }
  extrema_of(p);
  return {index, unordered};
}

// The results of a mining of one negative a positive pair: indices of negatives, and which anchors have a distance that is NaN.
std::tuple<Tensor, Tensor> pair_results(kdfast::PairsParams& p, const Tensor& x, int64_t each) {
  const int64_t rows = p.scan.classes.rows;
  STD_TORCH_CHECK(each >= 0, "each must be >= 0, got ", each);
  STD_TORCH_CHECK(p.scan.classes.columns < int64_t(1) << 31, "y must have fewer than 2^31 rows, got ", p.scan.classes.columns);
  Tensor negative = output(x, {rows, each}, ScalarType::Int), unordered = output(x, {rows}, ScalarType::Bool);
  p.each = each, p.negative = written<int32_t>(negative), p.unordered = written<bool>(unordered);
  return {negative, unordered};
}

std::tuple<Tensor, Tensor> triplet_facenet(const Tensor& x, const Tensor& y, const OptionalTensor& centre, bool normalize, int64_t metric,
                                           const Tensor& label, const Tensor& own, const Tensor& first, const Tensor& skip,
                                           const Tensor& count, const Tensor& sequence, const Tensor& ref_label, const Tensor& order,
                                           const Tensor& exists, int64_t each, int64_t precision) {
  kdfast::PairsParams p{};
  p.scan = scan_params(x, y, centre, normalize, metric, label, own, first, skip, count, sequence, ref_label, order, exists, precision);
  auto results = pair_results(p, x, each);
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  for_each_anchors(
      p.scan, [&](int64_t most) { return kernels.triplet_facenet_workspace(p, most); },
      [&](int64_t begin, int64_t end, float* workspace) { kernels.triplet_facenet(p, begin, end, workspace); });
  return results;
}

std::tuple<Tensor, Tensor> triplet_weighted(const Tensor& x, const Tensor& y, const OptionalTensor& centre, bool normalize, int64_t metric,
                                            const Tensor& label, const Tensor& own, const Tensor& first, const Tensor& skip,
                                            const Tensor& count, const Tensor& sequence, const Tensor& ref_label, const Tensor& order,
                                            const Tensor& exists, int64_t each, const Tensor& seed, double least, double low, double high,
                                            bool fallback, int64_t precision) {
  kdfast::WeightedParams p{};
  p.pairs.scan = scan_params(x, y, centre, normalize, metric, label, own, first, skip, count, sequence, ref_label, order, exists, precision);
  p.seed = *packed<int64_t>("seed", seed, {});
  p.least = float(least), p.low = float(low), p.high = float(high), p.fallback = fallback;
  p.existing = std::count(p.pairs.scan.classes.exists, p.pairs.scan.classes.exists + p.pairs.scan.classes.columns, true);
  auto results = pair_results(p.pairs, x, each);
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  for_each_anchors(
      p.pairs.scan, [&](int64_t most) { return kernels.triplet_weighted_workspace(p, most); },
      [&](int64_t begin, int64_t end, float* workspace) { kernels.triplet_weighted(p, begin, end, workspace); });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("triplet_extrema", TORCH_BOX(&triplet_extrema));
  m.impl("triplet_facenet", TORCH_BOX(&triplet_facenet));
  m.impl("triplet_weighted", TORCH_BOX(&triplet_weighted));
}
