// Hinges of triplets and of pairs over all negatives on the CPU, and their gradients: checks, registration.

#include <torch/csrc/stable/library.h>

#include "triplet/bind_hinges.h"

namespace {

// Whether one pass makes values and gradients.
bool at_once(const Dense& dense, const kdfast::HingeRule& rule) {
  return rule.threshold == nullptr && (rule.soft || dense.most > kFewWindows);
}

// Rows with many positives, or softplus: values where out.loss is given, sums of weights where upstream.g is. The weights are of the rows alone: in
// batch, what a pair weighs in its other role is a sum of the columns.
void run_at_once(const Dense& dense, const kdfast::HingeRule& rule, const kdfast::HingeResult& out, const kdfast::HingeUpstream& upstream,
                const PairSums& sums) {
  const CpuKernels& kernels = dense.kernels;
  const DenseParams& p = dense.p;
  if (out.loss != nullptr) run_filter(dense, rule, out);
  const ColumnSums columns(dense, upstream.g != nullptr && (p.in_batch || sums.y_sums != nullptr), dense.threads());
  const auto sums_of = [&](int64_t worker) { return PairSums{sums.x_sums, columns.sums_of(worker), nullptr}; };
  dense.for_each_rows(
      [&](int64_t n, int64_t slots) {
        return rule.soft ? kernels.soft_hinges_workspace(p, sums_of(0), n, slots) : kernels.sorted_hinges_workspace(p, sums_of(0), n, dense.most);
      },
      [&](int64_t begin, int64_t end, int64_t worker, float* work) {
        kdfast::HingeUpstream own = upstream;
        own.y_weight = columns.weights_of(worker);
        const int64_t size = rule.soft ? p.slots(begin, end) : dense.most;
        (rule.soft ? kernels.soft_hinges : kernels.sorted_hinges)(p, rule, out, own, sums_of(worker), begin, end, size, work);
      });
  if (p.in_batch) {
    columns.add_to(sums.x_sums, upstream.x_weight);
  } else {
    columns.add_to(sums.y_sums, upstream.y_weight);
  }
}

void run_hinges(const Dense& dense, const kdfast::HingeRule& rule, const kdfast::HingeResult& out) {
  if (at_once(dense, rule)) return run_at_once(dense, rule, out, {nullptr, out.nearest}, {});
  dense.for_each_rows([&](int64_t n, int64_t slots) { return dense.kernels.triplet_hinges_workspace(dense.p, n, slots); },
                      [&](int64_t begin, int64_t end, int64_t, float* work) { dense.kernels.triplet_hinges(dense.p, rule, out, begin, end, work); });
}

void run_hinges_grad(DenseGradients& gradients, const kdfast::HingeRule& rule, const kdfast::HingeUpstream& upstream) {
  const Dense& dense = gradients.dense;
  const PairSums& sums = gradients.sums;
  const int64_t most = std::max<int64_t>(dense.most, 1);
  dense.for_each_rectangle(
      sums, [&](int64_t n, int64_t m) { return dense.kernels.triplet_hinges_grad_workspace(dense.p, sums, n, m, most); },
      [&](const PairTask& task, float* work) { dense.kernels.triplet_hinges_grad(dense.p, rule, upstream, task, sums, most, work); });
}

// Gradients of the sum of g_i times row i's hinges, g padded; where one pass makes both, `out` is filled too if out.loss is given.
std::tuple<Tensor, Tensor> hinge_gradients(const Dense& dense, const Tensor& like, const kdfast::HingeRule& rule, const Tensor& g,
                                           const kdfast::HingeResult& out, const float* nearest, const uint8_t* tiles, Wanted want) {
  DenseGradients gradients(dense, like, want.x, want.y);
  const Tensor active = zeros<int32_t>(at_once(dense, rule) ? 0 : dense.slots, ScalarType::Int);
  const kdfast::HingeUpstream upstream{memory<float>(g), nearest, tiles, memory<int32_t>(active), memory<float>(gradients.pull),
                                       memory<double>(gradients.x_weight), want.y ? memory<double>(gradients.y_weight) : nullptr};
  if (at_once(dense, rule)) {
    run_at_once(dense, rule, out, upstream, gradients.sums);
    return gradients.finish();
  }
  run_hinges_grad(gradients, rule, upstream);
  return gradients.finish([&](int64_t begin, int64_t end, float* pull) {
    dense.kernels.triplet_hinges_pull(dense.p, rule, upstream, pull, begin, end);
  });
}

// With a gradient wanted, dx and dy of the sum of all rows are made too, where one pass makes both from one look at each level.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> triplet_hinges(const Tensor& x, const OptionalTensor& y, const Tensor& first,
                                                                          const Tensor& last, const Tensor& own, const Tensor& columns,
                                                                          int64_t metric, int64_t positives, int64_t mining, double sign,
                                                                          double margin, double epsilon, bool soft, bool want_x, bool want_y) {
  const Dense dense(x, y, first, last, own, columns, metric, positives);
  const int64_t rows = dense.rows();
  const kdfast::HingeRule rule = rule_of(mining, sign, margin, epsilon, soft);
  Tensor sums = output(x, {rows, 1}), nearest = output(x, {rows}), tiles = no_tiles(x, dense.p), dx = output(x, {0}), dy = output(x, {0});
  std::vector<int64_t> mined(size_t(rows), 0), active(size_t(rows), 0);
  const kdfast::HingeResult out{memory<float>(sums), mined.data(), active.data(), memory<float>(nearest), memory<uint8_t>(tiles)};
  const bool wanted = want_x || want_y;
  if (!wanted || !at_once(dense, rule)) run_hinges(dense, rule, out);
  if (wanted) {
    const Tensor ones = zeros<float>(rows + kPanelPad, ScalarType::Float);
    std::fill_n(memory<float>(ones), rows, 1.0f);
    std::tie(dx, dy) = hinge_gradients(dense, x, rule, ones, out, out.nearest, out.tiles, {want_x, want_y});
  }
  return {sums, columns_of(x, {mined.data(), active.data()}, rows), nearest, tiles, dx, dy};
}

