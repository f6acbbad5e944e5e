// For each positive of an anchor a negative drawn with probability proportional to a weight of its distance.
//
// With s = d^2 the weight d^(2 - D) (1 - d^2 / 4)^((3 - D) / 2) is s^(-1/2) (s (1 - s / 4))^((3 - D) / 2), taken in logarithms. It spans hundreds
// of orders of magnitude, so each block of 128 columns is summed relative to its own largest weight, and blocks are added up in double
// relative to the anchor's. A draw inverts a uniform number keyed by (seed, anchor, positive): first the block is found among the sums, then, as
// these blocks pass by once more for the anchors that drew from them, the column. Scores have the same bits both times.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/random.h"
#include "engine/vector_math.h"
#include "triplet/pairs.inl"

namespace {

using kdfast::WeightedParams;

// A block's weights: their sum relative to the largest, 2^level.
struct BlockMass {
  float sum, level;
};

// A draw that falls so far into its block, in units of its sum, and the anchor's next draw from that block; -1: none.
struct Draw {
  double rest;
  int64_t next;
};

// How many of the ascending `at` come before the first for which past(it). Without a branch: where it leads is anybody's guess.
template <class T, class Past>
inline int64_t bisect(const T* at, int64_t size, const Past& past) {
  if (size == 0) return 0;
  int64_t low = 0;
  for (int64_t half; size > 1; size -= half) {
    half = size / 2;
    low += half & -int64_t(!past(at[low + half - 1]));
  }
  return low + !past(at[low]);
}

// How many cumulative weights are not above x.
inline int64_t not_above(const double* cumulative, int64_t size, double x) {
  return bisect(cumulative, size, [&](double sum) { return sum > x; });
}

struct WeightedVisitor {
  const WeightedParams& p;
  const ScanWorkspace& w;
  BlockMass* masses;  // [rows, blocks]
  int32_t* drawn;     // [rows, blocks]: the first draw from a block; -1: none
  Draw* draws;        // [rows, each]
  double* units;      // [blocks]: of an anchor, what its sum counts
  double* cumulative; // [blocks], or of a block
  float* gathered;    // packed rows
  PairFlags flags;
  int64_t blocks, begin, count;
  bool drawing = false;

  int64_t each() const { return p.pairs.each; }
  int64_t anchor(int64_t i) const { return p.pairs.scan.sequence[begin + i]; }
  int64_t size(int64_t i) const { return smaller(p.pairs.scan.classes.count[anchor(i)], each()); }

  void positives(int64_t i, int64_t, const float* closeness, const float*, int64_t size) const {
    for (int64_t k = 0; k < size; ++k) flags.positive[i] |= closeness[k] != closeness[k];
  }
  void prepare(int64_t) const {}
  void unordered(int64_t i, int64_t) const { flags.negative[i] = true; }

  template <class Closeness>
  void negatives(int64_t i, const Block& block, const Closeness& c) const {
    float levels[kSampled];
    for (int64_t j = 0; j < block.padded; j += kSampled) {
      const int64_t columns = smaller(kSampled, block.padded - j), at = (block.first + j) / kSampled;
      if (!drawing) {
        const float top = weigh(i, c, j, columns, levels);
        Vec sum = {};
        for (int64_t k = 0; k < columns && top > -kInfinity; k += kLanes) sum += exp2_nonpositive(load(levels + k) - splat(top));
        masses[i * blocks + at] = {total(sum), top};
      } else if (drawn[i * blocks + at] >= 0) {
        find(i, at, columns, levels, weigh(i, c, j, columns, levels));
      }
    }
  }

  // log2 of the weights of columns j and on, -inf where not eligible; returns the largest.
  template <class Closeness>
  float weigh(int64_t i, const Closeness& c, int64_t j, int64_t columns, float* levels) const {
    const bool cosine = p.pairs.scan.metric == Metric::kCosine;
    const Vec base = splat(cosine ? 2.0f : w.base[i]), factor = splat(cosine ? -2.0f : -1.0f), power = splat(float(3 - p.pairs.scan.x.width) / 2);
    Vec top = splat(-kInfinity);
    for (int64_t k = 0; k < columns; k += kLanes) {
      const Vec square = multiply_add(factor, c.at(j + k), base);
      const IntVec eligible = (square > splat(p.low)) & (square < splat(p.high));
      const Vec s = eligible ? larger(square, splat(p.least)) : splat(1.0f);
      const Vec level = multiply_add(power, log2<float>(s * (splat(1.0f) - s * splat(0.25f))), splat(-0.5f) * log2<float>(s));
      const Vec known = eligible ? level : splat(-kInfinity);
      store(levels + k, known);
      top = larger(known, top);
    }
    return largest(top);
  }

  // The anchor's draws from block `at`, whose weights have the logarithms `levels`: the first column whose cumulative weight exceeds the rest.
  void find(int64_t i, int64_t at, int64_t columns, float* levels, float top) const {
    for (int64_t k = 0; k < columns; k += kLanes) store(levels + k, exp2_nonpositive(load(levels + k) - splat(top)));
    double sum = 0;
    int64_t weighty = 0;  // columns up to the last with a weight
    for (int64_t k = 0; k < columns; ++k) {
      cumulative[k] = sum += levels[k];
      if (levels[k] > 0) weighty = k + 1;
    }
    const Draw* const own = draws + i * each();
    for (int64_t k = drawn[i * blocks + at]; k >= 0; k = own[k].next) {
      const int64_t column = smaller(not_above(cumulative, weighty, own[k].rest), weighty - 1);
      p.pairs.negative[anchor(i) * each() + k] = int32_t(at * kSampled + column);
    }
  }

