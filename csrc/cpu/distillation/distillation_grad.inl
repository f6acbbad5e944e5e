// Gradient of the distillation loss in the student's bank: dk_j = sum_i g_i s_i (p^S_ij - p^T_ij) q_i.
//
// As in similarity_grad.inl keys are the rows and queries the columns, here with the scores of both sides at hand: their difference is one
// weight, so that rows of equal softmaxes cancel before they are summed.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "distillation/distillation.h"
#include "similarity/wide.inl"

namespace {

using kdfast::DistillationGradTask;
using kdfast::DistillationParams;

struct DistillationGradWorkspace {
  int64_t rows, block;
  Rows keys, teacher_keys;
  Sums dkeys;
  Streamed students, teachers;
  Tile tile, teacher_tile;
  KnownSoftmax softmax, teacher_softmax;

  template <class Product>
  DistillationGradWorkspace(Product product, const DistillationParams& p, int64_t row_count, Arena& arena) {
    const int64_t width = p.student.width, teacher_width = p.teacher.width;
    rows = rows_at_once<Product>(width + teacher_width / 2, row_count);
    block = streamed_columns<Product>(p.student.rows, p.student.width);
    keys.plan(product, rows, spaced<Product>(width), arena);
    teacher_keys.plan(product, rows, spaced<Product>(teacher_width), arena);
    dkeys.plan(rows, spaced<Product>(width), arena);
    plan_streamed(product, students, width, block, true, true, arena);
    plan_streamed(product, teachers, teacher_width, block, true, false, arena);
    students.matrix = p.student.query, teachers.matrix = p.teacher.query;
    tile.plan(product, rows, block, arena);
    teacher_tile.plan(product, rows, block, arena);
    softmax.plan(block, arena);
    teacher_softmax.plan(block, arena);
  }
};

// Up to rows_at_once keys, `first` .. `first + count`, through the queries.
template <class Product>
struct DistillationKeyPass {
  const DistillationParams& p;
  const DistillationGradTask& task;
  DistillationGradWorkspace& w;
  const int64_t first, count;

  bool run() const {
    const int64_t padded_rows = round_up(count, Product::kRowMultiple);
    bool sound = true;
    for (int64_t i = 0; i < padded_rows; ++i) {
      __builtin_memset(w.dkeys.at(i), 0, size_t(4 * w.dkeys.stride));
      sound &= pack_key(p.student, w.keys, i);
      sound &= pack_key(p.teacher, w.teacher_keys, i);
    }
    sound &= stream_blocks(Product{}, w.block, padded_rows, 0, p.student.rows, *this, w.students, w.teachers);
    const int64_t width = p.student.width;
    for (int64_t i = 0; i < count; ++i) __builtin_memcpy(task.dkeys + (first + i) * width, w.dkeys.at(i), size_t(4 * width));
    return sound;
  }

  bool pack_key(const SimilarityParams& side, const Rows& keys, int64_t i) const {
    if (i < count) return Packing<Product>::pack_row(side.keys, first + i, side.width, false, keys.at(i));
    __builtin_memset(keys.at(i), 0, size_t(4 * keys.stride));
    return true;
  }

  void begin_block(const Block& block) const {
    const int64_t n = p.student.rows;
    w.softmax.pack(p.student, task.g, task.log_sums, task.log_sums + n, 0, block);
    w.teacher_softmax.pack(p.teacher, task.g, task.log_sums + 2 * n, task.log_sums + 3 * n, 0, block);
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    score_rows(Product{}, w.teacher_keys.at(row), w.teacher_keys.stride, rows, w.teachers.panels, block.padded, w.teacher_tile.scores(0),
               w.teacher_tile.stride);
    score_rows(Product{}, w.keys.at(row), w.keys.stride, rows, w.students.panels, block.padded, w.tile.scores(0), w.tile.stride);
    weigh(block, row, rows, next);
    // dK += W Q
    sum_rows(Product{}, w.tile.weights(0), w.tile.stride, rows, block.columns, w.students.panels, AddTile{w.dkeys.at(row), w.dkeys.stride});
  }

  void weigh(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    const bool masked = has_terms(p.student);
    const int64_t end = smaller(row + rows, count);
    if (masked) {
      w.softmax.mask_rows(p.student, 0, first, block, row, end, w.tile);
      w.teacher_softmax.mask_rows(p.teacher, 0, first, block, row, end, w.teacher_tile);
    }
    for (int64_t i = row; i < row + rows; ++i) {
      next.fetch(i);
      float *const scores = w.tile.scores(i - row), *const teacher_scores = w.teacher_tile.scores(i - row);
      if (i >= end) {  // only fills the last tile
        __builtin_memset(w.tile.weights(i - row), 0, size_t(4 * Product::words(block.padded)));
        continue;
      }
      // Against a query that does not exist a key that holds inf scored NaN.
      const size_t beyond = size_t(4 * (block.padded - block.columns));
      __builtin_memset(scores + block.columns, 0, beyond);
      __builtin_memset(teacher_scores + block.columns, 0, beyond);
      if (masked) {
        weigh_row<true>(scores, teacher_scores, w.tile.weights(i - row), block.padded);
      } else {
        weigh_row<false>(scores, teacher_scores, w.tile.weights(i - row), block.padded);
      }
    }
  }

  // Weights g s (p^S - p^T) of a key's scores, or with `kLogits` of logits.
  template <bool kLogits>
  void weigh_row(const float* scores, const float* teacher_scores, float* weights, int64_t padded) const {
    const KnownSoftmax student = w.softmax, teacher = w.teacher_softmax;
    for (int64_t j = 0; j < padded; j += kPanel) {
      Vec p[kVecs], p_teacher[kVecs];
      student.template probabilities<kLogits>(scores, j, p);
      teacher.template probabilities<kLogits>(teacher_scores, j, p_teacher);
      const auto weight = [&](int v) { return load(student.factor + j + v * kLanes) * (p[v] - p_teacher[v]); };
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; v += 2) Packing<Product>::store_weights(weights, j + v * kLanes, weight(v), weight(v + 1));
    }
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `keys` keys.
int64_t distillation_grad_workspace(const DistillationParams& p, int64_t keys) {
  return streaming_words(wider_side(p), [&](auto product) {
    Arena arena{nullptr};
    DistillationGradWorkspace(product, p, keys, arena);
    return arena.words;
  });
}

void distillation_grad(const DistillationParams& p, const DistillationGradTask& task, float* workspace) {
  with_streaming_product(wider_side(p), [&](auto product) {
    using Product = typename decltype(product)::Swapped;
    Arena arena{workspace};
    DistillationGradWorkspace w(Product{}, p, task.key_end - task.key_begin, arena);
    [[maybe_unused]] typename Product::Session session;
    bool sound = true;
    for (int64_t key = task.key_begin; key < task.key_end; key += w.rows)
      sound &= DistillationKeyPass<Product>{p, task, w, key, smaller(w.rows, task.key_end - key)}.run();
    return sound;
  });
}

}  // namespace
