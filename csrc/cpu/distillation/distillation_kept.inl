// The loss and both gradients of few_distilled_pairs: with the scores of all columns kept, both softmaxes are known before anything is
// summed by them, and one weight W_ij = p^S_ij - p^T_ij has
//   the rows' difference   sum_j W_ij k_j             and for an upstream of 1 of every loss   dk_j = sum_i W_ij s_i q_i
// which is 6 D_s + 2 D_t operations a pair where the passes by themselves take 10 D_s + 4 D_t, and every matrix is packed once for both.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "distillation/distillation.inl"
#include "similarity/pairs.inl"

namespace {

// Weights of pairs.inl, W. The student's scores are the pass's, the teacher's are here.
struct DistilledPairs {
  static constexpr bool kKnowsIdle = false;
  const DistillationParams& p;
  const kdfast::Step& between;
  Rows teacher;
  Panels teacher_keys;  // where there are two banks
  Tile teacher_scores;  // from then on weights
  BothSoftmaxes softmaxes;
  RowLevel* levels;     // of the student's scores
  float *share, *teacher_share;
  ColumnTerms terms;

  template <class Product>
  void plan(Product product, int64_t rows, int64_t block, Arena& arena) {
    teacher.plan(product, rows, p.teacher.width, arena);
    if (!one_bank(p)) teacher_keys.plan(product, p.teacher.width, block, true, false, arena);
    teacher_scores = {nullptr, block + kLanes, 0};
    teacher_scores.base = arena.take(rows * teacher_scores.stride);
    softmaxes.plan(rows, p.teacher_slopes != nullptr, arena);
    levels = reinterpret_cast<RowLevel*>(arena.take(rows * int64_t(sizeof(RowLevel) / 4)));
    share = arena.take(rows), teacher_share = arena.take(rows);
    terms.plan(block, arena);
  }

  void begin_rows(int64_t, int64_t) const {}
  void begin_block(const Block& block) const { terms.pack(p.student, 0, block); }

  template <class Product>
  void learn(Product product, const Block& block, const PairGradientWorkspace& w) {
    const int64_t count = p.student.rows;
    score_teacher(product, block, w.y.panels);
    for (int64_t i = 0; i < count; ++i) {
      softmaxes.begin_row(p, i, i, true, p.student.start_logit != nullptr);
      if (p.student.scale[i] < 0) negate(w.tile.scores(i), block.padded);
    }
    weigh_rows(softmaxes.student, terms, w.tile, p.student, 0, count, block, 0, count, Prefetch{},
               [&](int64_t i, const float* scores, RowLevel level) {
                 levels[i] = level;
                 return weigh_row<Float32Product>(scores, nullptr, block.padded, level);
               });
    weigh_teacher(block, w.tile);
    for (int64_t i = 0; i < count; ++i) finish_loss(p, i, softmaxes.row(i));
    between.take(between.context);
    for (int64_t i = 0; i < count; ++i) {
      const DistilledRow row = softmaxes.row(i);
      const double factor = p.factors == nullptr ? 1 : double(p.factors[i]);
      share[i] = float(factor * row.share()), teacher_share[i] = float(factor * row.teacher_share());
    }
  }

  template <class Product>
  void score_teacher(Product product, const Block& block, const Panels& keys) {
    const int64_t count = p.teacher.rows, padded_rows = round_up(count, Product::kRowMultiple);
    for (int64_t i = 0; i < count; ++i)
      Packing<Product>::pack_row(p.teacher.query, i, p.teacher.width, p.teacher.scale[i] < 0, teacher.at(i));
    __builtin_memset(teacher.at(count), 0, size_t(4 * (padded_rows - count) * teacher.stride));
    if (!one_bank(p)) Packing<Product>::pack_block(teacher_keys, p.teacher.keys, 0, block.columns, block.padded);
    const Panels& panels = one_bank(p) ? keys : teacher_keys;
    score_rows(product, teacher.at(0), teacher.stride, padded_rows, panels, block.padded, teacher_scores.scores(0), teacher_scores.stride);
  }

