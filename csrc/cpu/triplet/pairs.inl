// What minings of one negative a positive pair share.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/scan.inl"

namespace {

using kdfast::PairsParams;

// Anchors taken at a time: what is kept of their pairs stays in a few MB.
inline int64_t rows_for_pairs(int64_t each) { return (int64_t(1) << 17) / (each < 32 ? 32 : each); }

// Which positive of the anchor is at `at` in its class, where its own row may be too; and the column of the k-th.
inline int64_t number_of_positive(const PairsParams& p, int64_t anchor, int64_t at) {
  return at - (at > p.scan.classes.skip[anchor] ? 1 : 0);
}
inline int64_t column_of_positive(const PairsParams& p, int64_t anchor, int64_t k) {
  const auto& c = p.scan.classes;
  return c.order[c.first[anchor] + k + (k >= c.skip[anchor] ? 1 : 0)];
}

template <class T>
inline T* take(Arena& arena, int64_t count) {
  return reinterpret_cast<T*>(arena.take((count * int64_t(sizeof(T)) + 3) / 4));
}

// Whether an anchor's distance to a positive, or to a negative, is not a number: [rows] each.
struct PairFlags {
  bool *positive, *negative;

  PairFlags(Arena& arena, int64_t rows) : positive(take<bool>(arena, rows)), negative(take<bool>(arena, rows)) {}
  void clear(int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) positive[i] = negative[i] = false;
  }
  bool unordered(int64_t i) const { return positive[i] || negative[i]; }
};

}  // namespace