// dx and dy of the sum of all rows, empty where they are not at hand, serve where every row has the same g.
std::tuple<Tensor, Tensor> triplet_hinges_grad(const Tensor& g, const Tensor& nearest, const Tensor& tiles, const Tensor& dx, const Tensor& dy,
                                               const Tensor& x, const OptionalTensor& y, const Tensor& first, const Tensor& last, const Tensor& own,
                                               const Tensor& columns, int64_t metric, int64_t positives, int64_t mining, double sign,
                                               double margin, double epsilon, bool soft, bool want_x, bool want_y) {
  const int64_t rows = x.size(0);
  const float* const upstream_g = packed<float>("g", g, {rows, 1});
  const bool x_given = given("dx", dx, x), y_given = given("dy", dy, y ? *y : x), at_hand = (!want_x || x_given) && (!want_y || y_given);
  if (at_hand && rows > 0 && std::all_of(upstream_g, upstream_g + rows, [&](float one) { return one == upstream_g[0]; }))
    return {scaled(dx, upstream_g[0], want_x), scaled(dy, upstream_g[0], want_y)};
  const Dense dense(x, y, first, last, own, columns, metric, positives);
  return hinge_gradients(dense, x, rule_of(mining, sign, margin, epsilon, soft), padded(upstream_g, 1, rows), {},
                         packed<float>("nearest", nearest, {rows}), tiles_data(tiles, dense.p), {want_x, want_y});
}

// ---- hinges of pairs: d_ap - level 0 of the positives, level 1 - d_an of the negatives --------------------------------------------

kdfast::HingeRule pair_rule(const Tensor& threshold) { return {kdfast::Mining::kBatchAll, 1, 0, 0, false, memory<float>(threshold)}; }

std::tuple<Tensor, Tensor, Tensor> pair_hinges(const Tensor& x, const OptionalTensor& y, const Tensor& first, const Tensor& last,
                                               const Tensor& own, const Tensor& columns, const Tensor& levels, int64_t metric) {
  const Dense dense(x, y, first, last, own, columns, metric, INT64_MAX);
  const int64_t rows = dense.rows();
  const float* const level = packed<float>("levels", levels, {rows, 2});
  const Tensor pull_level = padded(level, 2, rows), push_level = padded(level + 1, 2, rows);
  Tensor sums = output(x, {rows, 2}), tiles = no_tiles(x, dense.p);
  const Tensor pull = scratch(rows), push = scratch(rows), nearest = scratch(rows);
  std::vector<int64_t> positives(size_t(rows), 0), negatives(size_t(rows), 0), pulled(size_t(rows), 0), pushed(size_t(rows), 0);
  for (int64_t i = 0; i < rows; ++i) positives[size_t(i)] = dense.p.all_positives(i);
  run_hinges(dense, pair_rule(push_level), {memory<float>(push), negatives.data(), pushed.data(), memory<float>(nearest), memory<uint8_t>(tiles)});
  dense.kernels.pull_hinges(dense.p, {memory<float>(pull_level), memory<float>(pull), pulled.data()}, 0, rows);
  for (int64_t i = 0; i < rows; ++i) memory<float>(sums)[2 * i] = memory<float>(pull)[i], memory<float>(sums)[2 * i + 1] = memory<float>(push)[i];
  return {sums, columns_of(x, {positives.data(), negatives.data(), pulled.data(), pushed.data()}, rows), tiles};
}

std::tuple<Tensor, Tensor> pair_hinges_grad(const Tensor& g, const Tensor& tiles, const Tensor& x, const OptionalTensor& y, const Tensor& first,
                                            const Tensor& last, const Tensor& own, const Tensor& columns, const Tensor& levels, int64_t metric,
                                            bool want_x, bool want_y) {
  const Dense dense(x, y, first, last, own, columns, metric, INT64_MAX);
  const int64_t rows = dense.rows();
  DenseGradients gradients(dense, x, want_x, want_y);
  const float *const level = packed<float>("levels", levels, {rows, 2}), *const upstream_g = packed<float>("g", g, {rows, 2});
  const Tensor pull_level = padded(level, 2, rows), push_level = padded(level + 1, 2, rows);
  const Tensor pull_g = padded(upstream_g, 2, rows), push_g = padded(upstream_g + 1, 2, rows);
  run_hinges_grad(gradients, pair_rule(push_level),
                  {memory<float>(push_g), nullptr, tiles_data(tiles, dense.p), nullptr, nullptr, memory<double>(gradients.x_weight),
                   want_y ? memory<double>(gradients.y_weight) : nullptr});
  return gradients.finish([&](int64_t begin, int64_t end, float* pull) {
    dense.kernels.pull_hinges_pull(dense.p, memory<float>(pull_level), memory<float>(pull_g), pull, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("triplet_hinges", TORCH_BOX(&triplet_hinges));
  m.impl("triplet_hinges_grad", TORCH_BOX(&triplet_hinges_grad));
  m.impl("pair_hinges", TORCH_BOX(&pair_hinges));
  m.impl("pair_hinges_grad", TORCH_BOX(&pair_hinges_grad));
}
