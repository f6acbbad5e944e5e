// The sigmoid pair loss and its gradient: every pair is a binary problem of its own, so a pair's weight follows from its own score.
//
// z_ij = s_i x_i.y_j + c_i. A pair loses softplus(z), the row's positive softplus(-z); W = g sigmoid(z), at the positive -g sigmoid(-z).
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/softplus.inl"
#include "matching/symmetric.inl"

namespace {

// What the logits of a row are made with. A scale of 0 is taken for the smallest float, as in multiplier_of.
struct SigmoidRow {
  float scale, shift;

  SigmoidRow(const PairParams& p, int64_t at) : scale(multiplier_of(p.scale[at])), shift(p.shift[at]) {}
  Vec logit(Vec score) const { return multiply_add(score, splat(scale), splat(shift)); }
  double logit(float score) const { return double(score) * double(scale) + double(shift); }
};

// softplus(-z) of a positive and its derivative, in double. The mathematical library's instructions wait for vector registers whose upper halves are set,
// which gcc does not see where softplus is a function of its own.
struct PositivePair {
  double loss, slope;
};
inline PositivePair positive_pair(double z) {
#if defined(__x86_64__) && KDFAST_LANES > 4
  __builtin_ia32_vzeroupper();
#endif
  const double e = __builtin_exp(-__builtin_fabs(z));
  return {(z < 0 ? -z : 0) + __builtin_log1p(e), -(z < 0 ? 1 : e) / (1 + e)};
}

// All bits set for the columns that exist.
inline void mark_columns(int32_t* exists, const Block& block) {
  for (int64_t j = 0; j < block.padded; ++j) exists[j] = j < block.columns ? -1 : 0;
}

// The row's positive as a column of the block, -1 where it is not one.
inline int64_t positive_in(const PairParams& p, int64_t at, const Block& block) {
  const int64_t column = p.positive[at] - block.first;
  return column >= 0 && column < block.columns ? column : -1;
}

struct SigmoidStatistic {
  const PairParams& p;
  const PairTask& task;
  float* loss;  // [rows of the task]
  int64_t first;
  int32_t* exists;
  float* lanes;  // of a chunk's rows

  template <class Product>
  void plan(Product, int64_t block, Arena& arena) {
    exists = reinterpret_cast<int32_t*>(arena.take(block));
    lanes = arena.take((Product::kRowChunk + kLanes) * kLanes);
  }

  void begin_rows(int64_t row) { first = row; }
  void begin_block(const Block& block) const { mark_columns(exists, block); }

  Vec loss_of(const SigmoidRow& terms, const float* scores, int64_t j) const {
    Vec slope;
    return (Vec)((IntVec)softplus(terms.logit(load(scores + j)), &slope) & load_int(exists + j));
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = task.batch * p.rows + first + row + i;
      const SigmoidRow terms(p, at);
      float* const scores = tile.scores(i);
      const int64_t positive = positive_in(p, at, block);
      float of_positive = 0, score = 0;
      if (positive >= 0) {
        score = scores[positive];
        of_positive = float(positive_pair(terms.logit(score)).loss);
        scores[positive] = score_left_out(terms.scale);
      }
      Vec sum0 = {}, sum1 = {};
      for (int64_t j = 0; j < block.padded; j += 2 * kLanes) {
        sum0 += loss_of(terms, scores, j);
        sum1 += loss_of(terms, scores, j + kLanes);
      }
      if (positive >= 0) scores[positive] = score;
      sum0 += sum1;
      sum0[0] += of_positive;
      store(lanes + i * kLanes, sum0);
    }
    for (int64_t i = rows; i < round_up(rows, kLanes); ++i) store(lanes + i * kLanes, Vec{});
    alignas(64) float sums[kLanes];
    for (int64_t i = 0; i < rows; i += kLanes) {
      store(sums, across<Sum>(lanes + i * kLanes));
      for (int64_t k = i; k < smaller(i + kLanes, rows); ++k) loss[first - task.row_begin + row + k] += sums[k - i];
    }
  }
};

struct SigmoidWeights {
  static constexpr bool kKnowsIdle = false;
  const PairParams& p;
  const PairTask& task;
  const float* g;  // [batch, rows]
  const PairSums& out;
  int64_t first;
  int32_t* exists;

  void plan(int64_t block, Arena& arena) { exists = reinterpret_cast<int32_t*>(arena.take(block)); }
  void begin_rows(int64_t row, int64_t) { first = row; }
  void begin_block(const Block& block) const { mark_columns(exists, block); }

  void weigh(const Block& block, int64_t i, float* scores) const {
    const int64_t at = task.batch * p.rows + first + i, positive = positive_in(p, at, block);
    const SigmoidRow terms(p, at);
    const float of_positive = positive < 0 ? 0 : float(double(g[at]) * positive_pair(terms.logit(scores[positive])).slope);
    const Vec upstream = splat(g[at]);
    const float match = positive < 0 ? 0 : scores[positive] - out.level;
    if (positive >= 0) exists[positive] = 0;  // as a negative it would weigh up to g, beside which what it weighs is lost
    Vec sum = {}, of_scores = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec score = load(scores + j);
      Vec slope;
      softplus(terms.logit(score), &slope);
      const Vec weight = (Vec)((IntVec)(upstream * slope) & load_int(exists + j));
      sum += weight;
      of_scores = multiply_add(weight, score - splat(out.level), of_scores);
      store(scores + j, weight);
    }
    if (positive >= 0) {
      sum[0] += of_positive;
      of_scores[0] += of_positive * match;
      scores[positive] = of_positive;
      exists[positive] = -1;
    }
    if (out.weights != nullptr) out.weights[at] += total(sum);
    if (out.scores != nullptr) out.scores[at] += total(of_scores);
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows and `columns` columns.
int64_t sigmoid_workspace(const PairParams& p, int64_t rows, int64_t columns) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    const PairWorkspace w(product, p, rows, columns, arena);
    SigmoidStatistic{p, PairTask{}}.plan(product, w.block, arena);
    return arena.words;
  });
}

// Losses of the task's rows over its columns.
void sigmoid(const PairParams& p, const PairTask& task, float* loss, float* workspace) {
  const int64_t rows = task.row_end - task.row_begin;
  with_sound_product(p.precision, [&](auto product) {
    Arena arena{workspace};
    PairWorkspace w(product, p, rows, task.column_end - task.column_begin, arena);
    SigmoidStatistic statistic{p, task, loss};
    statistic.plan(product, w.block, arena);
    for (int64_t i = 0; i < rows; ++i) loss[i] = 0;
    return take_statistics(product, p, task, w, statistic);
  });
}

int64_t sigmoid_grad_workspace(const PairParams& p, const PairSums& out, int64_t rows, int64_t columns) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    const PairGradientWorkspace w(product, p, out.x_sums != nullptr, out.y_sums != nullptr, rows, columns, arena);
    SigmoidWeights{p, PairTask{}, nullptr, out}.plan(w.block, arena);
    return arena.words;
  });
}

void sigmoid_grad(const PairParams& p, const PairTask& task, const float* g, const PairSums& out, float* workspace) {
  with_holding_product(p, task, [&](auto product) {
    Arena arena{workspace};
    PairGradientWorkspace w(product, p, out.x_sums != nullptr, out.y_sums != nullptr, task.row_end - task.row_begin,
                            task.column_end - task.column_begin, arena);
    SigmoidWeights weights{p, task, g, out};
    weights.plan(w.block, arena);
    take_gradients(product, p, task, out, w, weights);
  });
}

}  // namespace
