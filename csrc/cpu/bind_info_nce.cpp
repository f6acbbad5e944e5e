// kdfast::info_nce_rows, info_nce_grad_rows and info_nce_grad_candidates on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "bind_similarity.h"

namespace {

using kdfast::InfoNceGradients;
using kdfast::InfoNceParams;
using kdfast::InfoNceRows;

template <class T>
const T* dense(const char* name, const OptionalTensor& x, ScalarType type, std::initializer_list<int64_t> shape) {
  if (!x.has_value()) return nullptr;
  check(name, *x, type, shape);
  STD_TORCH_CHECK(x->is_contiguous(), name, " must be contiguous");
  return data<T>(*x);
}

kdfast::Matrix dense_matrix(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  return {dense<void>(name, x, x.scalar_type(), shape), element_type(name, x.scalar_type())};
}

float* dense_output(const char* name, const OptionalTensor& x, std::initializer_list<int64_t> shape) {
  return dense<float>(name, x, ScalarType::Float, shape) == nullptr ? nullptr : static_cast<float*>(x->mutable_data_ptr());
}

Tensor output(const Tensor& like, bool wanted, std::initializer_list<int64_t> shape) {
  const std::vector<int64_t> sizes(wanted ? shape : std::initializer_list<int64_t>{0});
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Float);
}

float* where_wanted(const Tensor& x, bool wanted) { return wanted ? static_cast<float*>(x.mutable_data_ptr()) : nullptr; }

// The sizes, the queries and their scale; of the candidates nothing.
InfoNceParams parameters(const Tensor& query, const Tensor& scale) {
  STD_TORCH_CHECK(query.dim() == 3, "query must have 3 dimensions, got ", query.dim());
  InfoNceParams p{};
  p.batch = query.size(0), p.rows = query.size(1), p.width = query.size(2);
  p.query = dense_matrix("query", query, {p.batch, p.rows, p.width});
  p.scale = dense<float>("scale", scale, ScalarType::Float, {p.batch, p.rows});
  return p;
}

// Which of `count` candidates the positives are.
void add_columns(InfoNceParams& p, const Tensor& columns, int64_t count) {
  STD_TORCH_CHECK(columns.dim() == 3, "columns must have 3 dimensions, got ", columns.dim());
  p.positives = columns.size(2), p.count = count;
  p.columns = dense<int64_t>("columns", columns, ScalarType::Long, {p.batch, p.rows, p.positives});
  const bool inside = std::all_of(p.columns, p.columns + columns.numel(), [&](int64_t c) { return c >= -1 && c < count; });
  STD_TORCH_CHECK(inside, "columns must be in [-1, ", count, ")");
}

// f(begin, end) over the rows; how they are cut changes no bit of the result.
template <class F>
void for_rows(const InfoNceParams& p, const F& f) {
  const int64_t rows = p.batch * p.rows;
  const double work = double(rows) * double(p.positives + 1) * double(p.width) * 2;
  const int64_t workers = std::clamp<int64_t>(int64_t(work / kMinWork), 1, torch::stable::get_num_threads());
  for_each_task(workers, workers, [&](int64_t, int64_t t) { f(t * rows / workers, (t + 1) * rows / workers); });
}

std::tuple<Tensor, Tensor> info_nce_rows(const Tensor& lse, const OptionalTensor& pull, const Tensor& query, const Tensor& scale,
                                         const Tensor& candidates, const OptionalTensor& columns, const OptionalTensor& bias,
                                         const OptionalTensor& weights, bool include_positive) {
  InfoNceParams p = parameters(query, scale);
  if (columns.has_value()) {
    STD_TORCH_CHECK(candidates.dim() == 3, "candidates must have 3 dimensions, got ", candidates.dim());
    const int64_t batch = candidates.size(0);  // 1: shared
    STD_TORCH_CHECK(batch == 1 || batch == p.batch, "candidates must have 1 or ", p.batch, " batch entries, got ", batch);
    add_columns(p, *columns, candidates.size(1));
    p.candidates = dense_matrix("candidates", candidates, {batch, p.count, p.width});
    p.candidates_batch_stride = batch == 1 ? 0 : p.count * p.width;
    const int64_t bias_batch = bias.has_value() && bias->size(0) == 1 ? 1 : p.batch;
    p.bias = dense<float>("bias", bias, ScalarType::Float, {bias_batch, p.count});
    p.bias_batch_stride = bias_batch == 1 ? 0 : p.count;
  } else {
    STD_TORCH_CHECK(candidates.dim() == 4, "candidates without columns must have 4 dimensions, got ", candidates.dim());
    STD_TORCH_CHECK(!bias.has_value(), "bias needs columns");
    p.positives = candidates.size(2), p.count = p.rows * p.positives;
    p.candidates = dense_matrix("candidates", candidates, {p.batch, p.rows, p.positives, p.width});
    p.candidates_batch_stride = p.count * p.width;
  }
  p.weights = dense<float>("weights", weights, ScalarType::Float, {p.batch, p.rows, p.positives});

  Tensor losses = output(query, true, {p.batch, p.rows}), slopes = output(query, true, {p.batch, p.rows, p.positives});
  const float* const level = dense<float>("lse", lse, ScalarType::Float, {p.batch, p.rows});
  float* const pulls = dense_output("pull", pull, {p.batch, p.rows, p.width});
  float *const out = where_wanted(losses, true), *const slope = where_wanted(slopes, true);
  for_rows(p, [&](int64_t begin, int64_t end) {
    kdfast::cpu_kernels().info_nce_rows(p, {begin, end, include_positive, level, out, slope, pulls});
  });
  return {losses, slopes};
}

