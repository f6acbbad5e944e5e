// Hinges of triplets mined in one space and summed in others, or at the nearer of d_an and d_pn, and their gradients: checks, registration.

#include <torch/csrc/stable/library.h>

#include "triplet/bind_hinges.h"
#include "triplet/bind_units.h"

namespace {

using kdfast::EveryGradients;
using kdfast::EveryTriplet;
using Tensors = std::vector<Tensor>;

// All spaces of a problem: layers, and the one that mines where that is none of them.
struct Spaces {
  std::vector<Dense> all;
  int64_t layers;
  std::vector<UnitRows> rows;
  std::vector<kdfast::TripletSpace> of_layers;
  EveryTriplet e{};

  Spaces(const Tensors& x, const Tensors& y, const OptionalTensor& mine, const OptionalTensor& mine_ref, const Tensor& first, const Tensor& last,
         const Tensor& own, const Tensor& columns, int64_t metric, int64_t positives)
      : layers(int64_t(x.size())) {
    STD_TORCH_CHECK(1 <= layers && layers <= kdfast::kMostLayers, "there must be 1 to ", kdfast::kMostLayers, " layers, got ", layers);
    STD_TORCH_CHECK(y.empty() || y.size() == x.size(), "there must be as many references as layers, got ", y.size(), " and ", layers);
    STD_TORCH_CHECK(!mine || mine_ref.has_value() != y.empty(), "mine_ref must be given with references, and not without");
    all.reserve(x.size() + 1);
    for (size_t l = 0; l < x.size(); ++l)
      add(x[l], y.empty() ? OptionalTensor() : OptionalTensor(y[l]), first, last, own, columns, metric, positives);
    if (mine) add(*mine, mine_ref, first, last, own, columns, metric, positives);
    bool plain = false;
    for (const Dense& space : all) plain |= space.p.pairs.precision == kdfast::Precision::kFloat32Vectors;
    for (Dense& space : all)
      if (plain) space.p.pairs.precision = kdfast::Precision::kFloat32Vectors;
  }

  void add(const Tensor& x, const OptionalTensor& y, const Tensor& first, const Tensor& last, const Tensor& own, const Tensor& columns,
           int64_t metric, int64_t positives) {
    all.emplace_back(x, y, first, last, own, columns, metric, positives);
    const DenseParams &p = all[0].p, &q = all.back().p;
    STD_TORCH_CHECK(p.pairs.rows == q.pairs.rows && p.pairs.columns == q.pairs.columns, "all layers must have as many rows");
  }

  const Dense& miner() const { return int64_t(all.size()) == layers ? all[0] : all.back(); }

