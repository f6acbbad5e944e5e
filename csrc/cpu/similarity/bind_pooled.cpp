// kdfast::similarity_pooled_grad on the CPU, the gradients of a softmax's log-sum-exp and pooled output; kdfast::pooled_softmax and its
// gradients, the same of matrices with one scale.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "similarity/bind_similarity.h"

namespace {

using kdfast::kMostLargeShares;
using kdfast::LargeShare;
using kdfast::LargeShares;
using kdfast::PooledFinish;
using kdfast::PooledGradTask;
using kdfast::PooledSums;

constexpr int64_t kMinSide = 64;  // rows, and columns, that a task should have: each is packed once for all of the other

// A batch entry is cut into row_parts x (row_parts copies) rectangles, in row_parts rounds: of one round no two share columns, nor, in one
// copy of the rows' sums, rows. So sums grow in place, in an order that depends on the sizes and the number of threads alone.
struct Rounds {
  int64_t workers, row_parts, copies;

  Rounds(const SimilarityParams& p, double work) : workers(workers_for(work)) {
    const int64_t parts = workers / std::gcd(workers, p.batch);
    row_parts = std::clamp<int64_t>(std::min(p.rows, p.columns) / kMinSide, 1, parts);
    const int64_t room = kPartialFloats / std::max<int64_t>(1, p.batch * p.rows * (p.width + 2 + 2 * kMostLargeShares));
    copies = std::clamp<int64_t>(parts / row_parts, 1, std::max<int64_t>(1, std::min(p.columns / (row_parts * kMinColumns), room)));
  }
  int64_t column_parts() const { return row_parts * copies; }
};

inline int64_t part_begin(int64_t size, int64_t part, int64_t parts) { return part * size / parts; }

// The sums of all rectangles, of which those of rows are `rounds.copies` copies.
void run_rounds(const SimilarityParams& p, const PooledGradTask& call, const Rounds& rounds) {
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t a = rounds.row_parts, c = rounds.copies, rows = p.batch * p.rows;
  const int64_t words = kernels.pooled_grad_workspace(p, call, (p.rows + a - 1) / a, (p.columns + a * c - 1) / (a * c));
  const Workspace<float> workspace = product_workspace(words * rounds.workers);
  float* const work = workspace.data();
  for (int64_t round = 0; round < a; ++round) {
    for_each_task(rounds.workers, p.batch * a * c, [&](int64_t worker, int64_t t) {
      const int64_t copy = t % c, column_part = t % (a * c), row_part = (column_part / c + round) % a;
      PooledGradTask task = call;
      task.batch = t / (a * c);
      task.row_begin = part_begin(p.rows, row_part, a), task.row_end = part_begin(p.rows, row_part + 1, a);
      const int64_t valid = valid_columns(p, task.batch);
      task.column_begin = part_begin(valid, column_part, a * c), task.column_end = part_begin(valid, column_part + 1, a * c);
      task.begins = round == 0;
      PooledSums& s = task.sums;
      if (s.rows != nullptr) s.rows += copy * rows * p.width;
      if (s.by_slopes()) {
        s.mean += copy * rows, s.mass += copy * rows, s.total += copy * rows;
        s.large = s.large.from(copy * rows);
      }
      kernels.pooled_grad(p, task, work + worker * words);
    });
  }
}

struct Wanted {
  bool rows, keys, bias, values;
};

struct PooledGradients {
  Tensor rows, mean, keys, bias, values;
};

// What is wanted, with a leading batch dimension or, of a plain call, without. Rows are sum_j dz_ij k_j, times s_i where they are to be `scaled`.
PooledGradients pooled_gradients(SimilarityParams p, const kdfast::PooledUpstream& upstream, const float* start_weight,
                                 const float* start_slope, const Wanted& want, bool plain, bool scaled, const Tensor& like) {
  const auto made = [&](bool wanted, std::vector<int64_t> shape) {
    if (!wanted) shape = {0};
    if (wanted && plain) shape.erase(shape.begin());
    return output(like, shape);
  };
  const bool slopes = want.rows || want.keys || want.bias, with_h = upstream.h.data != nullptr;
  PooledGradients d{made(want.rows, {p.batch, p.rows, p.width}), made(slopes, {p.batch, p.rows}),
                    made(want.keys, {p.batch, p.columns, p.width}), made(want.bias, {p.batch, p.columns}),
                    made(want.values, {p.batch, p.columns, p.pooled_width})};
  const auto floats = [&](bool wanted, const Tensor& x) { return wanted ? floats_of(x) : nullptr; };
  PooledGradTask call{};
  call.upstream = upstream;
  PooledSums& s = call.sums;
  s.dkeys = floats(want.keys, d.keys), s.dbias = floats(want.bias, d.bias), s.dvalues = floats(want.values, d.values);
  float *const out = floats(want.rows, d.rows), *const mean = floats(slopes, d.mean);
  const auto clear = [&](float* to, int64_t width) {  // what no rectangle reaches
    for (int64_t b = 0; to != nullptr && b < p.batch; ++b)
      std::fill(to + (b * p.columns + (p.rows == 0 ? 0 : valid_columns(p, b))) * width, to + (b + 1) * p.columns * width, 0.0f);
  };
  clear(s.dkeys, p.width), clear(s.dbias, 1), clear(s.dvalues, p.pooled_width);
  if (p.batch * p.rows == 0 || !(slopes || want.values)) return d;
  if (!(want.keys || want.bias || want.values)) fold_batch(p);

  const double pairs = double(p.batch) * double(p.rows) * double(p.columns);
  const bool sums_values = p.values.data != nullptr ? want.values : want.keys;
  const double of_keys = double(p.width) * (1 + want.rows + want.keys), of_values = double(p.pooled_width) * (slopes + sums_values) * with_h;
  const Rounds rounds(p, p.scores != nullptr ? 0 : pairs * (of_keys + of_values));
  const int64_t rows = p.batch * p.rows, all = rounds.copies * rows;
  const Tensor statistics = scratch(slopes ? all * (3 + 2 * kMostLargeShares + 1) : 0);
  const Tensor copies = scratch(want.rows && rounds.copies > 1 ? all * p.width : 0);
  if (slopes) {
    s.mean = floats_of(statistics), s.mass = s.mean + all, s.total = s.mass + all;
    auto* const large = reinterpret_cast<LargeShare*>(s.total + all);
    s.large = {large, reinterpret_cast<int32_t*>(large + all * kMostLargeShares)};
  }
  s.rows = want.rows && rounds.copies > 1 ? floats_of(copies) : out;
  run_rounds(p, call, rounds);
  if (!slopes) return d;

  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const float* const key_mean = p.values.data == nullptr && start_slope == nullptr ? upstream.pooled : nullptr;
  const PooledFinish finish{s, rounds.copies, start_weight, start_slope, scaled, key_mean, out, mean};
  for_each_rows(rounds.workers, rows, [&](int64_t, int64_t begin, int64_t end) { kernels.pooled_finish_rows(p, finish, begin, end); });
  if (!want.keys && !want.bias) return d;
  for_each_rows(rounds.workers, p.columns, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = 0; b < p.batch; ++b) kernels.pooled_finish_keys(p, finish, b, begin, end);
  });
  return d;
}

