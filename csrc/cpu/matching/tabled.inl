// Losses of pairs so few (few_pairs) that their scores are kept to weigh them, and the weights themselves until upstream gradients of the rows are known.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "matching/kept.inl"
#include "matching/tabled.h"

namespace {

// Weights, which a table keeps.
template <class Weights>
struct TablingWeights {
  const PairParams& p;
  Weights& weights;
  float* table;  // null: not wanted

  void begin_rows(int64_t first, int64_t count) const { weights.begin_rows(first, count); }
  void begin_block(const Block& block) const { weights.begin_block(block); }
  void weigh(const Block& block, int64_t i, float* scores) const {
    weights.weigh(block, i, scores);
    if (table != nullptr) __builtin_memcpy(table + i * p.columns, scores, size_t(4 * block.columns));
  }
};

// Those of a table, each row's times a factor.
struct TabledWeights {
  static constexpr bool kKnowsIdle = false;
  const PairParams& p;
  const float *table, *g;

  void weigh(const Block& block, int64_t i, float* scores) const {
    const Vec factor = splat(g[i]);
    for (int64_t j = 0; j < block.columns; j += kLanes) store(scores + j, factor * load_row(table + i * p.columns, j, block.columns));
  }
};

template <>
constexpr bool kKeepsScores<TabledWeights> = true;

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Of any of them.
int64_t tabled_workspace(const PairParams& p) {
  float wanted;
  const PairSums both{&wanted, &wanted};
  const int64_t symmetric = kept_symmetric_workspace(p, both), sigmoid = kept_sigmoid_workspace(p, both);
  return symmetric > sigmoid ? symmetric : sigmoid;
}

void tabled_symmetric(const PairParams& p, const SymmetricStatistics& found, const Step& between, const SymmetricUpstream& upstream,
                      const PairSums& out, float* table, float* workspace) {
  const PairTask all = all_pairs(p);
  with_holding_product(p, all, [&](auto product) {
    Arena arena{workspace};
    SymmetricStatistic statistic{p, all};
    statistic.rows_alone = found.column_sum == nullptr;
    SymmetricWeights weights{p, all, upstream, out};
    KeptSymmetric w(product, p, out, statistic, weights, arena);
    statistic.begin(p.rows + decltype(product)::kRowChunk, p.columns + kPanel);
    TablingWeights<SymmetricWeights> tabling{p, weights, table};
    keep_scores(product, p, all, out, w, statistic, tabling, [&] {
      statistic.give(found);
      between.take(between.context);
      weights.begin();
    });
  });
}

void tabled_sigmoid(const PairParams& p, float* loss, const float* g, const PairSums& out, float* table, float* workspace) {
  const PairTask all = all_pairs(p);
  for (int64_t i = 0; i < p.rows; ++i) loss[i] = 0;
  with_holding_product(p, all, [&](auto product) {
    Arena arena{workspace};
    KeptWorkspace w(product, p, out, arena);
    SigmoidStatistic statistic{p, all, loss};
    SigmoidWeights weights{p, all, g, out};
    statistic.plan(product, w.block, arena);
    weights.plan(w.block, arena);
    TablingWeights<SigmoidWeights> tabling{p, weights, table};
    keep_scores(product, p, all, out, w, statistic, tabling, [] {});
  });
}

void tabled_sums(const PairParams& p, const float* table, const float* g, float* y_sums, float* workspace) {
  const PairTask all = all_pairs(p);
  const PairSums out{nullptr, y_sums};
  with_holding_product(p, all, [&](auto product) {
    using Product = decltype(product);
    [[maybe_unused]] typename Product::Session session;
    Arena arena{workspace};
    KeptWorkspace w(product, p, out, arena);
    w.clear_transposed();
    TabledWeights weights{p, table, g};
    const PairGradientPass<Product, TabledWeights> pass{p, all, out, w, 0, p.rows, weights};
    const Block block{0, p.columns, w.block};
    pass.begin();
    for (int64_t i = 0; i < pass.padded_rows(); i += kPairChunk<Product>)
      pass.weigh_and_sum(block, i, smaller(kPairChunk<Product>, pass.padded_rows() - i), w.tile_from(i), {}, false);
  });
}

}  // namespace
