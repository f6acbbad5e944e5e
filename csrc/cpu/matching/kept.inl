// Losses and gradients of pairs so few (few_pairs) that their scores are kept from one to the other: 6 N M D where the passes by themselves take
// 8, and nothing is packed twice.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "matching/sigmoid.inl"

namespace {

using kdfast::Step;

// A Statistic of pairs.inl, then Weights that are made with what it found. `between()` is called in the middle.
template <class Statistic, class Weights, class Between>
struct KeptWeights {
  static constexpr bool kKnowsIdle = false;
  Statistic& statistic;
  Weights& weights;
  const Between& between;
  int64_t rows;

  void begin_rows(int64_t first, int64_t count) {
    statistic.begin_rows(first);
    rows = count;
  }
  void begin_block(const Block& block) { statistic.begin_block(block); }

  template <class Product>
  void learn(Product, const Block& block, const PairGradientWorkspace& w) {
    for (int64_t row = 0; row < rows; row += kPairChunk<Product>)
      statistic.chunk(block, row, smaller(kPairChunk<Product>, rows - row), w.tile_from(row));
    between();
    weights.begin_rows(0, rows);
    weights.begin_block(block);
  }

  void weigh(const Block& block, int64_t i, float* scores) const { weights.weigh(block, i, scores); }
};

template <class Statistic, class Weights, class Between>
constexpr bool kKeepsScores<KeptWeights<Statistic, Weights, Between>> = true;

// Through all rows and columns, planned in `w`.
template <class Product, class Statistic, class Weights, class Between>
inline void keep_scores(Product product, const PairParams& p, const PairTask& all, const PairSums& out, PairGradientWorkspace& w,
                        Statistic& statistic, Weights& weights, const Between& between) {
  KeptWeights<Statistic, Weights, Between> kept{statistic, weights, between, 0};
  take_gradients(product, p, all, out, w, kept);
}

struct KeptWorkspace : PairGradientWorkspace {
  template <class Product>
  KeptWorkspace(Product product, const PairParams& p, const PairSums& out, Arena& arena)
      : PairGradientWorkspace(product, p, out.x_sums != nullptr, out.y_sums != nullptr, p.rows, p.columns, arena, round_up(p.columns, kPanel),
                              round_up(p.rows, kPairChunk<Product>)) {}
};

inline PairTask all_pairs(const PairParams& p) { return {0, 0, p.rows, 0, p.columns}; }

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

struct KeptSymmetric : KeptWorkspace {
  template <class Product>
  KeptSymmetric(Product product, const PairParams& p, const PairSums& out, SymmetricStatistic& statistic, SymmetricWeights& weights, Arena& arena)
      : KeptWorkspace(product, p, out, arena) {
    statistic.plan(product, p.rows, p.columns, block, arena);
    weights.plan(rows, block, arena);
  }
};

int64_t kept_symmetric_workspace(const PairParams& p, const PairSums& out) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    SymmetricStatistic statistic{p, PairTask{}};
    SymmetricWeights weights{p, PairTask{}, SymmetricUpstream{}, out};
    KeptSymmetric(product, p, out, statistic, weights, arena);
    return arena.words;
  });
}

void kept_symmetric(const PairParams& p, const SymmetricStatistics& found, const Step& between, const SymmetricUpstream& upstream,
                    const PairSums& out, float* workspace) {
  const PairTask all = all_pairs(p);
  with_holding_product(p, all, [&](auto product) {
    Arena arena{workspace};
    SymmetricStatistic statistic{p, all};
    statistic.rows_alone = found.column_sum == nullptr;
    SymmetricWeights weights{p, all, upstream, out};
    KeptSymmetric w(product, p, out, statistic, weights, arena);
    statistic.begin(p.rows + decltype(product)::kRowChunk, p.columns + kPanel);
    keep_scores(product, p, all, out, w, statistic, weights, [&] {
      statistic.give(found);
      between.take(between.context);
      weights.begin();
    });
  });
}

int64_t kept_sigmoid_workspace(const PairParams& p, const PairSums& out) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    const KeptWorkspace w(product, p, out, arena);
    SigmoidStatistic{p, PairTask{}}.plan(product, w.block, arena);
    SigmoidWeights{p, PairTask{}, nullptr, out}.plan(w.block, arena);
    return arena.words;
  });
}

void kept_sigmoid(const PairParams& p, float* loss, const float* g, const PairSums& out, float* workspace) {
  const PairTask all = all_pairs(p);
  for (int64_t i = 0; i < p.rows; ++i) loss[i] = 0;
  with_holding_product(p, all, [&](auto product) {
    Arena arena{workspace};
    KeptWorkspace w(product, p, out, arena);
    SigmoidStatistic statistic{p, all, loss};
    SigmoidWeights weights{p, all, g, out};
    statistic.plan(product, w.block, arena);
    weights.plan(w.block, arena);
    keep_scores(product, p, all, out, w, statistic, weights, [] {});
  });
}

}  // namespace