// What both backward ops take: g [batch, rows], or [] where the losses were averaged.
InfoNceGradients gradients(InfoNceParams& p, const Tensor& g, const Tensor& slopes) {
  STD_TORCH_CHECK(slopes.dim() == 3, "slopes must have 3 dimensions, got ", slopes.dim());
  p.positives = slopes.size(2);
  const bool mean = g.dim() == 0;
  InfoNceGradients d{};
  d.g = mean ? dense<float>("g", g, ScalarType::Float, {}) : dense<float>("g", g, ScalarType::Float, {p.batch, p.rows});
  d.g_stride = mean ? 0 : 1;
  d.factor = mean ? 1 / float(p.batch * p.rows) : 1;
  d.slopes = dense<float>("slopes", slopes, ScalarType::Float, {p.batch, p.rows, p.positives});
  return d;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_grad_rows(const Tensor& g, const Tensor& slopes, const OptionalTensor& pull,
                                                              const Tensor& query, const Tensor& scale, bool want_query, bool want_scale,
                                                              bool want_positive, bool want_lse) {
  STD_TORCH_CHECK(pull.has_value() || !(want_query || want_scale), "the gradients of query and scale need pull");
  InfoNceParams p = parameters(query, scale);
  InfoNceGradients d = gradients(p, g, slopes);
  d.pull = dense<float>("pull", pull, ScalarType::Float, {p.batch, p.rows, p.width});
  Tensor dquery = output(query, want_query, {p.batch, p.rows, p.width}), dscale = output(query, want_scale, {p.batch, p.rows});
  Tensor dpositive = output(query, want_positive, {p.batch, p.rows, p.positives, p.width});
  Tensor dlse = output(query, want_lse, {p.batch, p.rows});
  d.dquery = where_wanted(dquery, want_query);
  d.dscale = where_wanted(dscale, want_scale);
  d.dpositive = where_wanted(dpositive, want_positive);
  d.dlse = where_wanted(dlse, want_lse);
  for_rows(p, [&](int64_t begin, int64_t end) { kdfast::cpu_kernels().info_nce_grad_rows(p, d, begin, end); });
  return {dquery, dscale, dpositive, dlse};
}

void info_nce_grad_candidates(const Tensor& g, const Tensor& slopes, const Tensor& query, const Tensor& scale, const Tensor& columns,
                              const OptionalTensor& dcandidates, const OptionalTensor& dbias) {
  STD_TORCH_CHECK(dcandidates.has_value() || dbias.has_value(), "dcandidates or dbias must be given");
  InfoNceParams p = parameters(query, scale);
  InfoNceGradients d = gradients(p, g, slopes);
  add_columns(p, columns, dcandidates.has_value() ? dcandidates->size(1) : dbias->size(1));
  d.dcandidates = dense_output("dcandidates", dcandidates, {p.batch, p.count, p.width});
  d.dbias = dense_output("dbias", dbias, {p.batch, p.count});
  kdfast::cpu_kernels().info_nce_grad_candidates(p, d);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("info_nce_rows", TORCH_BOX(&info_nce_rows));
  m.impl("info_nce_grad_rows", TORCH_BOX(&info_nce_grad_rows));
  m.impl("info_nce_grad_candidates", TORCH_BOX(&info_nce_grad_candidates));
}
