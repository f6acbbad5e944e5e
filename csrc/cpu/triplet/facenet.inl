// For each positive of an anchor the nearest negative that is farther than it, else the farthest of all.
//
// The anchor's K' positives come first, so their closenesses are thresholds. Few of them: each block is looked through for each. Many: they are
// sorted, and a negative belongs to the one bin between two of them whose best it may become; a table of equal cells says where to begin. What is
// below a threshold and nearest to it is the best of its bin, or where that is empty of the next.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/extrema.inl"
#include "triplet/pairs.inl"

namespace {

constexpr int64_t kFewPositives = 48;  // up to which looking through a block costs less than a table lookup for each negative
constexpr int64_t kCells = 1024;       // of a table

struct Threshold {
  float closeness;
  int32_t number;  // of the positive
};

// Closeness in equal cells between two thresholds, monotone; 0 for NaN, where all thresholds are one.
struct Cells {
  float low, scale;

  Vec at(Vec closeness) const {
    const Vec cell = (closeness - splat(low)) * splat(scale), last = splat(float(kCells - 1));
    return cell > Vec{} ? (cell < last ? cell : last) : Vec{};
  }
  int64_t at(float closeness) const { return int64_t(at(splat(closeness))[0]); }
};

// Thresholds in descending order, and a table of how many are in higher cells than a cell.
struct ManyThresholds {
  Cells* cells;       // [rows]
  int32_t* above;     // [rows, kCells + 1]: entry c + 1 for cell c
  Threshold* copy;    // [each]

  void sort(int64_t i, Threshold* t, int64_t size) const {
    float low = t[0].closeness, high = low;
    for (int64_t k = 1; k < size; ++k) {
      low = t[k].closeness < low ? t[k].closeness : low;
      high = t[k].closeness > high ? t[k].closeness : high;
    }
    const Cells c = cells[i] = {low, float(kCells) / (high - low)};
    int32_t* const begin = above + i * (kCells + 1);  // where a cell's thresholds go
    __builtin_memset(begin, 0, (kCells + 1) * sizeof(int32_t));
    for (int64_t k = 0; k < size; ++k) ++begin[c.at(t[k].closeness)];
    int32_t higher = 0;
    for (int64_t cell = kCells; cell-- > 0;) {
      const int32_t here = begin[cell];
      begin[cell] = higher;
      higher += here;
    }
    __builtin_memcpy(copy, t, size_t(size) * sizeof(Threshold));
    for (int64_t k = 0; k < size; ++k) t[begin[c.at(copy[k].closeness)]++] = copy[k];  // which leaves them one cell further on
    for (int64_t k = 1; k < size; ++k) {
      const Threshold x = t[k];
      int64_t to = k;
      for (; to > 0 && t[to - 1].closeness < x.closeness; --to) t[to] = t[to - 1];
      t[to] = x;
    }
  }
};

struct FacenetVisitor {
  const PairsParams& p;
  Threshold* thresholds;  // [rows, each]
  Nearest* best;          // [rows, each]: below the threshold, and with many of them not below the next
  Farthest* farthest;     // [rows]
  PairFlags flags;
  ManyThresholds table;
  int64_t begin, count;

  int64_t anchor(int64_t i) const { return p.scan.sequence[begin + i]; }
  int64_t size(int64_t i) const { return smaller(p.scan.classes.count[anchor(i)], p.each); }
  bool many(int64_t i) const { return size(i) > kFewPositives; }

  void positives(int64_t i, int64_t at, const float* closeness, int64_t size) const {
    for (int64_t j = 0; j < size; ++j) {
      const bool is_nan = closeness[j] != closeness[j];
      if (is_nan) flags.positive[i] = true;
      const int64_t k = number_of_positive(p, anchor(i), at + j);
      if (k < p.each) thresholds[i * p.each + k] = {is_nan ? -kInfinity : closeness[j], int32_t(k)};
    }
  }

  void prepare(int64_t i) const {
    if (many(i)) table.sort(i, thresholds + i * p.each, size(i));
  }

  template <class Closeness>
  void negatives(int64_t i, const Block& block, const Closeness& c) const {
    farthest[i].look(block, c);
    const Threshold* const t = thresholds + i * p.each;
    Nearest* const found = best + i * p.each;
    if (many(i)) return to_bins(i, block, c, t, found);
    for (int64_t k = 0; k < size(i); ++k) found[k].look(block, c, t[k].closeness);
  }

  template <class Closeness>
  void to_bins(int64_t i, const Block& block, const Closeness& c, const Threshold* t, Nearest* found) const {
    const int64_t size = this->size(i);
    const int32_t* const above = table.above + i * (kCells + 1) + 1;
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      float x[kLanes], cell[kLanes];
      store(x, c.at(j)), store(cell, table.cells[i].at(c.at(j)));
      for (int lane = 0; lane < kLanes; ++lane) {
        int64_t k = above[int32_t(cell[lane])];
        while (k < size && t[k].closeness > x[lane]) ++k;
        if (k > 0 && x[lane] > found[k - 1].closeness) found[k - 1] = {x[lane], block.first + j + lane};
      }
    }
  }

  void unordered(int64_t i, int64_t) const { flags.negative[i] = true; }

  template <class Pass>
  void finish(const Pass&) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = anchor(i), found = size(i);
      int32_t* const negative = p.negative + row * p.each;
      for (int64_t k = found; k < p.each; ++k) negative[k] = -1;
      int64_t otherwise = farthest[i].column;
      for (int64_t k = found; k-- > 0;) {
        const int64_t own = best[i * p.each + k].column, column = own >= 0 ? own : otherwise;
        negative[thresholds[i * p.each + k].number] = int32_t(column);
        if (many(i)) otherwise = column;  // what is below this threshold is below those before it
      }
      p.unordered[row] = flags.unordered(i) && p.scan.classes.count[row] > 0 && (farthest[i].column >= 0 || flags.negative[i]);
    }
  }
};

inline auto facenet_visitor(const PairsParams& p) {
  return [&p](const ScanWorkspace& w, Arena& arena, int64_t begin, int64_t count) {
    const int64_t pairs = w.rows * p.each, tables = p.each > kFewPositives ? w.rows : 0;
    FacenetVisitor v{p, take<Threshold>(arena, pairs), take<Nearest>(arena, pairs), take<Farthest>(arena, w.rows), PairFlags(arena, w.rows),
                     {take<Cells>(arena, tables), take<int32_t>(arena, tables * (kCells + 1)), take<Threshold>(arena, p.each)}, begin, count};
    for (int64_t k = 0; k < count * p.each; ++k) v.best[k] = {};
    for (int64_t i = 0; i < count; ++i) v.farthest[i] = {};
    v.flags.clear(count);
    return v;
  };
}

// Tables of 4 KB an anchor stay in 2 MB too.
inline int64_t rows_for_thresholds(int64_t each) { return smaller(rows_for_pairs(each), each > kFewPositives ? 512 : INT64_MAX); }

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

int64_t triplet_facenet_workspace(const PairsParams& p, int64_t rows) {
  return scan_workspace(p.scan, rows, rows_for_thresholds(p.each), facenet_visitor(p));
}

// Anchors at positions begin .. end of the sequence.
void triplet_facenet(const PairsParams& p, int64_t begin, int64_t end, float* workspace) {
  scan(p.scan, begin, end, rows_for_thresholds(p.each), workspace, facenet_visitor(p));
}

}  // namespace
