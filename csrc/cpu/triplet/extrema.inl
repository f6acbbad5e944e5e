// Farthest and nearest positive and negative of each anchor: running extremes of closeness with their columns, ties to the lower.
//
// A row of 256 scores gives its maximum, one subtraction, one comparison and one maximum a vector; only where that beats what the anchor has, which
// happens about ln(M / 256) times, is its column looked for.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/scan.inl"

namespace {

using kdfast::ExtremaParams;

// The largest closeness below a limit so far, and its column.
struct Nearest {
  float closeness = -kInfinity;
  int64_t column = -1;

  static Vec below(Vec closeness, Vec limit) { return closeness < limit ? closeness : splat(-kInfinity); }

  template <class Closeness>
  void look(const Block& block, const Closeness& c, float limit) {
    Vec best = splat(-kInfinity);
    for (int64_t j = 0; j < block.padded; j += kLanes) best = larger(below(c.at(j), splat(limit)), best);
    const float here = largest(best);
    if (!(here > closeness)) return;
    closeness = here;
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const uint32_t lanes = lanes_at_least(below(c.at(j), splat(limit)), splat(here));
      if (lanes == 0) continue;
      column = block.first + j + __builtin_ctz(lanes);
      return;
    }
  }
};

// The least closeness so far, and its column; -inf is no negative.
struct Farthest {
  float distance = -kInfinity;  // minus closeness
  int64_t column = -1;

  static Vec far(Vec closeness) { return closeness > splat(-kInfinity) ? -closeness : splat(-kInfinity); }

  template <class Closeness>
  void look(const Block& block, const Closeness& c) {
    Vec best = splat(-kInfinity);
    for (int64_t j = 0; j < block.padded; j += kLanes) best = larger(far(c.at(j)), best);
    const float here = largest(best);
    if (!(here > distance)) return;
    distance = here;
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const uint32_t lanes = lanes_at_least(far(c.at(j)), splat(here));
      if (lanes == 0) continue;
      column = block.first + j + __builtin_ctz(lanes);
      return;
    }
  }
};

// What one anchor has found.
struct Extremes {
  Farthest far_positive, far_negative;
  Nearest near_positive, near_negative;
  float limit;  // negatives compete below it
};

struct ExtremaVisitor {
  const ExtremaParams& p;
  Extremes* found;
  int64_t begin, count;

  int64_t anchor(int64_t i) const { return p.scan.sequence[begin + i]; }

  void positives(int64_t i, int64_t at, const float* closeness, const float*, int64_t size) const {
    Extremes& e = found[i];
    const int64_t first = p.scan.classes.first[anchor(i)];
    for (int64_t k = 0; k < size; ++k) {
      const int64_t column = p.scan.classes.order[first + at + k];
      const float c = closeness[k];
      const bool lost = c != c && e.near_positive.closeness == e.near_positive.closeness;  // the first NaN stays
      if (c > e.near_positive.closeness || lost) e.near_positive = {c, column};
      if (-c > e.far_positive.distance || lost) e.far_positive = {-c, column};
    }
  }

  void prepare(int64_t i) const {
    Extremes& e = found[i];
    const float limit = p.beyond_farthest ? -e.far_positive.distance : p.beyond_nearest ? e.near_positive.closeness : kInfinity;
    e.limit = limit == limit ? limit : kInfinity;
  }

  template <class Closeness>
  void negatives(int64_t i, const Block& block, const Closeness& c) const {
    Extremes& e = found[i];
    e.near_negative.look(block, c, e.limit);
    if (p.farthest_negative) e.far_negative.look(block, c);
  }

  void unordered(int64_t i, int64_t column) const {
    Extremes& e = found[i];
    if (e.near_negative.closeness != e.near_negative.closeness) return;
    e.near_negative = {__builtin_nanf(""), column};
    e.far_negative = {__builtin_nanf(""), column};
  }

  template <class Pass>
  void finish(const Pass&) const {
    for (int64_t i = 0; i < count; ++i) {
      const Extremes& e = found[i];
      const int64_t row = anchor(i);
      p.farthest_positive[row] = e.far_positive.column, p.nearest_positive[row] = e.near_positive.column;
      p.nearest_negative[row] = e.near_negative.column, p.most_distant_negative[row] = e.far_negative.column;
      const float either = e.near_positive.closeness + e.near_negative.closeness;  // neither is ever +inf
      p.unordered[row] = either != either;
    }
  }
};

inline auto extrema_visitor(const ExtremaParams& p) {
  return [&p](const ScanWorkspace& w, Arena& arena, int64_t begin, int64_t count) {
    auto* const found = reinterpret_cast<Extremes*>(arena.take(w.rows * int64_t(sizeof(Extremes) / 4)));
    for (int64_t i = 0; i < count; ++i) found[i] = {{}, {}, {}, {}, kInfinity};
    return ExtremaVisitor{p, found, begin, count};
  };
}

}  // namespace
