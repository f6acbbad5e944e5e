// kdfast::similarity_distillation and kdfast::similarity_distillation_grad_keys on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "info_nce/bind_reduction.h"
#include "similarity/bind_pairs.h"

namespace {

using kdfast::DistillationParams;
using kdfast::DistillationTask;
using kdfast::kDistillationStatistics;

// The scale of every row: `factor` where there is no tensor of them.
Tensor scale_of(const OptionalTensor& scale, double factor, const Tensor& query) {
  return scale.has_value() ? *scale : filled(query, {query.size(0)}, factor);
}

// One side, student or teacher; all of [rows, ...] and [columns, ...], without a batch.
SimilarityParams side(const char* query_name, const Tensor& query, const char* keys_name, const Tensor& keys, const char* scale_name,
                      const Tensor& scale, const OptionalTensor& bias, const OptionalTensor& key_index, const OptionalTensor& valid,
                      int64_t precision) {
  STD_TORCH_CHECK(query.dim() == 2, query_name, " must have 2 dimensions, got ", query.dim());
  STD_TORCH_CHECK(keys.dim() == 2, keys_name, " must have 2 dimensions, got ", keys.dim());
  STD_TORCH_CHECK(!key_index.has_value() || key_index->dim() == 2, "key_index must have 2 dimensions");
  SimilarityParams p{};
  p.batch = 1, p.rows = query.size(0), p.columns = keys.size(0), p.width = p.pooled_width = query.size(1);
  p.precision = precision_for_queries(precision_of(precision), p.rows, p.columns);
  p.pooled = true;
  p.query = row_matrix(query_name, query, {p.rows, p.width});
  p.keys = row_matrix(keys_name, keys, {p.columns, p.width});
  p.scale = row_data<float>(scale_name, scale, {p.rows});
  p.bias = row_data<float>("bias", bias, {p.columns});
  p.key_indices = key_index.has_value() ? key_index->size(1) : 0;
  p.key_index = row_data<int64_t>("key_index", key_index, {p.rows, p.key_indices});
  p.valid = row_data<int64_t>("valid", valid, {1});
  return p;
}

DistillationParams parameters(const Tensor& student, const Tensor& keys, const Tensor& teacher, const Tensor& teacher_keys,
                              const Tensor& scale, const Tensor& teacher_scale, const OptionalTensor& bias,
                              const OptionalTensor& key_index, const OptionalTensor& valid, int64_t precision) {
  DistillationParams p{};
  p.student = side("student", student, "keys", keys, "scale", scale, bias, key_index, valid, precision);
  p.teacher = side("teacher", teacher, "teacher_keys", teacher_keys, "teacher_scale", teacher_scale, bias, key_index, valid, precision);
  STD_TORCH_CHECK(p.teacher.rows == p.student.rows, "teacher must have ", p.student.rows, " rows, got ", p.teacher.rows);
  STD_TORCH_CHECK(p.teacher.columns == p.student.columns, "teacher_keys must have ", p.student.columns, " rows, got ", p.teacher.columns);
  return p;
}

// Columns are cut first, as far as the partial results, `partial` floats a row, stay small: two banks are packed, so that another thread's
// rows would cost more than a merge. A number of parts that divides the threads keeps all of them busy.
Division divide_columns(double work, int64_t rows, int64_t columns, int64_t partial) {
  const int64_t workers = workers_for(work), room = kPartialFloats / std::max<int64_t>(1, rows * partial);
  int64_t column_parts = std::clamp<int64_t>(std::min(columns / kMinColumns, room), 1, workers);
  while (workers % column_parts != 0) --column_parts;
  return {workers, std::clamp<int64_t>(rows / kMinRows, 1, workers / column_parts), column_parts};
}

void run(const DistillationParams& p) {
  const int64_t rows = p.student.rows, columns = valid_columns(p.student, 0);
  const int64_t stride = (p.student.width + 15) / 16 * 16, partial = 2 * stride + kDistillationStatistics;
  const double work = double(rows) * double(columns) * double(3 * p.student.width + p.teacher.width);
  const Division cut = divide_columns(work, rows, columns, partial);
  const int64_t row_step = (rows + cut.row_parts - 1) / cut.row_parts, column_step = (columns + cut.column_parts - 1) / cut.column_parts;
  const bool merge = cut.column_parts > 1;

  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t words = kernels.distillation_workspace(p, row_step, column_step);
  const Workspace<float> workspace = product_workspace(words * cut.workers);
  const OptionalTensor parts = merge ? OptionalTensor(scratch(cut.column_parts * rows * partial)) : std::nullopt;
  float* const work_begin = workspace.data();
  float* const statistics = merge ? floats_of(*parts) : nullptr;
  float* const pooled = statistics + cut.column_parts * rows * kDistillationStatistics;

  for_each_task(cut.workers, cut.row_parts * cut.column_parts, [&](int64_t worker, int64_t t) {
    const int64_t part = t % cut.column_parts;
    DistillationTask task{};
    task.row_begin = t / cut.column_parts * row_step;
    task.row_end = std::min(rows, task.row_begin + row_step);
    task.column_begin = std::min(columns, part * column_step);
    task.column_end = std::min(columns, task.column_begin + column_step);
    task.start = part == 0;
    task.finish = !merge;
    task.pooled_stride = stride;
    const int64_t at = part * rows + task.row_begin;
    if (merge) task.statistics = statistics + at * kDistillationStatistics, task.pooled = pooled + 2 * at * stride;
    if (task.row_begin < task.row_end) kernels.distillation(p, task, work_begin + worker * words);
  });
  if (!merge) return;
  for_each_task(cut.workers, cut.workers, [&](int64_t, int64_t t) {
    kernels.distillation_merge(
        p, {cut.column_parts, rows, t * rows / cut.workers, (t + 1) * rows / cut.workers, statistics, pooled, stride});
  });
}

// few_distilled_pairs, whose valid columns are `columns`; between() sets the factors.
template <class Between>
void run_kept(DistillationParams p, int64_t columns, int64_t precision, Between between) {
  for (SimilarityParams* side : {&p.student, &p.teacher}) {
    side->columns = columns;
    side->precision = precision_for_rows(precision_of(precision), std::min(side->rows, columns), kPairRowsOnVectors);
  }
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const Workspace<float> workspace = product_workspace(kernels.kept_distillation_workspace(p));
  auto step = [&] {
    leave_vectors();
    between();
  };
  kernels.kept_distillation(p, {[](void* f) { (*static_cast<decltype(step)*>(f))(); }, &step}, workspace.data());
  leave_vectors();
}

// What losses are reduced with (bind_reduction.h), over the rows that admit something.
struct ReducedRows {
  const Reduction reduction;
  const DistillationParams& p;
  float* const factors;  // [rows], those of log_sums; null: all are 1

