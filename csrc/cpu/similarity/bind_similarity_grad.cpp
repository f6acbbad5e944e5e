// kdfast::similarity_grad_rows and kdfast::similarity_grad_keys on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "similarity/bind_similarity.h"

namespace {

using kdfast::SimilarityGradRowsTask;
using kdfast::SimilarityGradTask;
using kdfast::SimilarityUpstream;

SimilarityUpstream upstream(const SimilarityParams& p, const Tensor& slope, const OptionalTensor& h, const Tensor& lse, const OptionalTensor& lse_low) {
  SimilarityUpstream u{};
  u.slope = row_data<float>("slope", slope, {p.batch, p.rows});
  if (h.has_value()) u.h = row_matrix("h", *h, {p.batch, p.rows, p.pooled_width});
  u.lse = row_data<float>("lse", lse, {p.batch, p.rows});
  u.lse_low = row_data<float>("lse_low", lse_low, {p.batch, p.rows});
  return u;
}

// Multiply-adds of so many products of the keys' width and so many of the values'.
double work_of(const SimilarityParams& p, int of_keys, int of_values) {
  return double(p.batch) * double(p.rows) * double(p.columns) * (double(p.width) * of_keys + double(p.pooled_width) * of_values);
}

// Sums over column parts, [parts][count] floats, always in the same order.
void add_parts(const float* parts, int64_t count, int64_t part_count, float* sum, int64_t begin, int64_t end) {
  std::copy(parts + begin, parts + end, sum + begin);
  for (int64_t c = 1; c < part_count; ++c)
    for (int64_t i = begin; i < end; ++i) sum[i] += parts[c * count + i];
}

}  // namespace

// Rows are cut among threads and, where these are few, the bank, whose parts are added up in order.
void kdfast::similarity_row_sums(SimilarityParams p, const SimilarityUpstream& upstream, float* rows, float* mass, float* total) {
  SimilarityGradRowsTask call{};
  call.upstream = upstream;
  const int64_t total_rows = p.batch * p.rows;
  if (total_rows == 0) return;
  fold_batch(p);

  const Division cut = divide(work_of(p, 2, upstream.h.data != nullptr ? 1 : 0), p.batch, p.rows, p.columns, p.width + 2);
  const int64_t row_step = (p.rows + cut.row_parts - 1) / cut.row_parts;
  const auto column_step = [&](int64_t columns) { return (columns + cut.column_parts - 1) / cut.column_parts; };
  const bool merge = cut.column_parts > 1;
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t words = kernels.similarity_grad_rows_workspace(p, call, row_step, column_step(p.columns));
  const Workspace<float> workspace = product_workspace(words * cut.workers);
  const Tensor partial = scratch(merge ? cut.column_parts * total_rows * (p.width + 2) : 0);
  float *const work = workspace.data(), *const parts = floats_of(partial);
  float* const outputs[] = {rows, mass, total};
  const int64_t sizes[] = {total_rows * p.width, total_rows, total_rows};
  float* const starts[] = {parts, parts + cut.column_parts * sizes[0], parts + cut.column_parts * (sizes[0] + sizes[1])};

  for_each_task(cut.workers, p.batch * cut.row_parts * cut.column_parts, [&](int64_t worker, int64_t t) {
    const int64_t part = t % cut.column_parts, row_part = t / cut.column_parts % cut.row_parts;
    SimilarityGradRowsTask task = call;
    task.batch = t / (cut.column_parts * cut.row_parts);
    task.row_begin = row_part * row_step;
    task.row_end = std::min(p.rows, task.row_begin + row_step);
    const int64_t valid = valid_columns(p, task.batch), step = column_step(valid), row = task.batch * p.rows + task.row_begin;
    task.column_begin = std::min(valid, part * step);
    task.column_end = std::min(valid, task.column_begin + step);
    const auto at = [&](int i, int64_t offset) { return merge ? starts[i] + part * sizes[i] + offset : outputs[i] + offset; };
    task.rows = at(0, row * p.width), task.mass = at(1, row), task.total = at(2, row);
    if (task.row_begin < task.row_end) kernels.similarity_grad_rows(p, task, work + worker * words);
  });
  if (merge)
    for_each_task(cut.workers, cut.workers, [&](int64_t, int64_t t) {
      for (int i = 0; i < 3; ++i)
        add_parts(starts[i], sizes[i], cut.column_parts, outputs[i], t * sizes[i] / cut.workers, (t + 1) * sizes[i] / cut.workers);
    });
}