  // The softmaxes' rows have the sign of their scale in the query; the pass's, which the keys' gradient is made of, have not.
  static void negate(float* scores, int64_t padded) {
    for (int64_t j = 0; j < padded; j += kLanes) store(scores + j, -load(scores + j));
  }

  void weigh_teacher(const Block& block, const Tile& student_scores) const {
    const int64_t count = p.teacher.rows;
    weigh_rows(softmaxes.teacher, terms, teacher_scores, p.teacher, 0, count, block, 0, count, Prefetch{},
               [&](int64_t i, float* scores, RowLevel level) {
                 const Excess excess{student_scores.scores(i), levels[i], {}};
                 return softmaxes.template weigh_teacher_row<Float32Product>(p, i, scores, scores, block.padded, level, excess);
               });
  }

  // 0 for equal sides
  void weigh(const Block& block, int64_t i, float* scores) const {
    const RowLevel level = levels[i];
    const float* const teacher_weights = teacher_scores.scores(i);
    const Vec ours = splat(share[i]), theirs = splat(teacher_share[i]);
    for (int64_t j = 0; j < block.padded; j += kPanel) {
      Vec e[kVecs];
      level.exponents_of(scores + j, e);
      exp_nonpositive(e, e);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const int64_t at = j + v * kLanes;
        store(scores + at, scaled(e[v], ours) - scaled(load(teacher_weights + at), theirs));
      }
    }
    if (p.table != nullptr) __builtin_memcpy(p.table + i * p.student.columns, scores, size_t(4 * block.columns));
  }
};

template <>
constexpr bool kKeepsScores<DistilledPairs> = true;

// All pairs at once.
struct KeptDistillation : PairGradientWorkspace {
  template <class Product>
  KeptDistillation(Product product, const PairParams& pairs, const PairSums& out, DistilledPairs& weights, Arena& arena)
      : PairGradientWorkspace(product, pairs, true, out.y_sums != nullptr, pairs.rows, pairs.columns, arena, round_up(pairs.columns, kPanel),
                              round_up(pairs.rows, kPairChunk<Product>)) {
    weights.plan(product, rows, block, arena);
  }
};

inline PairParams student_pairs(const DistillationParams& p) {
  const SimilarityParams& s = p.student;
  PairParams pairs{};
  pairs.precision = s.precision, pairs.batch = 1, pairs.rows = s.rows, pairs.columns = s.columns, pairs.width = s.width;
  pairs.x = s.query, pairs.y = s.keys, pairs.scale = s.scale;
  return pairs;
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

int64_t kept_distillation_workspace(const DistillationParams& p) {
  return scratch_words(p.student.precision, [&](auto product) {
    Arena arena{nullptr};
    DistilledPairs weights{p, kdfast::Step{}};
    KeptDistillation(product, student_pairs(p), {p.difference, p.dkeys, nullptr}, weights, arena);
    return arena.words;
  });
}

void kept_distillation(const DistillationParams& p, const kdfast::Step& between, float* workspace) {
  const SimilarityParams& t = p.teacher;
  PairParams pairs = student_pairs(p);
  const PairTask all{0, 0, pairs.rows, 0, pairs.columns};
  const PairSums out{p.difference, p.dkeys, nullptr};
  if (t.precision != Precision::kBFloat16 && !(all_finite(t.query, 0, t.rows, t.width) && all_finite(t.keys, 0, t.columns, t.width)))
    pairs.precision = Precision::kFloat32Vectors;  // which holds the teacher's operands too
  with_holding_product(pairs, all, [&](auto product) {
    Arena arena{workspace};
    DistilledPairs weights{p, between};
    KeptDistillation w(product, pairs, out, weights, arena);
    take_gradients(product, pairs, all, out, w, weights);
  });
}

}  // namespace
