// The multi-similarity loss in one pass over the negatives, and its gradient.
//
//   loss = log(1 + sum_p exp(-alpha (s_ap - base))) / alpha + log(1 + sum_n exp(beta (s_an - base))) / beta
//
// over the mined pairs. Here d = -s, Metric::kProduct. Which negatives are kept follows from the positives, whose distances are known; so their sum is
// formed while they pass, relative to the largest exponent so far, at least 0 for the 1. Which positives are kept follows from the
// nearest negative: they are summed at the end. Exponents are in base 2; what their float shifts round off goes into the factor.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/dense_grad.inl"

namespace {

using kdfast::MultiSimilarityResult;
using kdfast::MultiSimilarityRule;
using kdfast::MultiSimilarityUpstream;

constexpr double kInverseLn2 = 0x1.71547652b82fep0;

// A shift as a float, and the factor 2^(shift - exact).
struct RoundedShift {
  float shift, factor;

  explicit RoundedShift(double exact) : shift(float(exact)) {
    const double rest = double(shift) - exact;
    factor = rest == rest ? float(1 + kLn2 * rest) : 1;  // inf - inf
  }
};

// log(1 + sum 2^top).
inline double log_one_and(double sum, double top) {
  if (sum == 0) return 0;
  return top == 0 ? __builtin_log1p(sum) : kLn2 * top + __builtin_log(__builtin_exp2(-top) + sum);
}

inline bool kept(const MultiSimilarityRule& rule, float d, float nearest) { return !(d + rule.epsilon <= nearest); }

// 2^(alpha' d - shift) of kLanes positives of a row from number k on, alpha' = alpha log2e; 0 for those that are not kept or not there.
inline Vec positive_terms(const DenseParams& p, const MultiSimilarityRule& rule, int64_t row, int64_t k, float nearest, float shift) {
  alignas(64) float d[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const bool there = k + i < p.count(row) && kept(rule, p.distance[p.slot(row, k + i)], nearest);
    d[i] = there ? p.distance[p.slot(row, k + i)] : -kInfinity;
  }
  return exp2_nonpositive(multiply_add(load(d), splat(float(rule.alpha * kInverseLn2)), splat(-shift)));
}

struct SimilarityStatistic {
  const DenseParams& p;
  const MultiSimilarityRule& rule;
  const MultiSimilarityResult& out;
  const PairTask& task;
  int64_t first = 0;
  double* sum = nullptr;       // [rows of the task]
  float* top = nullptr;        // the exponent that the sum is relative to
  float* nearest = nullptr;

  void plan(int64_t rows, Arena& arena) {
    sum = reinterpret_cast<double*>(arena.take(2 * rows));
    top = arena.take(rows), nearest = arena.take(rows);
  }

  void begin(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) sum[i] = 0, top[i] = 0, nearest[i] = kInfinity;
  }

  void begin_rows(int64_t row) { first = row; }
  void begin_block(const Block&) const {}

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    for (int64_t i = 0; i < rows; ++i) add(block, first + row + i, tile.scores(i));
  }

  void add(const Block& block, int64_t row, float* scores) const {
    const int64_t at = row - task.row_begin;
    Vec least = splat(kInfinity);
    row_levels<false, true>(p, block, row, 1, scores, nullptr, &least);
    const float best = -largest(-least), multiplier = float(rule.beta * kInverseLn2);
    if (best < nearest[at]) nearest[at] = best;
    const float highest = -multiplier * (best + rule.base);
    if (highest > top[at]) {
      sum[at] *= __builtin_exp2(double(top[at]) - double(highest));
      top[at] = highest;
    }
    const RoundedShift shift(double(multiplier) * double(rule.base) + double(top[at]));
    const Vec limit = splat(p.farthest[row] + rule.epsilon), times = splat(-multiplier), minus = splat(-shift.shift);
    Vec part = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec v = load(scores + j);
      part = add_where(below(v, limit), part, exp2_nonpositive(multiply_add(v, times, minus)));
    }
    const float terms = total(part);
    sum[at] += double(terms) * double(shift.factor);
    if (!(terms == 0)) mark_tiles(p, out.tiles, row, block);
  }

  void finish(int64_t row) const {
    const int64_t at = row - task.row_begin;
    const bool counts = p.count(row) > 0 && p.negatives(row) > 0;
    out.nearest[row] = nearest[at];
    out.positive_log[row] = counts ? positive_log(row, nearest[at]) : double(kInfinity);
    out.negative_log[row] = counts ? log_one_and(sum[at], top[at]) : double(kInfinity);
    out.loss[row] = counts ? float(out.positive_log[row] / rule.alpha + out.negative_log[row] / rule.beta) : 0;
  }

  double positive_log(int64_t row, float nearest) const {
    const double multiplier = rule.alpha * kInverseLn2, start = multiplier * rule.base;
    double highest = 0;
    for (int64_t k = 0; k < p.count(row); ++k) {
      const float d = p.distance[p.slot(row, k)];
      if (kept(rule, d, nearest) && multiplier * d + start > highest) highest = multiplier * d + start;
    }
    const RoundedShift shift(highest - start);
    double terms = 0;
    for (int64_t k = 0; k < p.count(row); k += kLanes) terms += double(total(positive_terms(p, rule, row, k, nearest, shift.shift)));
    return log_one_and(terms * double(shift.factor), highest);
  }
};

// W_ij = g_i exp(beta (s_ij - base)) / (1 + the row's sum) over the kept negatives, and in batch W_ij + W_ji.
struct SimilarityWeights {
  static constexpr bool kKnowsIdle = true;

