// Statistics of the rows of a batch among each other: the log-sum-exp of the scores of a row's other candidates, and the sum of those of its class.
//
// The same scores enter both, to the bit: a loss of learnt rows is the small difference of the two. There the largest candidate is almost all of the
// sum, so that it is added to the others last, in double.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "matching/symmetric.inl"
#include "similarity/softmax.inl"

namespace {

using kdfast::BatchStatistic;

struct RowStatistics {
  const PairParams& p;
  const PairTask& task;
  const int64_t* row_classes;  // [batch, rows]; null: none
  BatchStatistic* out;
  int64_t first;  // row, of the batch entry
  PairLabels own, classes;
  float* exists;  // of a block's columns: 1, and 0 for those that only fill the last vector

  void plan(int64_t block, Arena& arena) {
    own.halves.plan(block, arena), classes.halves.plan(block, arena);
    exists = arena.take(block);
  }

  void begin() const {
    for (int64_t i = 0; i < task.row_end - task.row_begin; ++i) out[i] = BatchStatistic{};
  }

  void begin_rows(int64_t row) { first = row; }

  void begin_block(const Block& block) {
    own.begin_block(p.y_labels + task.batch * p.columns, block);
    if (row_classes != nullptr) classes.begin_block(row_classes + task.batch * p.columns, block);
    for (int64_t j = 0; j < block.padded; ++j) exists[j] = j < block.columns;
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = first + row + i, label = p.x_labels[task.batch * p.rows + at];
      float* const scores = tile.scores(i);
      BatchStatistic& s = out[at - task.row_begin];
      const float multiplier = multiplier_of(p.scale[task.batch * p.rows + at]), left_out = score_left_out(multiplier);
      if (row_classes != nullptr) {
        add_class(block, at, multiplier, scores, s);
      }
      own.leave_out(scores, block.padded, label, left_out);
      for (int64_t j = block.columns; j < block.padded; ++j) scores[j] = left_out;
      add_exponentials(block, multiplier, scores, s);
    }
  }

  // Scores of a class are summed relative to the largest of the block but the row's own, whose logit, as the exponentials have it, is then added
  // in double: else the sum of nearly equal ones would round as itself, not as their differences. The row's own score, made that one, adds 0 to
  // the sum, and 1 to the count.
  void add_class(const Block& block, int64_t at, float multiplier, float* scores, BatchStatistic& s) const {
    const int64_t label = p.x_labels[task.batch * p.rows + at];
    own.leave_out(scores, block.padded, label, -kInfinity);
    for (int64_t j = block.columns; j < block.padded; ++j) scores[j] = -kInfinity;
    const float largest = largest_score(scores, block.padded), base = largest - largest == 0 ? largest : 0;
    own.leave_out(scores, block.padded, label, base);
    Vec sum = {}, count = {};
    classes.for_equal(block.padded, row_classes[task.batch * p.rows + at], [&](int64_t j, IntVec equal) {
      const Vec there = equal ? load(exists + j) : Vec{};
      sum += there > Vec{} ? (load(scores + j) - splat(base)) * splat(multiplier) : Vec{};
      count += there;
    });
    const double others = double(total(count)) - (at >= block.first && at < block.first + block.columns);
    const Logits level = logits(splat(base), splat(multiplier));
    s.same_sum += double(total(sum)) + others * (double(level.high[0]) + double(level.low[0]));
    s.same_count += total(count);
  }

  static void add_exponentials(const Block& block, float multiplier, const float* scores, BatchStatistic& s) {
    const float sign = multiplier < 0 ? -1 : 1;
    Vec best0 = splat(-kInfinity), best1 = best0;
    for (int64_t j = 0; j < block.padded; j += 2 * kLanes) {
      best0 = larger(splat(sign) * load(scores + j), best0);
      best1 = larger(splat(sign) * load(scores + j + kLanes), best1);
    }
    const Vec factor = splat(multiplier), best = splat(sign * largest(larger(best0, best1)));
    const Logits before{splat(s.maximum), splat(s.low)}, after = larger(logits(best, factor), before);
    const Vec shift = finite_shift(after.high);
    Vec largest_ones = {}, others0 = {}, others1 = {};
    const auto add = [&](int64_t j, Vec& others) {
      const Vec x = exponent(load(scores + j), factor, shift, after.low);
      const IntVec is_largest = x == Vec{};
      largest_ones += is_largest ? splat(1) : Vec{};
      others += is_largest ? Vec{} : exp_nonpositive(x);
    };
    for (int64_t j = 0; j < block.padded; j += 2 * kLanes) add(j, others0), add(j + kLanes, others1);
    const float correction = exp_nonpositive(gap(before, {shift, after.low}))[0];
    s.sum = s.sum * double(correction) + double(total(largest_ones)) + double(total(others0 + others1));
    s.maximum = after.high[0], s.low = after.low[0];
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

int64_t row_statistics_workspace(const PairParams& p, int64_t rows, int64_t columns) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    const PairWorkspace w(product, p, rows, columns, arena);
    RowStatistics{p, PairTask{}, nullptr, nullptr}.plan(w.block, arena);
    return arena.words;
  });
}

void row_statistics(const PairParams& p, const PairTask& task, const int64_t* classes, BatchStatistic* out, float* workspace) {
  with_sound_product(p.precision, [&](auto product) {
    Arena arena{workspace};
    PairWorkspace w(product, p, task.row_end - task.row_begin, task.column_end - task.column_begin, arena);
    RowStatistics statistics{p, task, classes, out};
    statistics.plan(w.block, arena);
    statistics.begin();
    return take_statistics(product, p, task, w, statistics);
  });
}

}  // namespace