kdfast::PooledUpstream pooled_upstream(const SimilarityParams& p, const OptionalTensor& g, const Tensor& h, const Tensor& pooled,
                                       const Tensor& lse, const Tensor& lse_low) {
  kdfast::PooledUpstream u{};
  u.g = row_data<float>("g", g, {p.batch, p.rows});
  check("h", h, ScalarType::Float, {p.batch, p.rows, p.pooled_width});
  u.h = row_matrix("h", h, {p.batch, p.rows, p.pooled_width});
  u.pooled = row_data<float>("pooled", pooled, {p.batch, p.rows, p.pooled_width});
  u.lse = row_data<float>("lse", lse, {p.batch, p.rows});
  u.lse_low = row_data<float>("lse_low", lse_low, {p.batch, p.rows});
  return u;
}

// The rows' sums without their scale, the means of h.v, and the gradients of keys, bias and values; what is not wanted is [0].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_pooled_grad(
    const OptionalTensor& g, const Tensor& h, const Tensor& pooled, const Tensor& lse, const Tensor& lse_low, const Tensor& query,
    const Tensor& keys, const Tensor& scale, const OptionalTensor& bias, const OptionalTensor& values, const OptionalTensor& start_weight,
    const OptionalTensor& start_slope, const OptionalTensor& query_labels, const OptionalTensor& key_labels,
    const OptionalTensor& key_index, const OptionalTensor& limit, const OptionalTensor& valid, bool want_rows, bool want_keys,
    bool want_bias, bool want_values, int64_t precision) {
  STD_TORCH_CHECK(!want_values || values.has_value(), "the gradient of values needs values");
  SimilarityParams p = parameters(query, keys, scale, bias, query_labels, key_labels, key_index, limit, valid, true, precision);
  add_values(p, values);
  const float* const weight = row_data<float>("start_weight", start_weight, {p.batch, p.rows});
  const float* const slope = row_data<float>("start_slope", start_slope, {p.batch, p.rows});
  const PooledGradients d = pooled_gradients(p, pooled_upstream(p, g, h, pooled, lse, lse_low), weight, slope,
                                             {want_rows, want_keys, want_bias, want_values}, false, false, query);
  return {d.rows, d.mean, d.keys, d.bias, d.values};
}