  bool counts(int64_t i) const { return p.log_sums[i] != -std::numeric_limits<float>::infinity(); }

  // The losses' factors, and theirs on the losses and on what the start's logits pull.
  void take() const {
    if (factors == nullptr) return;
    const int64_t rows = p.student.rows;
    const std::vector<float> found = reduction.factors(rows, [&](int64_t i) { return counts(i); });
    for (int64_t i = 0; i < rows; ++i) {
      factors[i] = found.empty() ? 1 : found[i];
      p.loss[i] = counts(i) ? factors[i] * p.loss[i] : 0;
      p.log_sums[4 * rows + i] *= factors[i];
      if (p.teacher_slopes != nullptr) p.teacher_slopes[i] *= factors[i];
    }
  }

  void take_differences() const {
    for (int64_t i = 0, width = p.student.width; factors != nullptr && i < p.student.rows; ++i)
      for (int64_t d = 0; d < width; ++d) p.difference[i * width + d] *= factors[i];
  }
};

// Losses or their mean, difference, log_sums, and where the pairs are few and it is asked for, with the mean the keys' gradient for an upstream of
// 1 of every loss, otherwise the table [rows, columns] that it is made of; else [0], and similarity_distillation_grad_keys forms it from nothing.
// Where losses are weighted or may not count, log_sums has their factors too, a row more, and all gradients are of what is returned. With
// want_teacher, the factors and t dloss/dt of the teacher's scale.
std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_distillation(
    const Tensor& student, const Tensor& keys, const Tensor& teacher, const Tensor& teacher_keys, const OptionalTensor& scale,
    const OptionalTensor& teacher_scale, const OptionalTensor& bias, const OptionalTensor& start_logit, const OptionalTensor& teacher_start_logit,
    const OptionalTensor& key_index, const OptionalTensor& valid, int64_t precision, bool kl, bool mean, bool keep_keys,
    double factor, double teacher_factor, const OptionalTensor& row_weights, bool sum, bool want_teacher) {
  const Tensor s = scale_of(scale, factor, student), t = scale_of(teacher_scale, teacher_factor, teacher);
  DistillationParams p = parameters(student, keys, teacher, teacher_keys, s, t, bias, key_index, valid, precision);
  STD_TORCH_CHECK(start_logit.has_value() == teacher_start_logit.has_value(), "start_logit and teacher_start_logit come together");
  const int64_t rows = p.student.rows;
  p.student.start_logit = row_data<float>("start_logit", start_logit, {rows});
  p.teacher.start_logit = row_data<float>("teacher_start_logit", teacher_start_logit, {rows});

  const auto made = [&](const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); };
  const bool factored = want_teacher || row_weights.has_value() || sum || bias.has_value() || key_index.has_value() || valid.has_value();
  const Tensor loss = output(student, {rows}), difference = output(student, {rows, p.student.width});
  const Tensor log_sums = output(student, {5 + factored + want_teacher, rows});
  p.kl = kl, p.loss = made(loss), p.difference = made(difference), p.log_sums = made(log_sums);
  if (want_teacher) p.teacher_slopes = p.log_sums + 6 * rows;
  const int64_t count = p.student.columns, columns = valid_columns(p.student, 0), width = p.student.width;
  // where the losses have upstream gradients of their own, so do the keys' sums; scores in bf16 cost less than a table
  const bool table = !mean && !valid.has_value() && precision_of(precision) != kdfast::Precision::kBFloat16;
  const bool few = (mean || table || !keep_keys) && kdfast::few_distilled_pairs(rows, count, width, p.teacher.width);
  const Tensor dkeys = !few || !keep_keys ? output(keys, {0}) : table ? output(keys, {rows, count}) : output(keys, {count, width});
  if (few && keep_keys && table) {
    p.table = made(dkeys);
  } else if (few && keep_keys) {
    p.dkeys = made(dkeys);
    std::fill(p.dkeys + columns * width, p.dkeys + count * width, 0.0f);
  }
  const Reduction reduction{mean, sum, row_data<float>("row_weights", row_weights, {rows})};
  const ReducedRows reduced{reduction, p, factored ? p.log_sums + 5 * rows : nullptr};
  if (few && columns > 0) {
    p.factors = reduced.factors;
    run_kept(p, columns, precision, [&] { reduced.take(); });
  } else if (rows > 0) {
    run(p);
    reduced.take();
    reduced.take_differences();
  }
  if (!mean) return {loss, difference, log_sums, dkeys};
  const Tensor value = output(student, {});
  *floats_of(value) = mean_of(p.loss, rows);
  return {value, difference, log_sums, dkeys};
}

