// The pull of the positives where rows have many: weights -u of a tile of a class, which is a product as those of the negatives are.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/dense_grad.inl"

namespace {

using kdfast::DensePull;

struct PullWeights {
  static constexpr bool kKnowsIdle = false;

  const DenseParams& p;
  const DensePull& out;
  int64_t first = 0;
  ColumnWeights column_weights = {};

  void plan(int64_t block, Arena& arena) { column_weights.plan(block, arena); }

  void begin() { column_weights.to = out.y_weight; }
  void begin_rows(int64_t row, int64_t) { first = row; }
  void begin_block(const Block& block) { column_weights.begin_block(block); }

  void weigh(const Block& block, int64_t i, float* scores) {
    const int64_t row = first + i, own = p.own_inside(row) ? p.own[row] : p.last[row];
    __builtin_memset(scores, 0, size_t(4 * block.padded));
    lay(block, row, p.first[row], own, scores);
    lay(block, row, own + 1, p.last[row], scores);
    Vec sum = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec weight = load(scores + j);
      sum += weight;
      column_weights.add(j, weight);
    }
    out.x_weight[row] += double(total(sum));
    column_weights.end_row();
  }

  // Columns begin .. end, all positives of the row or beyond those that are taken, as far as they are the block's.
  void lay(const Block& block, int64_t row, int64_t begin, int64_t end, float* weights) const {
    begin = begin > block.first ? begin : block.first;
    end = smaller(end, block.first + block.columns);
    if (begin >= end) return;
    const int64_t k = p.number(row, begin), count = smaller(end - begin, p.count(row) - k);
    const float* const pull = out.pull + p.slot(row, k);
    float* const to = weights + (begin - block.first);
    for (int64_t c = 0; c < count; c += kLanes) store_row(to, c, count, -load_row(pull, c, count));
  }
};

struct PullWorkspace : PairGradientWorkspace {
  template <class Product>
  PullWorkspace(Product product, const DenseParams& p, const PairSums& sums, int64_t rows, int64_t columns, PullWeights& weights, Arena& arena)
      : PairGradientWorkspace(product, p.pairs, sums.x_sums != nullptr, sums.y_sums != nullptr, rows, columns, arena) {
    weights.plan(block, arena);
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows and `columns` columns.
int64_t dense_pull_workspace(const DenseParams& p, const PairSums& sums, int64_t rows, int64_t columns) {
  return scratch_words(p.pairs.precision, [&](auto product) {
    Arena arena{nullptr};
    PullWeights weights{p, DensePull{}};
    PullWorkspace(product, p, sums, rows, columns, weights, arena);
    return arena.words;
  });
}

// A task whose columns hold the classes of its rows; slots of single rows.
void dense_pull(const DenseParams& p, const PairTask& task, const DensePull& out, const PairSums& sums, float* workspace) {
  with_holding_product(p.pairs, task, [&](auto product) {
    Arena arena{workspace};
    PullWeights weights{p, out};
    PullWorkspace w(product, p, sums, task.row_end - task.row_begin, task.column_end - task.column_begin, weights, arena);
    weights.begin();
    take_gradients(product, p.pairs, task, sums, w, weights);
    weights.column_weights.flush();
  });
}

}  // namespace