// ---- matrices with one scale ----------------------------------------------------------------------------------------------

Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// A call of matrices, and the memory of what it points to. scale [N], or one number; bias [M]; labels [N] and [M], of which equal ones are left out.
struct PlainCall {
  const Tensor query, keys, scale;
  const OptionalTensor values;
  SimilarityParams p{};

  PlainCall(const Tensor& q, const Tensor& k, const OptionalTensor& v, double factor, int64_t precision, const OptionalTensor& scales,
            const OptionalTensor& bias, const OptionalTensor& query_labels, const OptionalTensor& key_labels)
      : query(dense(q)), keys(dense(k)), scale(scales.has_value() ? *scales : filled(q, {q.size(0)}, factor)),
        values(v.has_value() ? OptionalTensor(dense(*v)) : v) {
    STD_TORCH_CHECK(q.dim() == 2 && k.dim() == 2 && (!v.has_value() || v->dim() == 2), "query, keys and values must have 2 dimensions");
    p.batch = 1, p.rows = q.size(0), p.columns = k.size(0), p.width = p.pooled_width = q.size(1);
    p.query = matrix_of("query", query, p.rows, p.width), p.keys = matrix_of("keys", keys, p.columns, p.width);
    if (v.has_value()) p.pooled_width = v->size(1), p.values = matrix_of("values", *values, p.columns, p.pooled_width);
    p.precision = precision_for_queries(precision_of(precision), p.rows, p.columns);
    p.scale = packed<float>("scale", scale, {p.rows});
    STD_TORCH_CHECK(query_labels.has_value() == key_labels.has_value(), "query_labels and key_labels come together");
    p.bias = row_data<float>("bias", bias, {p.columns});
    p.query_labels = row_data<int64_t>("query_labels", query_labels, {p.rows});
    p.key_labels = row_data<int64_t>("key_labels", key_labels, {p.columns});
    p.pooled = true;
  }
  static kdfast::Matrix matrix_of(const char* name, const Tensor& x, int64_t rows, int64_t width) {
    check(name, x, x.scalar_type(), {rows, width});
    return matrix(name, x);
  }
  // few_pairs, with nothing in their logits but the scores, which are kept
  bool few_pairs() const {
    const bool bare = p.bias == nullptr && p.query_labels == nullptr;
    return bare && kdfast::few_pairs(p.rows, p.columns, std::max(p.width, p.pooled_width));
  }
};

// Room for what only fills a tile of any product, and rows that do not share sets of L1.
constexpr int64_t kSpare = 16;
std::vector<int64_t> scores_shape(const SimilarityParams& p) { return {p.rows + 31, (p.columns + 63) / 64 * 64 + kSpare}; }

