// kdfast::similarity_softmax and kdfast::similarity_grad_keys on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "bind_similarity.h"

namespace {

using kdfast::SimilarityMerge;
using kdfast::SimilarityTask;

// Multiply-adds of a call: scores and what is pooled.
double work_of(const SimilarityParams& p) {
  return double(p.batch) * double(p.rows) * double(p.columns) * double(p.width) * (p.pooled ? 2 : 1);
}

void run(const SimilarityParams& p, float* lse, float* lse_low, float* pooled) {
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const Division cut = divide(work_of(p), p.batch, p.rows, p.columns, p.pooled ? p.pooled_width + 2 : 2);
  const int64_t row_step = (p.rows + cut.row_parts - 1) / cut.row_parts;
  const int64_t column_step = (p.columns + cut.column_parts - 1) / cut.column_parts;
  const int64_t total_rows = p.batch * p.rows, tasks = p.batch * cut.row_parts * cut.column_parts;
  const bool merge = cut.column_parts > 1;

  const int64_t words = kernels.similarity_workspace(p, row_step, column_step);
  const Tensor workspace = floats(words * cut.workers);
  const int64_t partial_rows = merge ? cut.column_parts * total_rows : 0;
  const Tensor partial = floats(partial_rows * (2 + (p.pooled ? p.pooled_width : 0)));
  float* const work = static_cast<float*>(workspace.mutable_data_ptr());
  float* const maximum = static_cast<float*>(partial.mutable_data_ptr());
  float* const sum = maximum + partial_rows;
  float* const values = sum + partial_rows;

  for_each_task(cut.workers, tasks, [&](int64_t worker, int64_t t) {
    const int64_t part = t % cut.column_parts, row_part = t / cut.column_parts % cut.row_parts;
    SimilarityTask task{};
    task.batch = t / (cut.column_parts * cut.row_parts);
    task.row_begin = row_part * row_step;
    task.row_end = std::min(p.rows, task.row_begin + row_step);
    const int64_t valid = valid_columns(p, task.batch);
    task.column_begin = std::min(valid, part * column_step);
    task.column_end = std::min(valid, task.column_begin + column_step);
    task.start = part == 0 && p.start_logit != nullptr;
    task.finish = !merge;
    const int64_t row = task.batch * p.rows + task.row_begin, at = merge ? part * total_rows + row : row;
    task.lse = merge ? maximum + at : lse + at;
    task.lse_low = lse_low + row;
    task.sum = sum + at;
    task.pooled = (merge ? values : pooled) + at * p.pooled_width;
    if (task.row_begin < task.row_end) kernels.similarity(p, task, work + worker * words);
  });
  if (!merge) return;
  for_each_task(cut.workers, cut.workers, [&](int64_t, int64_t t) {
    const int64_t row = t * total_rows / cut.workers, end = (t + 1) * total_rows / cut.workers;
    kernels.similarity_merge({cut.column_parts, end - row, total_rows, p.pooled_width, maximum + row, sum + row,
                              p.pooled ? values + row * p.pooled_width : nullptr, lse + row, lse_low + row, pooled + row * p.pooled_width});
  });
}

std::tuple<Tensor, Tensor, Tensor> similarity_softmax(const Tensor& query, const Tensor& keys, const Tensor& scale, const OptionalTensor& bias,
                                              const OptionalTensor& start_logit, const OptionalTensor& values,
                                              const OptionalTensor& start_value, const OptionalTensor& query_labels,
                                              const OptionalTensor& key_labels, const OptionalTensor& key_index,
                                              const OptionalTensor& limit, const OptionalTensor& valid, bool pooled, int64_t precision) {
  STD_TORCH_CHECK(start_logit.has_value() || !start_value.has_value(), "start_value needs start_logit");
  SimilarityParams p = parameters(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, pooled, precision);
  if (values.has_value()) {
    STD_TORCH_CHECK(values->dim() == 3, "values must have 3 dimensions, got ", values->dim());
    p.pooled_width = values->size(2);
    p.values = column_matrix("values", *values, {p.batch, p.columns, p.pooled_width}, &p.values_batch_stride);
  }
  p.start_logit = row_data<float>("start_logit", start_logit, ScalarType::Float, {p.batch, p.rows});
  if (start_value.has_value()) p.start_value = row_matrix("start_value", *start_value, {p.batch, p.rows, p.pooled_width});

  Tensor lse = output(query, {p.batch, p.rows}), lse_low = output(query, {p.batch, p.rows});
  Tensor out = pooled ? output(query, {p.batch, p.rows, p.pooled_width}) : output(query, {0});
  if (p.batch * p.rows == 0) return {lse, out, lse_low};

  // One bank for the whole batch: its rows are just more rows.
  if (p.keys_batch_stride == 0 && p.values_batch_stride == 0 && p.bias_batch_stride == 0 && p.key_labels_batch_stride == 0 && p.valid_stride == 0)
    p.rows *= p.batch, p.batch = 1;
  const auto floats_of = [](const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); };
  run(p, floats_of(lse), floats_of(lse_low), floats_of(out));
  return {lse, out, lse_low};
}

