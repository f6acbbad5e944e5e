// For each positive of an anchor the nearest negative that is farther than it, else the farthest of all.
//
// The anchor's K' positives come first, so their closenesses are thresholds. Few of them: each block is looked through for each. Many: they are
// sorted, and a negative's rank among them is the one bin between two of them whose best it may become. What is below a threshold and nearest to
// it is the best of its bin, or where that is empty of the next.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/extrema.inl"
#include "triplet/pairs.inl"
#include "triplet/ranks.inl"

namespace {

constexpr int64_t kFewPositives = 48;  // up to which looking through a block costs less than a search for each negative

// The bins between an anchor's thresholds, lowest first: what is above all of them competes for nothing.
struct Bins {
  RankTree thresholds;
  float* closeness;  // [2^depth]: the best of each bin
  int32_t* column;   // -1: none

  void empty(int64_t size) const {
    for (int64_t r = 0; r < int64_t(1) << thresholds.depth; ++r) closeness[r] = r < size ? -kInfinity : kInfinity, column[r] = -1;
  }

  // Of the columns from `first` on.
  void put(IntVec bin, Vec x, int64_t first) const {
#if KDFAST_LANES == 16
    uint32_t better = _mm512_cmp_ps_mask((__m512)x, _mm512_i32gather_ps((__m512i)bin, closeness, 4), _CMP_GT_OQ);
#else
    uint32_t better = kAllLanes;
#endif
    for (; better != 0; better &= better - 1) {
      const int lane = __builtin_ctz(better);
      if (x[lane] > closeness[bin[lane]]) closeness[bin[lane]] = x[lane], column[bin[lane]] = int32_t(first + lane);
    }
  }

  // Afterwards a bin's column is what is nearest below its upper threshold, or `otherwise`.
  void resolve(int64_t size, int64_t otherwise) const {
    for (int64_t r = 0; r < size; ++r) {
      if (column[r] < 0) column[r] = int32_t(otherwise);
      otherwise = column[r];
    }
  }
};

struct FacenetVisitor {
  const PairsParams& p;
  float* thresholds;  // [rows, each]
  Nearest* best;      // [rows, each]: below the threshold, of few
  Farthest* farthest; // [rows]
  PairFlags flags;
  int depth;
  float *trees, *best_of_bin;  // [rows, 2^depth], of many
  int32_t* column_of_bin;
  float* sorted;      // [2^depth]
  int64_t begin, count;

  int64_t anchor(int64_t i) const { return p.scan.sequence[begin + i]; }
  int64_t size(int64_t i) const { return smaller(p.scan.classes.count[anchor(i)], p.each); }
  bool many(int64_t i) const { return size(i) > kFewPositives; }
  Bins bins(int64_t i) const { return {{trees + (i << depth), depth}, best_of_bin + (i << depth), column_of_bin + (i << depth)}; }

  void positives(int64_t i, int64_t at, const float* closeness, const float*, int64_t size) const {
    for (int64_t j = 0; j < size; ++j) {
      const bool is_nan = closeness[j] != closeness[j];
      if (is_nan) flags.positive[i] = true;
      const int64_t k = number_of_positive(p, anchor(i), at + j);
      if (k < p.each) thresholds[i * p.each + k] = is_nan ? -kInfinity : closeness[j];
    }
  }

  void prepare(int64_t i) const {
    if (!many(i)) return;
    for (int64_t k = 0; k < int64_t(1) << depth; ++k) sorted[k] = k < size(i) ? thresholds[i * p.each + k] : kInfinity;
    sort(sorted, int64_t(1) << depth);
    grow_tree(sorted, depth, trees + (i << depth));
    bins(i).empty(size(i));
  }

  template <class Closeness>
  void negatives(int64_t i, const Block& block, const Closeness& c) const {
    farthest[i].look(block, c);
    if (many(i)) return to_bins(bins(i), block, c);
    for (int64_t k = 0; k < size(i); ++k) best[i * p.each + k].look(block, c, thresholds[i * p.each + k]);
  }

  template <class Closeness>
  static void to_bins(const Bins& bins, const Block& block, const Closeness& c) {
    for (int64_t j = 0; j < block.padded; j += kAtOnce * kLanes) {
      Vec x[kAtOnce];
      IntVec bin[kAtOnce];
      for (int a = 0; a < kAtOnce; ++a) x[a] = c.at(j + a * kLanes);
      bins.thresholds.ranks(x, bin);
      for (int a = 0; a < kAtOnce; ++a) bins.put(bin[a], x[a], block.first + j + a * kLanes);
    }
  }

  void unordered(int64_t i, int64_t) const { flags.negative[i] = true; }

  template <class Pass>
  void finish(const Pass&) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = anchor(i), found = size(i);
      int32_t* const negative = p.negative + row * p.each;
      for (int64_t k = found; k < p.each; ++k) negative[k] = -1;
      if (many(i)) {
        bins(i).resolve(found, farthest[i].column);
        for (int64_t k = 0; k < found; k += kAtOnce * kLanes) from_bins(bins(i), thresholds + i * p.each, k, found, negative);
      } else {
        for (int64_t k = 0; k < found; ++k) {
          const int64_t column = best[i * p.each + k].column;
          negative[k] = int32_t(column >= 0 ? column : farthest[i].column);
        }
      }
      p.unordered[row] = flags.unordered(i) && p.scan.classes.count[row] > 0 && (farthest[i].column >= 0 || flags.negative[i]);
    }
  }

  // Of the positives from number `first` on: the bins below their thresholds. Equal thresholds have nothing between them.
  static void from_bins(const Bins& bins, const float* thresholds, int64_t first, int64_t size, int32_t* negative) {
    Vec x[kAtOnce];
    IntVec rank[kAtOnce];
    for (int a = 0; a < kAtOnce; ++a) x[a] = load_row(thresholds, first + a * kLanes, size);
    bins.thresholds.ranks(x, rank);
    for (int64_t k = first; k < smaller(first + kAtOnce * kLanes, size); ++k)
      negative[k] = bins.column[rank[(k - first) / kLanes][(k - first) % kLanes] - 1];
  }
};

inline auto facenet_visitor(const PairsParams& p) {
  return [&p](const ScanWorkspace& w, Arena& arena, int64_t begin, int64_t count) {
    const int depth = depth_for(p.each);
    const int64_t pairs = w.rows * p.each, bins = p.each > kFewPositives ? w.rows << depth : 0;
    FacenetVisitor v{p, arena.take(pairs), take<Nearest>(arena, pairs), take<Farthest>(arena, w.rows), PairFlags(arena, w.rows), depth,
                     arena.take(bins), arena.take(bins), take<int32_t>(arena, bins), arena.take(int64_t(1) << depth), begin, count};
    for (int64_t k = 0; k < count * p.each; ++k) v.best[k] = {};
    for (int64_t i = 0; i < count; ++i) v.farthest[i] = {};
    v.flags.clear(count);
    return v;
  };
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

int64_t triplet_facenet_workspace(const PairsParams& p, int64_t rows) {
  return scan_workspace(p.scan, rows, rows_for_pairs(p.each), facenet_visitor(p));
}

// Anchors at positions begin .. end of the sequence.
void triplet_facenet(const PairsParams& p, int64_t begin, int64_t end, float* workspace) {
  scan(p.scan, begin, end, rows_for_pairs(p.each), workspace, facenet_visitor(p));
}

}  // namespace
