// kdfast::similarity_softmax on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "similarity/bind_similarity.h"

namespace {

using kdfast::SimilarityMerge;
using kdfast::SimilarityTask;

// Multiply-adds of a call: scores and what is pooled.
double work_of(const SimilarityParams& p) {
  return double(p.batch) * double(p.rows) * double(p.columns) * double(p.width) * (p.pooled ? 2 : 1);
}

void run(const SimilarityParams& p, float* lse, float* lse_low, float* pooled) {
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const Division cut = divide(work_of(p), p.batch, p.rows, p.columns, p.pooled ? p.pooled_width + 3 : 3);
  const int64_t row_step = (p.rows + cut.row_parts - 1) / cut.row_parts;
  const int64_t whole = p.panels != nullptr ? kdfast::kPackedStep : 1;  // parts of a packed bank begin where its blocks do
  const auto column_step = [&](int64_t columns) { return ((columns + cut.column_parts - 1) / cut.column_parts + whole - 1) / whole * whole; };
  const int64_t total_rows = p.batch * p.rows, tasks = p.batch * cut.row_parts * cut.column_parts;
  const bool merge = cut.column_parts > 1;

  const int64_t words = kernels.similarity_workspace(p, row_step, column_step(p.columns));
  const Workspace<float> workspace = product_workspace(words * cut.workers);
  const int64_t partial_rows = merge ? cut.column_parts * total_rows : 0;
  const OptionalTensor partial = merge ? OptionalTensor(scratch(partial_rows * (3 + (p.pooled ? p.pooled_width : 0)))) : std::nullopt;
  float* const work = workspace.data();
  float* const maximum = merge ? floats_of(*partial) : nullptr;
  float *const low = maximum + partial_rows, *const sum = low + partial_rows;
  float* const values = sum + partial_rows;

  for_each_task(cut.workers, tasks, [&](int64_t worker, int64_t t) {
    const int64_t part = t % cut.column_parts, row_part = t / cut.column_parts % cut.row_parts;
    SimilarityTask task{};
    task.batch = t / (cut.column_parts * cut.row_parts);
    task.row_begin = row_part * row_step;
    task.row_end = std::min(p.rows, task.row_begin + row_step);
    const int64_t valid = valid_columns(p, task.batch), step = column_step(valid);
    task.column_begin = std::min(valid, part * step);
    task.column_end = std::min(valid, task.column_begin + step);
    task.start = part == 0 && p.start_logit != nullptr;
    task.finish = !merge;
    const int64_t row = task.batch * p.rows + task.row_begin, at = merge ? part * total_rows + row : row;
    task.lse = merge ? maximum + at : lse + at;
    task.lse_low = merge ? low + at : lse_low + at;
    task.sum = sum + at;
    task.pooled = (merge ? values : pooled) + at * p.pooled_width;
    if (task.row_begin < task.row_end) kernels.similarity(p, task, work + worker * words);
  });
  if (!merge) return;
  for_each_task(cut.workers, cut.workers, [&](int64_t, int64_t t) {
    const int64_t row = t * total_rows / cut.workers, end = (t + 1) * total_rows / cut.workers;
    kernels.similarity_merge({cut.column_parts, end - row, total_rows, p.pooled_width, maximum + row, low + row, sum + row,
                              p.pooled ? values + row * p.pooled_width : nullptr, lse + row, lse_low + row, pooled + row * p.pooled_width});
  });
}

// A packed copy that could be of the keys: for products of bf16, and of the size. Whether it is theirs the kernel sees.
const int32_t* panels_of(const SimilarityParams& p, const Tensor& panels) {
  check("panels", panels, ScalarType::Int, {panels.numel()});
  if (p.precision != kdfast::Precision::kBFloat16 || p.keys_batch_stride != 0 || !panels.is_contiguous()) return nullptr;
  const int64_t words = kdfast::cpu_kernels().packed_words({p.keys, p.columns, p.width, 0, nullptr});
  return words > 0 && panels.numel() == words ? data<int32_t>(panels) : nullptr;
}

}  // namespace

void kdfast::streaming_softmax(SimilarityParams p, const OptionalTensor& panels, float* lse, float* lse_low, float* pooled) {
  if (panels.has_value()) p.panels = panels_of(p, *panels);
  if (p.batch * p.rows == 0) return;
  fold_batch(p);
  run(p, lse, lse_low, pooled);
}

std::tuple<Tensor, Tensor, Tensor> kdfast::similarity_softmax(const Tensor& query, const Tensor& keys, const Tensor& scale,
                                                              const OptionalTensor& bias, const OptionalTensor& start_logit,
                                                              const OptionalTensor& values, const OptionalTensor& start_value,
                                                              const OptionalTensor& query_labels, const OptionalTensor& key_labels,
                                                              const OptionalTensor& key_index, const OptionalTensor& limit,
                                                              const OptionalTensor& valid, bool pooled, int64_t precision,
                                                              const OptionalTensor& panels) {
  STD_TORCH_CHECK(start_logit.has_value() || !start_value.has_value(), "start_value needs start_logit");
  SimilarityParams p = parameters(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, pooled, precision);
  add_values(p, values);
  p.start_logit = row_data<float>("start_logit", start_logit, {p.batch, p.rows});
  if (start_value.has_value()) p.start_value = row_matrix("start_value", *start_value, {p.batch, p.rows, p.pooled_width});

  Tensor lse = output(query, {p.batch, p.rows}), lse_low = output(query, {p.batch, p.rows});
  Tensor out = pooled ? output(query, {p.batch, p.rows, p.pooled_width}) : output(query, {0});
  kdfast::streaming_softmax(p, panels, floats_of(lse), floats_of(lse_low), floats_of(out));
  return {lse, out, lse_low};
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("similarity_softmax", TORCH_BOX(&kdfast::similarity_softmax));
}
