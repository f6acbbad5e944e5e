// Farthest and nearest positive and nearest negative of each anchor from products of bf16, exactly.
//
// The closeness 2 x.y - |y|^2 from rows rounded to 8 bits is within E = u (|x|^2 + |y|^2) >= 2 u |x| |y|, u = 2^-8 and a little for sums of floats. The
// best of all is among those whose score + E reaches the largest score - E: these candidates, seldom more than two or three, are measured from
// the rows themselves. An anchor with more than there is room for, as among rows that nearly coincide, or whose rows are not finite or so small
// that products vanish, is scanned once more with float products.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/extrema.inl"

namespace {

// The candidates for the largest of numbers known to within an error.
struct Contest {
  static constexpr int kRoom = 16;

  float least = -kInfinity;  // the largest is not below it
  int size = 0;
  bool full = false;
  float most[kRoom];         // each is not above it
  int32_t column[kRoom];

  bool admits(float x, float error) const { return x + error >= least; }
  void raise(float x, float error) { least = x - error > least ? x - error : least; }
  void enter(float x, float error, int64_t of_column) {
    if (!admits(x, error)) return;
    raise(x, error);
    if (size == kRoom) drop();
    if (size == kRoom) {
      full = true;
      return;
    }
    most[size] = x + error, column[size++] = int32_t(of_column);
  }
  // Lanes at(j), j < end, each within `error`, of columns column_of(j).
  template <class At, class Columns>
  void enter_all(int64_t end, const At& at, float error, const Columns& column_of) {
    Vec best = splat(-kInfinity);
    for (int64_t j = 0; j < end; j += kLanes) best = larger(at(j), best);
    const float here = largest(best);
    if (here == -kInfinity || !admits(here, error)) return;
    raise(here, error);
    const Vec enough = splat(least - error);
    for (int64_t j = 0; j < end; j += kLanes) {
      const Vec x = at(j);
      for (uint32_t lanes = lanes_at_least(x, enough); lanes != 0; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        enter(x[lane], error, column_of(j + lane));
      }
    }
  }
  void drop() {
    int kept = 0;
    for (int k = 0; k < size; ++k)
      if (most[k] >= least) most[kept] = most[k], column[kept++] = column[k];
    size = kept;
  }
};

struct CoarseExtremes {
  Contest far_positive, near_positive, near_negative;  // the first of minus the closeness
  bool lost;                                           // to be scanned with float products
};

// What is scanned once more: anchors, in the order of the sequence.
struct Again {
  int64_t* anchors;
  int64_t count;
};

struct CoarseVisitor {
  const ExtremaParams& p;
  const ScanWorkspace& w;
  CoarseExtremes* found;
  Again* again;
  int64_t begin, count;
  int64_t longest_of = -1;  // the block of which `longest` is the greatest |y|^2
  float longest = 0;

  int64_t anchor(int64_t i) const { return p.scan.sequence[begin + i]; }

  // E of an anchor and a reference of this |y|^2.
  float error(int64_t i, float y_square) const {
    const float u = 0x1p-8f + 0x1p-15f + float(p.scan.x.width + 64) * 0x1p-23f;
    return u * (p.scan.metric == Metric::kCosine ? 1 : w.base[i] + y_square);
  }
  // Smaller products may be lost below the least float.
  static bool holds(float error) { return error > 0x1p-90f && error < 0x1p100f; }

  void positives(int64_t i, int64_t at, const float* closeness, const float* offset, int64_t size) const {
    CoarseExtremes& e = found[i];
    const int64_t* const columns = p.scan.classes.order + p.scan.classes.first[anchor(i)] + at;
    if (size >= kLanes) return many_positives(e, i, closeness, offset, size, columns);
    for (int64_t k = 0; k < size; ++k) {
      const float bound = error(i, offset[k]), c = closeness[k];
      if (!holds(bound)) e.lost = true;
      e.near_positive.enter(c, bound, columns[k]);
      e.far_positive.enter(-c, bound, columns[k]);
    }
  }
  void many_positives(CoarseExtremes& e, int64_t i, const float* closeness, const float* offset, int64_t size, const int64_t* columns) const {
    // the last vector begins so that it ends with them: what is entered twice is measured twice
    const auto from = [size](int64_t k) { return smaller(k, size - kLanes); };
    Vec most = splat(-kInfinity), least = splat(kInfinity), rest = {};
    for (int64_t k = 0; k < size; k += kLanes) {
      const Vec y_square = load(offset + from(k));
      most = larger(y_square, most), least = lesser(y_square, least), rest += y_square - y_square;
    }
    const float bound = error(i, largest(most));
    if (!holds(bound) || !holds(error(i, -largest(-least))) || !(total(rest) == 0)) e.lost = true;
    const auto column_of = [&](int64_t k) { return columns[from(k - k % kLanes) + k % kLanes]; };
    e.near_positive.enter_all(size, [&](int64_t k) { return load(closeness + from(k)); }, bound, column_of);
    e.far_positive.enter_all(size, [&](int64_t k) { return -load(closeness + from(k)); }, bound, column_of);
  }
  void prepare(int64_t i) const {
    if (!finite(w.base[i])) found[i].lost = true;
  }
  void unordered(int64_t i, int64_t) const { found[i].lost = true; }