namespace {

std::tuple<Tensor, Tensor, Tensor> similarity_grad_rows(const Tensor& slope, const OptionalTensor& h, const Tensor& lse,
                                                        const OptionalTensor& lse_low, const Tensor& query, const Tensor& keys,
                                                        const Tensor& scale, const OptionalTensor& bias, const OptionalTensor& values,
                                                        const OptionalTensor& query_labels, const OptionalTensor& key_labels,
                                                        const OptionalTensor& key_index, const OptionalTensor& limit,
                                                        const OptionalTensor& valid, int64_t precision) {
  SimilarityParams p = parameters(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, true, precision);
  add_values(p, values);
  const SimilarityUpstream u = upstream(p, slope, h, lse, lse_low);
  Tensor rows = output(query, {p.batch, p.rows, p.width}), mass = output(query, {p.batch, p.rows}), total = output(query, {p.batch, p.rows});
  kdfast::similarity_row_sums(p, u, floats_of(rows), floats_of(mass), floats_of(total));
  return {rows, mass, total};
}

}  // namespace

// Keys are cut among threads, each of whose sums belong to one thread: no merge, and the same bits for any number of threads.
std::tuple<Tensor, Tensor, Tensor> kdfast::similarity_grad_keys(const Tensor& slope, const OptionalTensor& h, const Tensor& lse,
                                                                const OptionalTensor& lse_low, const Tensor& query, const Tensor& keys,
                                                                const Tensor& scale, const OptionalTensor& bias,
                                                                const OptionalTensor& values, const OptionalTensor& query_labels,
                                                                const OptionalTensor& key_labels, const OptionalTensor& key_index,
                                                                const OptionalTensor& limit, const OptionalTensor& valid, bool want_keys,
                                                                bool want_bias, bool want_values, int64_t precision) {
  STD_TORCH_CHECK(!want_values || (h.has_value() && values.has_value()), "the gradient of values needs h and values");
  SimilarityParams p = parameters(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, want_keys, precision);
  add_values(p, values);
  SimilarityGradTask call{};
  call.upstream = upstream(p, slope, h, lse, lse_low);
  Tensor dkeys = want_keys ? output(query, {p.batch, p.columns, p.width}) : output(query, {0});
  Tensor dbias = want_bias ? output(query, {p.batch, p.columns}) : output(query, {0});
  Tensor dvalues = want_values ? output(query, {p.batch, p.columns, p.pooled_width}) : output(query, {0});
  call.dkeys = want_keys ? floats_of(dkeys) : nullptr;
  call.dbias = want_bias ? floats_of(dbias) : nullptr;
  call.dvalues = want_values ? floats_of(dvalues) : nullptr;
  if (p.batch * p.columns == 0 || !(want_keys || want_bias || want_values)) return {dkeys, dbias, dvalues};

  const bool sums_values = values.has_value() ? want_values : want_keys;
  const int64_t workers = workers_for(work_of(p, want_keys ? 2 : 1, h.has_value() ? (sums_values ? 2 : 1) : 0));
  const int64_t parts = parts_of_keys(workers, p.batch, p.columns);
  const auto step_of = [&](int64_t columns) { return (columns + parts - 1) / parts; };
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t words = kernels.similarity_grad_workspace(p, call, step_of(p.columns));
  const Workspace<float> workspace = product_workspace(words * workers);
  float* const work = workspace.data();
  for_each_task(workers, p.batch * parts, [&](int64_t worker, int64_t t) {
    SimilarityGradTask task = call;
    task.batch = t / parts;
    const int64_t part = t % parts, at = task.batch * p.columns;
    const int64_t valid = p.rows == 0 ? 0 : valid_columns(p, task.batch);  // without queries there is nothing to add up
    task.key_begin = std::min(valid, part * step_of(valid)), task.key_end = std::min(valid, task.key_begin + step_of(valid));
    if (task.key_begin < task.key_end) kernels.similarity_grad(p, task, work + worker * words);
    const int64_t rest = p.columns - valid, begin = at + valid + part * rest / parts, end = at + valid + (part + 1) * rest / parts;
    const auto clear = [&](float* out, int64_t width) {
      if (out != nullptr) std::fill(out + begin * width, out + end * width, 0.0f);
    };
    clear(call.dkeys, p.width), clear(call.dbias, 1), clear(call.dvalues, p.pooled_width);
  });
  return {dkeys, dbias, dvalues};
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("similarity_grad_rows", TORCH_BOX(&similarity_grad_rows));
  m.impl("similarity_grad_keys", TORCH_BOX(&kdfast::similarity_grad_keys));
}