  const DenseParams& p;
  const MultiSimilarityRule& rule;
  const MultiSimilarityUpstream& upstream;
  int64_t first = 0;
  float *shift = nullptr, *g = nullptr, *limit = nullptr;  // [block]: of the columns as anchors

  void plan(int64_t block, Arena& arena) {
    if (p.in_batch) shift = arena.take(block), g = arena.take(block), limit = arena.take(block);
  }

  void begin_rows(int64_t row, int64_t) { first = row; }

  RoundedShift shift_of(int64_t row) const { return RoundedShift((rule.beta * rule.base + upstream.negative_log[row]) * kInverseLn2); }

  void begin_block(const Block& block) {
    if (!p.in_batch) return;
    for (int64_t j = 0; j < block.padded; ++j) {
      const int64_t row = block.first + j;
      const bool there = row < p.pairs.rows;
      const RoundedShift own(there ? shift_of(row) : RoundedShift(0));
      shift[j] = own.shift, g[j] = there ? upstream.g[row] * own.factor : 0;
      limit[j] = p.farthest[row] + rule.epsilon;
    }
  }

  bool idle(const Block& block, int64_t row, int64_t rows) const {
    return tiles_are_idle(p, upstream.tiles, first + row, rows, block.first, block.columns);
  }

  void weigh(const Block& block, int64_t i, float* scores) const {
    p.in_batch ? weigh_row<true>(block, first + i, scores) : weigh_row<false>(block, first + i, scores);
  }

  template <bool kColumns>
  void weigh_row(const Block& block, int64_t row, float* scores) const {
    row_levels<false, false>(p, block, row, 1, scores, nullptr, nullptr);
    const RoundedShift own = shift_of(row);
    const Vec times = splat(-float(rule.beta * kInverseLn2)), minus = splat(-own.shift), factor = splat(upstream.g[row] * own.factor);
    const Vec row_limit = splat(p.farthest[row] + rule.epsilon);
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec v = load(scores + j);
      Vec weight = add_where(below(v, row_limit), Vec{}, factor * exp2_nonpositive(multiply_add(v, times, minus)));
      if constexpr (kColumns) {
        const Vec mutual = load(g + j) * exp2_nonpositive(multiply_add(v, times, -load(shift + j)));
        weight = add_where(below(v, load(limit + j)), weight, mutual);
      }
      store(scores + j, weight);
    }
  }
};

struct SimilarityGradientWorkspace : PairGradientWorkspace {
  template <class Product>
  SimilarityGradientWorkspace(Product product, const DenseParams& p, const PairSums& out, int64_t rows, int64_t columns,
                              SimilarityWeights& weights, Arena& arena)
      : PairGradientWorkspace(product, p.pairs, out.x_sums != nullptr, out.y_sums != nullptr, rows, columns, arena) {
    weights.plan(block, arena);
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows.
int64_t multi_similarity_workspace(const DenseParams& p, int64_t rows) {
  return scratch_words(p.pairs.precision, [&](auto product) {
    Arena arena{nullptr};
    PairWorkspace(product, p.pairs, rows, p.columns, arena);
    SimilarityStatistic{p, MultiSimilarityRule{}, MultiSimilarityResult{}, PairTask{}}.plan(rows, arena);
    return arena.words;
  });
}

// Rows begin .. end against all references; begin is a multiple of kSlotRows.
void multi_similarity(const DenseParams& p, const MultiSimilarityRule& rule, const MultiSimilarityResult& out, int64_t begin, int64_t end,
                      float* workspace) {
  const PairTask task{0, begin, end, 0, p.columns};
  SimilarityStatistic statistic{p, rule, out, task};
  with_sound_product(p.pairs.precision, [&](auto product) {
    Arena arena{workspace};
    PairWorkspace w(product, p.pairs, end - begin, p.columns, arena);
    statistic.plan(end - begin, arena);
    statistic.begin(end - begin);
    return take_statistics(product, p.pairs, task, w, statistic);
  });
  for (int64_t i = begin; i < end; ++i) statistic.finish(i);
}

int64_t multi_similarity_grad_workspace(const DenseParams& p, const PairSums& out, int64_t rows, int64_t columns) {
  return scratch_words(p.pairs.precision, [&](auto product) {
    Arena arena{nullptr};
    SimilarityWeights weights{p, MultiSimilarityRule{}, MultiSimilarityUpstream{}};
    SimilarityGradientWorkspace(product, p, out, rows, columns, weights, arena);
    return arena.words;
  });
}

void multi_similarity_grad(const DenseParams& p, const MultiSimilarityRule& rule, const MultiSimilarityUpstream& upstream, const PairTask& task,
                           const PairSums& out, float* workspace) {
  with_holding_product(p.pairs, task, [&](auto product) {
    Arena arena{workspace};
    SimilarityWeights weights{p, rule, upstream};
    SimilarityGradientWorkspace w(product, p, out, task.row_end - task.row_begin, task.column_end - task.column_begin, weights, arena);
    take_gradients(product, p.pairs, task, out, w, weights);
  });
}

// The pull of the positives of rows begin .. end.
void multi_similarity_pull(const DenseParams& p, const MultiSimilarityRule& rule, const MultiSimilarityUpstream& upstream, float* pull, int64_t begin,
                           int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const RoundedShift shift((upstream.positive_log[i] - rule.alpha * rule.base) * kInverseLn2);
    for (int64_t k = 0; k < p.count(i); k += kLanes) {
      const Vec terms = positive_terms(p, rule, i, k, upstream.nearest[i], shift.shift) * splat(upstream.g[i] * shift.factor);
      for (int lane = 0; lane < smaller(kLanes, p.count(i) - k); ++lane) pull[p.slot(i, k + lane)] = terms[lane];
    }
  }
}

}  // namespace
