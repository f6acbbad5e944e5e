// kdfast::triplet_extrema, triplet_facenet and triplet_weighted on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <tuple>

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
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  for_each_anchors(
      p.scan, [&](int64_t most) { return kernels.triplet_extrema_workspace(p, most); },
      [&](int64_t begin, int64_t end, float* workspace) { kernels.triplet_extrema(p, begin, end, workspace); });
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
