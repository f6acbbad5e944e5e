// kdfast::sup_con and kdfast::sup_con_grad on the CPU: every row against the others, which its class attracts. With n_i the number of others of
// i's class and z = s x x^T,
//   loss_i = lse_i - sum_same z_ij / n_i, or 0 where n_i = 0,   dx_i = s sum_j W_ij x_j,
//   W_ij = g_i (p_ij - [same] / n_i) + g_j (p_ji - [same] / n_j) for j != i.

#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "similarity/bind_pairs.h"

namespace {

using kdfast::Matching;

struct SupConCall {
  PairParams p;
  const int64_t* classes;  // [rows]
  float scale;
  Tensor of_rows, index;   // memory: the scale of every row; its number, by which it is left out for itself
};

SupConCall sup_con_call(const Tensor& x, const Tensor& scale, const Tensor& labels, int64_t precision) {
  STD_TORCH_CHECK(x.dim() == 2, "x must have 2 dimensions, got ", x.dim());
  const int64_t rows = x.size(0), width = x.size(1);
  SupConCall call{{}, packed<int64_t>("labels", labels, {rows}), *packed<float>("scale", scale, {}), scratch(rows), scratch(rows, ScalarType::Long)};
  std::fill_n(floats_of(call.of_rows), rows, call.scale);
  int64_t* const own = static_cast<int64_t*>(call.index.mutable_data_ptr());
  std::iota(own, own + rows, 0);
  PairParams& p = call.p;
  p.precision = precision_for_rows(precision_of(precision), rows, kPairRowsOnVectors);
  p.batch = 1, p.rows = p.columns = rows, p.width = width;
  p.x = p.y = row_matrix("x", x, {rows, width});
  p.scale = floats_of(call.of_rows);
  p.x_labels = p.y_labels = own;
  return call;
}

double sum_of(const float* x, int64_t count) { return std::accumulate(x, x + count, 0.0); }

// One row's share of a mean over those that are counted.
double share_of(const float* inverse, int64_t rows) { return 1 / double(std::max<int64_t>(rows - std::count(inverse, inverse + rows, 0.f), 1)); }

constexpr int64_t kStatistics = 3;  // log-sum-exps, their low digits and 1 / n (0: not counted), [rows] each

std::tuple<Tensor, Tensor> sup_con(const Tensor& x, const Tensor& scale, const Tensor& labels, bool mean, int64_t precision) {
  const SupConCall call = sup_con_call(x, scale, labels, precision);
  const PairParams& p = call.p;
  const int64_t rows = p.rows;
  const std::vector<BatchStatistic> found = row_statistics(p, call.classes);
  const Tensor statistics = output(x, {kStatistics, rows}), losses = output(x, {rows});
  float *const lse = floats_of(statistics), *const low = lse + rows, *const inverse = low + rows, *const loss = floats_of(losses);
  for (int64_t i = 0; i < rows; ++i) {
    const double sum = log_sum(found[i], lse + i, low + i), others = found[i].same_count - 1;
    inverse[i] = others == 0 ? 0 : float(1 / others);
    loss[i] = others == 0 ? 0 : float(sum - found[i].same_sum / others);
  }
  if (!mean) return {losses, statistics};
  const Tensor value = output(x, {});
  *floats_of(value) = float(sum_of(loss, rows) * share_of(inverse, rows));
  return {value, statistics};
}

// The gradients of x and scale, [0] where not wanted.
std::tuple<Tensor, Tensor> sup_con_grad(const Tensor& g, const Tensor& statistics, const Tensor& x, const Tensor& scale, const Tensor& labels,
                                        bool want_x, bool want_scale, int64_t precision) {
  const SupConCall call = sup_con_call(x, scale, labels, precision);
  const int64_t rows = call.p.rows, width = call.p.width;
  const bool mean = g.dim() == 0;
  const float* const upstream = mean ? packed<float>("g", g, {}) : packed<float>("g", g, {rows});
  const float *const lse = packed<float>("statistics", statistics, {kStatistics, rows}), *const inverse = lse + 2 * rows;
  const float share = float(share_of(inverse, rows));

  const Tensor of_rows = scratch(2 * rows), no_match = zeros(x, true, {rows}), sums = zeros(x, want_x, {rows, width});
  const Tensor of_scores = zeros(x, want_scale, {rows});
  float *const row_g = floats_of(of_rows), *const pull = row_g + rows, *const scores = data_of(want_scale, of_scores);
  const Matching m{rows, width, call.p.x, call.p.y, call.scale, false};
  for (int64_t i = 0; i < rows; ++i) {
    row_g[i] = inverse[i] == 0 ? 0 : mean ? *upstream * share : upstream[i];
    pull[i] = row_g[i] * inverse[i];
  }
  symmetric_sums(call.p, {row_g, lse, lse + rows, row_g, lse, lse + rows, call.classes, call.classes, pull, pull},
                 {data_of(want_x, sums), nullptr, nullptr, scores, level_of(lse, call.p.scale, rows, rows)});

  const Tensor dx = !want_x || x.scalar_type() == ScalarType::Float ? sums : output(x, {rows, width}, x.scalar_type());  // floats in place
  if (want_x) {
    const kdfast::MatchingGradients d{floats_of(no_match), nullptr, 0, floats_of(sums), nullptr, dx.mutable_data_ptr(), nullptr, nullptr, false};
    const int64_t workers = workers_for(double(rows) * double(width) * 4);
    for_each_task(workers, workers, [&](int64_t, int64_t t) {
      kdfast::cpu_kernels().matching_gradients(m, d, t * rows / workers, (t + 1) * rows / workers);
    });
  }
  return {dx, want_scale ? filled(x, {}, sum_of(scores, rows) / 2) : output(x, {0})};  // the sums hold every pair twice
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("sup_con", TORCH_BOX(&sup_con));
  m.impl("sup_con_grad", TORCH_BOX(&sup_con_grad));
}