// g: of every loss, or of their mean. table: as the forward pass may leave it. Keys are cut among threads, each of whose sums belong to one thread:
// no merge, and the same bits for any number of threads.
Tensor similarity_distillation_grad_keys(const Tensor& g, const Tensor& log_sums, const Tensor& student, const Tensor& keys,
                                         const Tensor& teacher, const Tensor& teacher_keys, const OptionalTensor& scale,
                                         const OptionalTensor& teacher_scale, const OptionalTensor& bias, const OptionalTensor& key_index,
                                         const OptionalTensor& valid, int64_t precision, double factor, double teacher_factor,
                                         const OptionalTensor& table) {
  const Tensor s = scale_of(scale, factor, student), t = scale_of(teacher_scale, teacher_factor, teacher);
  const DistillationParams p = parameters(student, keys, teacher, teacher_keys, s, t, bias, key_index, valid, precision);
  const int64_t rows = p.student.rows, count = p.student.columns, width = p.student.width, columns = valid_columns(p.student, 0);
  const bool factored = log_sums.size(0) > 5;
  const float* const levels = row_data<float>("log_sums", log_sums, {std::max<int64_t>(5, log_sums.size(0)), rows});
  const Tensor dkeys = output(keys, {count, width});
  float* const out = static_cast<float*>(dkeys.mutable_data_ptr());
  if (table.has_value()) {  // which has the factors
    PairParams pairs{};
    pairs.precision = precision_for_rows(precision_of(precision), std::min(rows, count), kPairRowsOnVectors);
    pairs.batch = 1, pairs.rows = rows, pairs.columns = count, pairs.width = width;
    pairs.x = p.student.query, pairs.y = p.student.keys, pairs.scale = p.student.scale;
    const Workspace<float> workspace = product_workspace(kept_words(pairs, {}, false, true));
    tabled_sums(pairs, packed<float>("table", *table, {rows, count}), row_data<float>("g", g, {rows}), out, workspace.data());
    return dkeys;
  }
  Tensor of_rows = g;
  if (g.dim() == 0 || factored) {
    const float* const given = g.dim() == 0 ? packed<float>("g", g, {}) : row_data<float>("g", g, {rows});
    of_rows = output(g, {rows});
    for (int64_t i = 0; i < rows; ++i)
      floats_of(of_rows)[i] = (g.dim() == 0 ? *given / float(rows) : given[i]) * (factored ? levels[5 * rows + i] : 1);
  }
  const float* const upstream = row_data<float>("g", of_rows, {rows});
  std::fill(out + columns * width, out + count * width, 0.0f);

  const int64_t workers = workers_for(double(rows) * double(columns) * double(2 * width + p.teacher.width));
  const int64_t parts = parts_of_keys(workers, 1, columns), step = (columns + parts - 1) / parts;
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t words = kernels.distillation_grad_workspace(p, step);
  const Workspace<float> workspace = product_workspace(words * workers);
  float* const work_begin = workspace.data();
  for_each_task(workers, parts, [&](int64_t worker, int64_t t) {
    const int64_t begin = std::min(columns, t * step), end = std::min(columns, begin + step);
    if (begin < end) kernels.distillation_grad(p, {begin, end, upstream, levels, out}, work_begin + worker * words);
  });
  return dkeys;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("similarity_distillation", TORCH_BOX(&similarity_distillation));
  m.impl("similarity_distillation_grad_keys", TORCH_BOX(&similarity_distillation_grad_keys));
}
