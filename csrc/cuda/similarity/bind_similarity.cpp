// kdfast::similarity_softmax and similarity_grad_keys on CUDA: checks and registration.

#include <tuple>

#include "bind.h"
#include "similarity/similarity.h"

namespace {

using kdfast::SimilarityForward;
using kdfast::SimilarityProblem;

// What belongs to the bank, contiguous but for a batch that shares it: the distance of its entries.
int64_t bank_stride(const char* name, const Tensor& x, ScalarType type, std::initializer_list<int64_t> shape) {
  check(name, x, type, shape);
  int64_t dense = 1;
  for (int64_t d = x.dim() - 1; d > 0; --d) {
    STD_TORCH_CHECK(x.size(d) == 1 || x.stride(d) == dense, name, " must be contiguous in each batch entry");
    dense *= x.size(d);
  }
  if (x.size(0) <= 1 || x.stride(0) == 0) return 0;
  STD_TORCH_CHECK(x.stride(0) == dense, name, " must be contiguous, or shared by the batch");
  return dense;
}

SimilarityProblem problem_of(const Tensor& query, const Tensor& keys, const Tensor& scale, const OptionalTensor& bias, const OptionalTensor& start_logit,
                             const OptionalTensor& query_labels, const OptionalTensor& key_labels, const OptionalTensor& key_index, const OptionalTensor& limit, const OptionalTensor& valid) {
  STD_TORCH_CHECK(query.dim() == 3 && keys.dim() == 3, "query and keys must have 3 dimensions, got ", query.dim(), " and ", keys.dim());
  SimilarityProblem p{};
  p.batch = query.size(0), p.rows = query.size(1), p.columns = keys.size(1), p.width = p.value_width = query.size(2);
  STD_TORCH_CHECK(kdfast::similarity_serves(p.width), "it takes widths that are multiples of 8 up to 256, got ", p.width);
  STD_TORCH_CHECK(p.columns > 0, "keys must have at least one row");
  STD_TORCH_CHECK(p.rows < INT32_MAX - 256 && p.columns < INT32_MAX - 256, "at most 2^31 - 257 rows, got ", p.rows, " and ", p.columns);
  p.element = element_of("query", query);
  STD_TORCH_CHECK(p.element != kdfast::Element::kFloat32, "query must be bfloat16 or float16");
  check("query", query, query.scalar_type(), {p.batch, p.rows, p.width});
  STD_TORCH_CHECK(query.is_contiguous(), "query must be contiguous");
  p.keys_stride = bank_stride("keys", keys, query.scalar_type(), {p.batch, p.columns, p.width});
  p.scale = packed<float>("scale", scale, {p.batch, p.rows});
  if (bias.has_value()) {
    p.bias_stride = bank_stride("bias", *bias, ScalarType::Float, {p.batch, p.columns}), p.bias = data<float>(*bias);
  }
  if (start_logit.has_value()) p.start_logit = packed<float>("start_logit", *start_logit, {p.batch, p.rows});
  STD_TORCH_CHECK(query_labels.has_value() == key_labels.has_value(), "query_labels and key_labels must be given together");
  if (key_labels.has_value()) {
    p.query_labels = packed<int64_t>("query_labels", *query_labels, {p.batch, p.rows});
    p.labels_stride = bank_stride("key_labels", *key_labels, ScalarType::Long, {p.batch, p.columns});
    p.key_labels = static_cast<const int64_t*>(key_labels->const_data_ptr());
  }
  if (key_index.has_value()) {
    STD_TORCH_CHECK(key_index->dim() == 3, "key_index must have 3 dimensions, got ", key_index->dim());
    p.indices = key_index->size(2);
    p.key_index = packed<int64_t>("key_index", *key_index, {p.batch, p.rows, p.indices});
  }
  if (limit.has_value()) p.limit = packed<float>("limit", *limit, {p.batch, p.rows});
  if (valid.has_value()) {
    p.valid_stride = bank_stride("valid", *valid, ScalarType::Long, {p.batch}), p.valid = static_cast<const int64_t*>(valid->const_data_ptr());
  }
  return p;
}

// Copies begin at multiples of 16 bytes: `x` itself, or one of its own, of a single entry where the batch shares it.
Tensor aligned(const Tensor& x, bool shared) {
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0) return x;
  return torch::stable::clone(shared ? torch::stable::select(x, 0, 0) : x);
}

// What `p` reads of queries and keys, to be kept until the launch.
std::tuple<Tensor, Tensor> align(SimilarityProblem& p, const Tensor& query_in, const Tensor& keys_in) {
  const Tensor query = aligned(query_in, false), keys = aligned(keys_in, p.keys_stride == 0);
  p.query = query.const_data_ptr(), p.keys = keys.const_data_ptr();
  return {query, keys};
}