  // The problem, its rows in `units`.
  void arrange(const kdfast::HingeRule& rule, bool swap, const Units& units) {
    rows.reserve(all.size());
    for (const Dense& space : all) rows.emplace_back(space, units);
    for (int64_t l = 0; l < layers; ++l) of_layers.push_back(rows[size_t(l)].space);
    const bool separate = int64_t(all.size()) > layers;
    e = {rule, swap, separate, separate ? rows.back().space : of_layers[0], of_layers.data(), layers, units.rows(), units.count(),
         units.units.data(), units.anchor.data(), units.references.data(), units.most};
  }
};

// Values where out.loss is given, gradients of the sum of g_i times row i's where g is: dx of all layers, then dy.
Tensors run(Spaces& spaces, const Tensors& x, const kdfast::HingeRule& rule, bool swap, const kdfast::HingeResult& out, const float* g,
            const float* nearest, Wanted want) {
  const Dense& miner = spaces.miner();
  const DenseParams& p = miner.p;
  const CpuKernels& kernels = miner.kernels;
  const size_t layers = x.size();
  if (out.loss != nullptr) run_filter(miner, rule, out);
  const Units units(p, kernels.every_triplet_chunk(p.pairs.precision), swap);
  spaces.arrange(rule, swap, units);
  const int64_t parts = std::min(miner.workers, std::max<int64_t>(units.count(), 1));

  std::vector<DenseGradients> gradients;
  std::vector<ColumnSums> columns;
  std::vector<Tensor> pulls;
  std::vector<double*> pull(layers, nullptr), weight(layers, nullptr);
  gradients.reserve(layers), columns.reserve(layers);
  for (size_t l = 0; l < layers && g != nullptr; ++l) {
    const Dense& dense = spaces.all[l];
    UnitRows& rows = spaces.rows[l];
    rows.plan();
    gradients.emplace_back(dense, x[l], want.x, want.y);
    columns.emplace_back(dense, p.in_batch || want.y, parts);
    pulls.push_back(zeros<double>(dense.slots, ScalarType::Double));
    pull[l] = memory<double>(pulls[l]);
    weight[l] = memory<double>(units.arranged() ? rows.weights : gradients[l].x_weight);
  }
  const Tensor of_anchors = zeros<double>(3 * p.pairs.rows, ScalarType::Double);
  double* const sum = memory<double>(of_anchors);
  const kdfast::EveryState state{sum, sum + p.pairs.rows, sum + 2 * p.pairs.rows, pull.data(), weight.data()};

  const auto sums_of = [&](int64_t worker) {
    std::vector<PairSums> sums(layers);
    for (size_t l = 0; l < layers && g != nullptr; ++l)
      sums[l] = {units.arranged() ? memory<float>(spaces.rows[l].sums) : gradients[l].sums.x_sums, columns[l].sums_of(worker), nullptr};
    return sums;
  };
  const int64_t size = kernels.every_triplet_workspace(spaces.e, sums_of(0).data());
  const Tensor workspace = scratch(size * parts);
  for_each_task(parts, units.count() > 0 ? parts : 0, [&](int64_t worker, int64_t part) {
    const std::vector<PairSums> sums = sums_of(worker);
    std::vector<double*> y_weight(layers, nullptr);
    for (size_t l = 0; l < layers && g != nullptr; ++l) y_weight[l] = columns[l].weights_of(worker);
    kernels.every_triplet(spaces.e, {g, nearest, sums.data(), y_weight.data()}, state, units.unit_of(part, parts), units.unit_of(part + 1, parts),
                          memory<float>(workspace) + worker * size);
  });
  if (out.loss != nullptr) kernels.every_triplet_finish(spaces.e, state, out);

  Tensors found(g != nullptr ? 2 * layers : 0, output(x[0], {0}));
  for (size_t l = 0; l < layers && g != nullptr; ++l) {
    DenseGradients& layer = gradients[l];
    double* const x_weight = memory<double>(layer.x_weight);
    double* const y_weight = want.y ? memory<double>(layer.y_weight) : nullptr;
    spaces.rows[l].add_to(layer.sums, x_weight, y_weight);
    p.in_batch ? columns[l].add_to(layer.sums.x_sums, x_weight) : columns[l].add_to(layer.sums.y_sums, y_weight);
    kernels.every_triplet_pull(spaces.e, int64_t(l), g, state, memory<float>(layer.pull));
    std::tie(found[l], found[layers + l]) = layer.finish();
  }
  return found;
}

// Sums [N, 1], counts [N, 2] and `nearest` [N]; then, of the sum of all rows, dx and dy of each layer where they are wanted, else without elements.
Tensors every_triplet(const Tensors& x, const Tensors& y, const OptionalTensor& mine, const OptionalTensor& mine_ref, const Tensor& first,
                      const Tensor& last, const Tensor& own, const Tensor& columns, int64_t metric, int64_t positives, int64_t mining, double sign,
                      double margin, double epsilon, bool soft, bool swap, bool want_x, bool want_y) {
  Spaces spaces(x, y, mine, mine_ref, first, last, own, columns, metric, positives);
  const int64_t rows = spaces.miner().rows();
  const Tensor sums = output(x[0], {rows, 1}), nearest = output(x[0], {rows});
  std::vector<int64_t> mined(size_t(rows), 0), active(size_t(rows), 0);
  const kdfast::HingeResult out{memory<float>(sums), mined.data(), active.data(), memory<float>(nearest), nullptr};
  const std::vector<float> ones(size_t(rows), 1.0f);
  const Tensors gradients = run(spaces, x, rule_of(mining, sign, margin, epsilon, soft), swap, out, want_x || want_y ? ones.data() : nullptr,
                                out.nearest, {want_x, want_y});
  Tensors found{sums, columns_of(x[0], {mined.data(), active.data()}, rows), nearest};
  for (size_t i = 0; i < 2 * x.size(); ++i) found.push_back(gradients.empty() ? output(x[0], {0}) : gradients[i]);
  return found;
}

// dx and dy of each layer. Those of the sum of all rows, where they are at hand, serve where every row has the same g.
Tensors every_triplet_grad(const Tensor& g, const Tensor& nearest, const Tensors& dx, const Tensors& dy, const Tensors& x, const Tensors& y,
                           const OptionalTensor& mine, const OptionalTensor& mine_ref, const Tensor& first, const Tensor& last, const Tensor& own,
                           const Tensor& columns, int64_t metric, int64_t positives, int64_t mining, double sign, double margin, double epsilon,
                           bool soft, bool swap, bool want_x, bool want_y) {
  STD_TORCH_CHECK(!x.empty() && dx.size() == x.size() && dy.size() == x.size(), "dx and dy must be given for each layer");
  const int64_t rows = x[0].size(0);
  const float* const upstream = packed<float>("g", g, {rows, 1});
  bool at_hand = rows > 0 && std::all_of(upstream, upstream + rows, [&](float one) { return one == upstream[0]; });
  for (size_t l = 0; l < x.size(); ++l)
    at_hand = at_hand && (!want_x || given("dx", dx[l], x[l])) && (!want_y || given("dy", dy[l], y.empty() ? x[l] : y[l]));
  if (!at_hand) {
    Spaces spaces(x, y, mine, mine_ref, first, last, own, columns, metric, positives);
    return run(spaces, x, rule_of(mining, sign, margin, epsilon, soft), swap, {}, upstream, packed<float>("nearest", nearest, {rows}),
               {want_x, want_y});
  }
  Tensors found;
  for (const Tensor& one : dx) found.push_back(scaled(one, upstream[0], want_x));
  for (const Tensor& one : dy) found.push_back(scaled(one, upstream[0], want_y));
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("every_triplet", TORCH_BOX(&every_triplet));
  m.impl("every_triplet_grad", TORCH_BOX(&every_triplet_grad));
}