  template <class Closeness>
  void negatives(int64_t i, const Block& block, const Closeness& c) {
    CoarseExtremes& e = found[i];
    if (c.offset == w.zeros) e.lost = true;  // something is not finite
    if (e.lost) return;
    measure(block);
    const float bound = error(i, longest);
    if (!holds(bound)) {
      e.lost = true;
      return;
    }
    e.near_negative.enter_all(block.padded, [&](int64_t j) { return c.at(j); }, bound, [&](int64_t j) { return block.first + j; });
  }

  void measure(const Block& block) {
    if (longest_of == block.first) return;
    longest_of = block.first, longest = 0;
    for (int64_t j = 0; j < block.columns; ++j)
      if (w.offset[j] < kInfinity && w.offset[j] > longest) longest = w.offset[j];
  }

  template <class Pass>
  void finish(const Pass&) const {
    for (int64_t i = 0; i < count; ++i) {
      const CoarseExtremes& e = found[i];
      const int64_t row = anchor(i);
      if (e.lost || e.far_positive.full || e.near_positive.full || e.near_negative.full) {
        again->anchors[again->count++] = row;
        continue;
      }
      prepare_row(p.scan.x, row, p.scan.metric == Metric::kCosine ? 1 : 2, w.prepared);
      p.farthest_positive[row] = best(e.far_positive, -1), p.nearest_positive[row] = best(e.near_positive, 1);
      p.nearest_negative[row] = best(e.near_negative, 1), p.most_distant_negative[row] = -1;
      p.unordered[row] = false;
    }
  }

  // The column whose sign closeness to the prepared row is the largest, of equal ones the lowest; -1: none.
  int64_t best(const Contest& contest, float sign) const {
    const int64_t width = p.scan.x.width;
    float* const y = w.prepared + width;
    float most = 0;
    int64_t at = -1;
    for (int k = 0; k < contest.size; ++k) {
      if (contest.most[k] < contest.least) continue;
      const int64_t column = contest.column[k];
      if (contest.size == 1) return column;
      const float square = prepare_row(p.scan.y, column, 1, y);
      Vec sum = {};
      for (int64_t d = 0; d < width; d += kLanes) sum = multiply_add(load_row(w.prepared, d, width), load_row(y, d, width), sum);
      const float x = sign * (total(sum) - (p.scan.metric == Metric::kCosine ? 0 : square));
      if (at < 0 || x > most || (x == most && column < at)) most = x, at = column;
    }
    return at;
  }
};

// For a task whose first position in the sequence is `task`.
inline auto coarse_visitor(const ExtremaParams& p, int64_t task, Again* again) {
  return [&p, task, again](const ScanWorkspace& w, Arena& arena, int64_t begin, int64_t count) {
    if (begin == task) again->count = 0;
    auto* const found = reinterpret_cast<CoarseExtremes*>(arena.take((w.rows * int64_t(sizeof(CoarseExtremes)) + 3) / 4));
    for (int64_t i = 0; i < count; ++i) {
      CoarseExtremes& e = found[i];
      Contest* const contests[] = {&e.far_positive, &e.near_positive, &e.near_negative};
      for (Contest* c : contests) c->least = -kInfinity, c->size = 0, c->full = false;
      e.lost = false;
    }
    return CoarseVisitor{p, w, found, again, begin, count};
  };
}

// Whether products of bf16 are of use and wanted: they are faster than floats', and what is nearest of all is asked for.
inline bool coarsely(const ExtremaParams& p) {
#if defined(KDFAST_TILE_INSTRUCTIONS) || defined(KDFAST_BF16_INSTRUCTIONS)
  return p.scan.precision == Precision::kBFloat16 && !p.beyond_farthest && !p.beyond_nearest && !p.farthest_negative;
#else
  (void)p;
  return false;
#endif
}

inline ExtremaParams in_floats(const ExtremaParams& p) {
  ExtremaParams floats = p;
  floats.scan.precision = Precision::kFloat32;
  return floats;
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

int64_t triplet_extrema_workspace(const ExtremaParams& p, int64_t rows) {
  const ExtremaParams floats = in_floats(p);
  const int64_t plain = scan_workspace(floats.scan, rows, rows, extrema_visitor(floats));
  if (!coarsely(p)) return plain;
  Again none{nullptr, 0};
  const int64_t coarse = scan_workspace(p.scan, rows, rows, coarse_visitor(p, 0, &none));
  return round_up(2 * rows, 16) + (coarse > plain ? coarse : plain);
}

// Anchors at positions begin .. end of the sequence.
void triplet_extrema(const ExtremaParams& p, int64_t begin, int64_t end, float* workspace) {
  ExtremaParams floats = in_floats(p);
  if (!coarsely(p)) return scan(floats.scan, begin, end, end - begin, workspace, extrema_visitor(floats));
  Arena arena{workspace};
  Again again{reinterpret_cast<int64_t*>(arena.take(2 * (end - begin))), 0};
  float* const rest = workspace + arena.words;
  scan(p.scan, begin, end, end - begin, rest, coarse_visitor(p, begin, &again));
  if (again.count == 0) return;
  floats.scan.sequence = again.anchors;
  scan(floats.scan, 0, again.count, again.count, rest, extrema_visitor(floats));
}

}  // namespace