// Keys are cut among threads, each of whose sums belong to one thread: no merge, and the same bits for any number of threads.
std::tuple<Tensor, Tensor> similarity_grad_keys(const Tensor& g, const Tensor& lse, const OptionalTensor& lse_low, const Tensor& query, const Tensor& keys,
                                                const Tensor& scale, const OptionalTensor& bias, const OptionalTensor& query_labels,
                                                const OptionalTensor& key_labels, const OptionalTensor& key_index,
                                                const OptionalTensor& limit, const OptionalTensor& valid, bool want_keys, bool want_bias,
                                                int64_t precision) {
  const SimilarityParams p = parameters(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, want_keys, precision);
  const float* const upstream = row_data<float>("g", g, ScalarType::Float, {p.batch, p.rows});
  const float* const level = row_data<float>("lse", lse, ScalarType::Float, {p.batch, p.rows});
  const float* const low = row_data<float>("lse_low", lse_low, ScalarType::Float, {p.batch, p.rows});
  Tensor dkeys = want_keys ? output(query, {p.batch, p.columns, p.width}) : output(query, {0});
  Tensor dbias = want_bias ? output(query, {p.batch, p.columns}) : output(query, {0});
  float* const keys_out = static_cast<float*>(dkeys.mutable_data_ptr());
  float* const bias_out = want_bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr;
  if (p.batch * p.columns == 0 || !(want_keys || want_bias)) return {dkeys, dbias};

  const int64_t workers = workers_for(work_of(p)), parts = parts_of_keys(workers, p.batch, p.columns);
  const int64_t step = (p.columns + parts - 1) / parts;
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t words = kernels.similarity_grad_workspace(p, step, want_bias);
  const Tensor workspace = floats(words * workers);
  float* const work = static_cast<float*>(workspace.mutable_data_ptr());
  for_each_task(workers, p.batch * parts, [&](int64_t worker, int64_t t) {
    const int64_t batch = t / parts, begin = std::min(p.columns, t % parts * step), end = std::min(p.columns, begin + step);
    const int64_t valid_end = std::clamp(valid_columns(p, batch), begin, end), at = batch * p.columns;
    if (begin < valid_end) kernels.similarity_grad(p, {batch, begin, valid_end, upstream, level, low, keys_out, bias_out}, work + worker * words);
    if (want_keys) std::fill(keys_out + (at + valid_end) * p.width, keys_out + (at + end) * p.width, 0.0f);
    if (want_bias) std::fill(bias_out + at + valid_end, bias_out + at + end, 0.0f);
  });
  return {dkeys, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("similarity_softmax", TORCH_BOX(&similarity_softmax));
  m.impl("similarity_grad_keys", TORCH_BOX(&similarity_grad_keys));
}