  template <class Pass>
  void finish(const Pass& pass) {
    for (int64_t i = 0; i < count; ++i) draw(i);
    drawing = true;
    pass.again(gathered, [&](int64_t i, const Block& block) {
      bool any = false;
      for (int64_t b = block.first / kSampled; b * kSampled < block.first + block.columns; ++b) any |= drawn[i * blocks + b] >= 0;
      return any;
    });
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = anchor(i);
      p.pairs.unordered[row] =
          flags.unordered(i) && p.pairs.scan.classes.count[row] > 0 && (negatives_before(row, p.pairs.scan.classes.columns) > 0);
    }
  }

  // The block of each of the anchor's draws, or the column itself where all negatives weigh the same.
  void draw(int64_t i) const {
    const BlockMass* const mass = masses + i * blocks;
    const int64_t row = anchor(i);
    int32_t* const negative = p.pairs.negative + row * each();
    for (int64_t k = 0; k < each(); ++k) negative[k] = -1;
    for (int64_t b = 0; b < blocks; ++b) drawn[i * blocks + b] = -1;
    float top = -kInfinity;
    for (int64_t b = 0; b < blocks; ++b) top = mass[b].level > top ? mass[b].level : top;
    if (top == -kInfinity) {
      if (p.fallback) draw_evenly(row, size(i), negative);
      return;
    }
    double sum = 0;
    int64_t weighty = 0;  // blocks up to the last with a weight
    for (int64_t b = 0; b < blocks; ++b) {
      units[b] = mass[b].sum > 0 ? __builtin_exp2(double(mass[b].level) - double(top)) : 0;
      cumulative[b] = sum += mass[b].sum * units[b];
      if (units[b] > 0) weighty = b + 1;
    }
    for (int64_t k = 0; k < size(i); ++k) {
      const double target = uniform(p.seed, row, column_of_positive(p.pairs, row, k)) * sum;
      const int64_t b = smaller(not_above(cumulative, weighty, target), weighty - 1);
      draws[i * each() + k] = {(target - (b > 0 ? cumulative[b - 1] : 0)) / units[b], drawn[i * blocks + b]};
      drawn[i * blocks + b] = int32_t(k);
    }
  }

  void draw_evenly(int64_t row, int64_t size, int32_t* negative) const {
    const int64_t all = negatives_before(row, p.pairs.scan.classes.columns);
    for (int64_t k = 0; k < size && all > 0; ++k) {
      const double u = uniform(p.seed, row, column_of_positive(p.pairs, row, k));
      negative[k] = int32_t(negative_number(row, smaller(int64_t(u * double(all)), all - 1)));
    }
  }

  // The anchor's negatives among the columns before `column`.
  int64_t negatives_before(int64_t row, int64_t column) const {
    const auto& c = p.pairs.scan.classes;
    const int64_t first = c.first[row], end = first + c.size(row), own = c.own[row];
    const bool own_apart = own >= 0 && own < column && c.skip[row] >= c.columns && c.exists[own];
    const auto before = [&](int64_t from, int64_t to) {
      return bisect(c.order + from, to - from, [&](int64_t other) { return other >= column; });
    };
    return column - before(first, end) - before(p.existing, c.columns) - own_apart;
  }

  // The column of the anchor's negative number `number`: as far on as there are other columns up to it.
  int64_t negative_number(int64_t row, int64_t number) const {
    int64_t column = number;
    for (int64_t missing; (missing = number + 1 - negatives_before(row, column + 1)) > 0;) column += missing;
    return column;
  }
};

inline auto weighted_visitor(const WeightedParams& p) {
  return [&p](const ScanWorkspace& w, Arena& arena, int64_t begin, int64_t count) {
    const int64_t blocks = (p.pairs.scan.classes.columns + kSampled - 1) / kSampled;
    WeightedVisitor v{p,
                      w,
                      take<BlockMass>(arena, w.rows * blocks),
                      take<int32_t>(arena, w.rows * blocks),
                      take<Draw>(arena, w.rows * p.pairs.each),
                      take<double>(arena, blocks),
                      take<double>(arena, blocks > kSampled ? blocks : kSampled),
                      arena.take(w.class_rows * w.x.stride),
                      PairFlags(arena, w.rows),
                      blocks,
                      begin,
                      count};
    v.flags.clear(count);
    return v;
  };
}

inline int64_t rows_for_weights(const WeightedParams& p) {
  return smaller(rows_for_pairs(p.pairs.each), (int64_t(1) << 26) / (p.pairs.scan.classes.columns + 1));
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

int64_t triplet_weighted_workspace(const WeightedParams& p, int64_t rows) {
  return scan_workspace(p.pairs.scan, rows, rows_for_weights(p), weighted_visitor(p));
}

// Anchors at positions begin .. end of the sequence.
void triplet_weighted(const WeightedParams& p, int64_t begin, int64_t end, float* workspace) {
  scan(p.pairs.scan, begin, end, rows_for_weights(p), workspace, weighted_visitor(p));
}

}  // namespace
