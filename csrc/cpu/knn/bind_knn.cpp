// kdfast::knn_scan and kdfast::knn_refine on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "bind.h"
#include "dispatch.h"
#include "workspace.h"

namespace {

kdfast::Matrix rows_of(const char* name, const Tensor& x, int64_t width) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), name, " must have 2 dimensions and be contiguous");
  check(name, x, x.scalar_type(), {x.size(0), width});
  return matrix(name, x);
}

kdfast::KnnLists lists_of(int64_t rows, int64_t k, int64_t kept, const Tensor& rank, const Tensor& index, const Tensor& count,
                          const Tensor& room, const Tensor& threshold, int64_t metric, const Tensor& base, double product_error,
                          double float_error) {
  STD_TORCH_CHECK(rank.dim() == 2, "rank must have 2 dimensions");
  STD_TORCH_CHECK(k >= 1 && k <= kept, "1 <= k <= kept must hold, got ", k, " and ", kept);
  STD_TORCH_CHECK(metric >= 0 && metric <= 2, "metric must be 0, 1 or 2, got ", metric);
  kdfast::KnnLists lists{};
  lists.k = k, lists.kept = kept, lists.capacity = rank.size(1);
  STD_TORCH_CHECK(lists.capacity >= kept + 32, "rank must have at least kept + 32 = ", kept + 32, " columns, got ", lists.capacity);
  lists.rank = packed_output<float>("rank", rank, {rows, lists.capacity});
  lists.index = packed_output<int64_t>("index", index, {rows, lists.capacity});
  lists.count = packed_output<int64_t>("count", count, {rows});
  lists.room = packed_output<int64_t>("room", room, {rows});
  lists.threshold = packed_output<float>("threshold", threshold, {rows});
  lists.metric = kdfast::KnnMetric(metric);
  lists.base = row_data<float>("base", base, {rows});
  lists.product_error = float(product_error), lists.float_error = float(float_error);
  return lists;
}

void knn_scan(const Tensor& query, const Tensor& keys, const Tensor& factor, const Tensor& offset, const OptionalTensor& query_labels,
              const OptionalTensor& key_labels, bool only_same, const OptionalTensor& own, int64_t first, int64_t precision, int64_t k,
              int64_t kept, const Tensor& rank, const Tensor& index, const Tensor& count, const Tensor& room, const Tensor& threshold,
              int64_t metric, const Tensor& base, double product_error, double float_error) {
  STD_TORCH_CHECK(query.dim() == 2 && keys.dim() == 2, "query and keys must have 2 dimensions");
  STD_TORCH_CHECK(query_labels.has_value() == key_labels.has_value(), "query_labels and key_labels come together");
  kdfast::KnnScanParams p{};
  p.precision = precision_of(precision);
  p.rows = query.size(0), p.columns = keys.size(0), p.width = query.size(1), p.first = first;
  p.query = rows_of("query", query, p.width), p.keys = rows_of("keys", keys, p.width);
  p.factor = row_data<float>("factor", factor, {p.columns});
  p.offset = row_data<float>("offset", offset, {p.columns});
  p.query_labels = row_data<int64_t>("query_labels", query_labels, {p.rows});
  p.key_labels = row_data<int64_t>("key_labels", key_labels, {p.columns});
  p.only_same = only_same;
  p.own = row_data<int64_t>("own", own, {p.rows});
  p.lists = lists_of(p.rows, k, kept, rank, index, count, room, threshold, metric, base, product_error, float_error);
  if (p.rows == 0 || p.columns == 0) return;

  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t workers = workers_for(double(p.rows) * double(p.columns) * double(p.width));
  const int64_t words = kernels.knn_workspace(p, (p.rows + workers - 1) / workers + kRowsApart);
  const Workspace<float> workspace = product_workspace(words * workers);
  float* const work = workspace.data();
  for_each_rows(workers, p.rows, [&](int64_t worker, int64_t begin, int64_t end) { kernels.knn_scan(p, begin, end, work + worker * words); });
}

std::tuple<Tensor, Tensor, Tensor> knn_refine(const Tensor& query, const Tensor& bank, int64_t k, int64_t kept, const Tensor& rank,
                                              const Tensor& index, const Tensor& count, const Tensor& room, const Tensor& threshold,
                                              int64_t metric, const Tensor& base, double product_error, double float_error) {
  STD_TORCH_CHECK(query.dim() == 2, "query must have 2 dimensions");
  kdfast::KnnRefineParams p{};
  p.rows = query.size(0), p.width = query.size(1);
  p.query = rows_of("query", query, p.width), p.bank = rows_of("bank", bank, p.width);
  p.lists = lists_of(p.rows, k, kept, rank, index, count, room, threshold, metric, base, product_error, float_error);
  Tensor distance = output(base, {p.rows, k});
  Tensor neighbour = output(base, {p.rows, k}, ScalarType::Long), doubtful = output(base, {p.rows}, ScalarType::Bool);
  p.distance = static_cast<float*>(distance.mutable_data_ptr());
  p.neighbour = static_cast<int64_t*>(neighbour.mutable_data_ptr());
  p.doubtful = static_cast<bool*>(doubtful.mutable_data_ptr());
  const int64_t workers = workers_for(double(p.rows) * double(kept) * double(p.width) * 4);
  for_each_rows(workers, p.rows, [&](int64_t, int64_t begin, int64_t end) { kdfast::cpu_kernels().knn_refine(p, begin, end); });
  return {distance, neighbour, doubtful};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("knn_scan", TORCH_BOX(&knn_scan));
  m.impl("knn_refine", TORCH_BOX(&knn_refine));
}