// lse [N], pooled [N, Dv], lse_low [N] and, where they are to be kept for the gradients and there are few_pairs, the scores; else [0].
std::tuple<Tensor, Tensor, Tensor, Tensor> pooled_softmax(const Tensor& query, const Tensor& keys, const OptionalTensor& values,
                                                          double factor, bool keep, int64_t precision, const OptionalTensor& scale,
                                                          const OptionalTensor& bias, const OptionalTensor& query_labels,
                                                          const OptionalTensor& key_labels) {
  PlainCall call(query, keys, values, factor, precision, scale, bias, query_labels, key_labels);
  SimilarityParams& p = call.p;
  const Tensor lse = output(query, {p.rows}), pooled = output(query, {p.rows, p.pooled_width}), lse_low = output(query, {p.rows});
  if (!keep || !call.few_pairs()) {
    kdfast::streaming_softmax(p, {}, floats_of(lse), floats_of(lse_low), floats_of(pooled));
    return {lse, pooled, lse_low, output(query, {0})};
  }
  const Tensor scores = output(query, scores_shape(p));
  p.scores = floats_of(scores), p.scores_stride = scores.size(1);
  for (int64_t i = 0; i < p.rows; ++i) std::fill_n(p.scores + (i + 1) * p.scores_stride - kSpare, kSpare, 0.0f);
  std::fill(p.scores + p.rows * p.scores_stride, p.scores + scores.numel(), 0.0f);
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const Workspace<float> workspace = product_workspace(kernels.similarity_workspace(p, p.rows, p.columns));
  kdfast::SimilarityTask task{};
  task.row_end = p.rows, task.column_end = p.columns, task.finish = true;
  task.lse = floats_of(lse), task.lse_low = floats_of(lse_low), task.pooled = floats_of(pooled);
  kernels.similarity(p, task, workspace.data());
  leave_vectors();
  return {lse, pooled, lse_low, scores};
}

// The gradients of query (with a tensor of scales, without them), keys, values and bias in floats; what is not wanted is [0].
std::tuple<Tensor, Tensor, Tensor, Tensor> pooled_softmax_grad(
    const OptionalTensor& g, const OptionalTensor& h, const Tensor& pooled, const Tensor& lse, const Tensor& lse_low, const Tensor& scores,
    const Tensor& query, const Tensor& keys, const OptionalTensor& values, double factor, bool want_query, bool want_keys, bool want_values,
    int64_t precision, const OptionalTensor& scale, const OptionalTensor& bias, const OptionalTensor& query_labels,
    const OptionalTensor& key_labels, bool want_bias) {
  STD_TORCH_CHECK(h.has_value() || !want_values, "the gradient of values needs h");
  PlainCall call(query, keys, values, factor, precision, scale, bias, query_labels, key_labels);
  SimilarityParams& p = call.p;
  if (scores.numel() > 0) {
    const std::vector<int64_t> shape = scores_shape(p);
    STD_TORCH_CHECK(call.few_pairs(), "scores are kept of few pairs");
    p.scores = const_cast<float*>(packed<float>("scores", scores, {shape[0], shape[1]})), p.scores_stride = shape[1];
  }
  const OptionalTensor of_lse = g.has_value() ? OptionalTensor(dense(*g)) : g;
  const OptionalTensor of_pooled = h.has_value() ? OptionalTensor(dense(*h)) : h;
  kdfast::PooledUpstream u{};
  u.g = of_lse.has_value() ? packed<float>("g", *of_lse, {p.rows}) : nullptr;
  if (h.has_value()) u.h = {packed<float>("h", *of_pooled, {p.rows, p.pooled_width}), kdfast::ElementType::kFloat32};
  u.pooled = packed<float>("pooled", pooled, {p.rows, p.pooled_width});
  u.lse = packed<float>("lse", lse, {p.rows}), u.lse_low = packed<float>("lse_low", lse_low, {p.rows});
  const Wanted want{want_query, want_keys, want_bias, want_values};
  const PooledGradients d = pooled_gradients(p, u, nullptr, nullptr, want, true, !scale.has_value(), query);
  return {d.rows, d.keys, d.values, d.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("similarity_pooled_grad", TORCH_BOX(&similarity_pooled_grad));
  m.impl("pooled_softmax", TORCH_BOX(&pooled_softmax));
  m.impl("pooled_softmax_grad", TORCH_BOX(&pooled_softmax_grad));
}