std::tuple<Tensor, Tensor, Tensor> similarity_softmax(const Tensor& query, const Tensor& keys, const Tensor& scale, const OptionalTensor& bias,
                                                      const OptionalTensor& start_logit, const OptionalTensor& values, const OptionalTensor& start_value,
                                                      const OptionalTensor& query_labels, const OptionalTensor& key_labels, const OptionalTensor& key_index,
                                                      const OptionalTensor& limit, const OptionalTensor& valid, bool pooled, int64_t, const OptionalTensor&) {
  STD_TORCH_CHECK(!start_value.has_value(), "it takes no start_value");
  SimilarityForward p{};
  p.problem = problem_of(query, keys, scale, bias, start_logit, query_labels, key_labels, key_index, limit, valid);
  if (values.has_value()) {
    STD_TORCH_CHECK(values->dim() == 3, "values must have 3 dimensions, got ", values->dim());
    p.problem.value_width = values->size(2);
    STD_TORCH_CHECK(kdfast::similarity_serves(p.problem.width, p.problem.value_width), "beside values it takes widths that are multiples of 8 up to 128");
    p.problem.values_stride = bank_stride("values", *values, query.scalar_type(), {p.problem.batch, p.problem.columns, p.problem.value_width});
  }
  const auto [batch, rows, width] = std::tuple(p.problem.batch, p.problem.rows, p.problem.value_width);
  Tensor lse = torch::stable::empty_like(scale), lse_low = torch::stable::empty_like(scale);
  Tensor sums = pooled ? torch::stable::new_empty(scale, {batch, rows, width}) : torch::stable::new_empty(scale, {0});
  p.out = {floats_of(lse), floats_of(lse_low), pooled ? floats_of(sums) : nullptr};
  if (lse.numel() == 0) return {lse, sums, lse_low};
  const auto kept = align(p.problem, query, keys);
  OptionalTensor kept_values;
  if (values.has_value()) kept_values = aligned(*values, p.problem.values_stride == 0), p.problem.values = kept_values->const_data_ptr();
  on_device_of(query, [&](void* stream) -> const char* {
    if (!kdfast::similarity_plan(p)) return "too many rows";
    const int64_t parts = p.split.parts > 1 ? p.split.parts : 0;
    Tensor top = torch::stable::new_empty(scale, {parts, batch, rows}), total = torch::stable::new_empty(scale, {parts, batch, rows});
    Tensor part_sums = torch::stable::new_empty(scale, {pooled ? parts : 0, batch, rows, width});
    p.split.top = floats_of(top), p.split.total = floats_of(total), p.split.pooled = floats_of(part_sums);
    return kdfast::similarity_forward(p, stream);
  });
  return {lse, sums, lse_low};
}

std::tuple<Tensor, Tensor, Tensor> similarity_grad_keys(const Tensor& slope, const OptionalTensor& h, const Tensor& lse, const OptionalTensor& lse_low,
                                                        const Tensor& query, const Tensor& keys, const Tensor& scale, const OptionalTensor& bias,
                                                        const OptionalTensor& values, const OptionalTensor& query_labels, const OptionalTensor& key_labels,
                                                        const OptionalTensor& key_index, const OptionalTensor& limit, const OptionalTensor& valid, bool want_keys,
                                                        bool want_bias, bool want_values, int64_t) {
  STD_TORCH_CHECK(!h.has_value() && !values.has_value() && !limit.has_value(), "it takes neither h, values nor limit");
  STD_TORCH_CHECK(want_keys && !want_bias && !want_values, "it makes the gradient of the keys alone");
  kdfast::SimilarityKeyGradient p{};
  p.problem = problem_of(query, keys, scale, bias, std::nullopt, query_labels, key_labels, key_index, limit, valid);
  STD_TORCH_CHECK(p.problem.element == kdfast::Element::kBFloat16, "query must be bfloat16");
  const int64_t batch = p.problem.batch, rows = p.problem.rows;
  p.slope = packed<float>("slope", slope, {batch, rows}), p.lse = packed<float>("lse", lse, {batch, rows});
  if (lse_low.has_value()) p.lse_low = packed<float>("lse_low", *lse_low, {batch, rows});
  Tensor out = torch::stable::new_empty(slope, {batch, p.problem.columns, p.problem.width}), none = torch::stable::new_empty(slope, {0});
  p.keys = floats_of(out);
  if (batch == 0 || rows == 0) return {torch::stable::zero_(out), none, none};
  const auto kept = align(p.problem, query, keys);
  on_device_of(query, [&](void* stream) {
    kdfast::similarity_keys_plan(p);
    Tensor terms = torch::stable::new_empty(slope, {batch, p.term_columns, 2});
    p.terms = floats_of(terms);
    return kdfast::similarity_keys_gradient(p, stream);
  });
  return {out, none, none};
}

}  // namespace

KDFAST_CUDA_OPS(m) {
  m.impl("similarity_softmax", TORCH_BOX(&similarity_softmax));
  m.impl("similarity_grad_keys", TORCH_BOX(&similarity_grad_keys));
}
