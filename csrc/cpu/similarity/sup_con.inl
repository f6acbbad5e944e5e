// Statistics of the rows of a batch among each other: the log-sum-exp of the scores of a row's other candidates, and the sum of those of its class.
//
// The same scores enter both, to the bit: a loss of learnt rows is the small difference of the two.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "similarity/symmetric.inl"

namespace {

using kdfast::ClassStatistics;

struct ClassStatistic {
  const PairParams& p;
  const PairTask& task;
  const ClassStatistics& out;
  int64_t first;  // row, of the batch entry
  PairLabels own, classes;
  float* exists;  // of a block's columns: 1, and 0 for those that only fill the last vector

  void plan(int64_t block, Arena& arena) {
    own.halves.plan(block, arena), classes.halves.plan(block, arena);
    exists = arena.take(block);
  }

  void begin() const {
    for (int64_t i = 0; i < task.row_end - task.row_begin; ++i) {
      out.maximum[i] = -kInfinity;
      out.sum[i] = out.same_sum[i] = out.same_count[i] = 0;
    }
  }

  void begin_rows(int64_t row) { first = row; }

  void begin_block(const Block& block) {
    own.begin_block(p.y_labels + task.batch * p.columns, block);
    classes.begin_block(out.classes + task.batch * p.columns, block);
    for (int64_t j = 0; j < block.padded; ++j) exists[j] = j < block.columns;
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = first + row + i, of_task = at - task.row_begin;
      float* const scores = tile.scores(i);
      const float multiplier = multiplier_of(p.scale[task.batch * p.rows + at]), left_out = score_left_out(multiplier);
      own.leave_out(scores, block.padded, p.x_labels[task.batch * p.rows + at], 0);
      add_class(block, out.classes[task.batch * p.rows + at], scores, of_task);
      own.leave_out(scores, block.padded, p.x_labels[task.batch * p.rows + at], left_out);
      for (int64_t j = block.columns; j < block.padded; ++j) scores[j] = left_out;
      add_exponentials(block, splat(multiplier), scores, of_task);
    }
  }

  // The row itself adds 0 to the sum of its class, and 1 to its count.
  void add_class(const Block& block, int64_t label, const float* scores, int64_t at) const {
    Vec sum = {}, count = {};
    classes.for_equal(block.padded, label, [&](int64_t j, IntVec equal) {
      sum += equal ? load(scores + j) : Vec{};
      count += equal ? load(exists + j) : Vec{};
    });
    out.same_sum[at] += double(total(sum));
    out.same_count[at] += total(count);
  }

  void add_exponentials(const Block& block, Vec multiplier, const float* scores, int64_t at) const {
    Vec best = splat(-kInfinity), sum = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) best = larger(multiplier * load(scores + j), best);
    const float before = out.maximum[at], top = largest(best), after = top > before ? top : before;
    const float shift = after == -kInfinity ? 0 : after;
    for (int64_t j = 0; j < block.padded; j += kLanes) sum += exp_nonpositive(multiply_add(load(scores + j), multiplier, splat(-shift)));
    out.sum[at] = out.sum[at] * exp_nonpositive(splat(before - shift))[0] + total(sum);
    out.maximum[at] = after;
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

int64_t class_statistics_workspace(const PairParams& p, int64_t rows, int64_t columns) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    const PairWorkspace w(product, p, rows, columns, arena);
    ClassStatistic{p, PairTask{}, ClassStatistics{}}.plan(w.block, arena);
    return arena.words;
  });
}

void class_statistics(const PairParams& p, const PairTask& task, const ClassStatistics& out, float* workspace) {
  with_sound_product(p.precision, [&](auto product) {
    Arena arena{workspace};
    PairWorkspace w(product, p, task.row_end - task.row_begin, task.column_end - task.column_begin, arena);
    ClassStatistic statistic{p, task, out};
    statistic.plan(w.block, arena);
    statistic.begin();
    return take_statistics(product, p, task, w, statistic);
  });
}

}  // namespace
