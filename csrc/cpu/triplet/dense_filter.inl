// Multi-similarity mining's filter where windows of many positives are to be sorted by it: the nearest negative of each row, and how many negatives pass,
// d - epsilon < farthest positive.
//
// In batch a distance serves both its rows: a row goes through its own block of columns and those beyond, and in the latter it is a negative of
// the columns, too.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/dense_positives.inl"

namespace {

using kdfast::HingeFilter;

// Whether a block has no negative of `rows` rows from `row` on: a class takes up whole blocks where it is large.
inline bool no_negatives(const DenseParams& p, const Block& block, int64_t row, int64_t rows) {
  for (int64_t i = row; i < row + rows; ++i)
    if (p.first[i] > block.first || p.last[i] < block.first + block.columns) return false;
  return true;
}

struct FilterStatistic {
  const DenseParams& p;
  float epsilon;
  const HingeFilter& out;
  int64_t first = 0;
  float* kept = nullptr;  // [columns and a panel]: rows that pass the column's filter

  void plan(Arena& arena) { kept = arena.take(p.pairs.columns + kPanel); }
  void begin() const { __builtin_memset(kept, 0, size_t(4 * (p.pairs.columns + kPanel))); }
  void begin_rows(int64_t row) { first = row; }
  void begin_block(const Block&) const {}

  bool passed(const Block& block, int64_t row) const { return p.symmetric && row >= block.first + block.columns; }
  bool idle(const Block& block, int64_t row, int64_t rows) const {
    return passed(block, first + row) || no_negatives(p, block, first + row, rows);
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    for (int64_t i = 0; i < rows; ++i) {
      if (passed(block, first + row + i)) continue;
      with_metric(p.metric, [&](auto metric) {
        constexpr Metric kMetric = decltype(metric)::kValue;
        p.symmetric && first + row + i < block.first ? take<kMetric, true>(block, first + row + i, tile.scores(i))
                                                    : take<kMetric, false>(block, first + row + i, tile.scores(i));
      });
    }
  }

  // kBoth: for the columns as well.
  template <Metric kMetric, bool kBoth>
  void take(const Block& block, int64_t row, const float* scores) const {
    const LeftOut left_out(p, block, row);
    const bool leaves_out = left_out.any(block);
    const Vec x_square = splat(p.x_square[row]), limit = splat(p.farthest[row] + epsilon), one = splat(1.0f);
    float *const nearest = out.nearest + block.first, *const passing = kept + block.first;
    Vec least = splat(kInfinity), number = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      Vec factor, d = distance_from<kMetric>(load(scores + j), x_square, load(p.y_square + block.first + j), &factor);
      if (leaves_out) d = left_out.at(j) ? splat(kInfinity) : d;
      least = lesser(d, least);
      number = add_where(below(d, limit), number, one);
      if constexpr (kBoth) {
        store(nearest + j, lesser(d, load(nearest + j)));
        store(passing + j, add_where(below(d, load(p.farthest + block.first + j) + splat(epsilon)), load(passing + j), one));
      }
    }
    const float here = -largest(-least);
    if (here < out.nearest[row]) out.nearest[row] = here;
    out.kept[row] += int64_t(wide_total(number));
  }

  void finish() const {
    for (int64_t j = 0; j < p.columns && p.symmetric; ++j) out.kept[j] += int64_t(kept[j]);
  }
};

template <>
constexpr bool kSkipsChunks<FilterStatistic> = true;

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

int64_t hinge_filter_workspace(const DenseParams& p, int64_t rows) {
  return scratch_words(p.pairs.precision, [&](auto product) {
    Arena arena{nullptr};
    PairWorkspace(product, p.pairs, rows, p.columns, arena);
    FilterStatistic{p, 0, HingeFilter{}}.plan(arena);
    return arena.words;
  });
}

// Adds what rows begin .. end find to `out`.
void hinge_filter(const DenseParams& p, const HingeRule& rule, const HingeFilter& out, int64_t begin, int64_t end, float* workspace) {
  const PairTask task{0, begin, end, 0, p.columns};
  FilterStatistic statistic{p, rule.epsilon, out};
  with_product(p.pairs.precision, [&](auto product) {  // which holds all rows
    Arena arena{workspace};
    PairWorkspace w(product, p.pairs, end - begin, p.columns, arena);
    statistic.plan(arena);
    statistic.begin();
    take_statistics(product, p.pairs, task, w, statistic);
  });
  statistic.finish();
}

}  // namespace
