// Lists of candidates for the k nearest: which columns can still be among them, known by ranks that are off by E at most.
//
// Let r be the k-th best rank listed. The k columns up to it are within r + E of the row, in the measure of ranks; a column that ranks
// beyond r + 2 E is farther than that. So a list is cut to the columns below r + 2 E: at most those, k and what rounding could confuse with them,
// are measured, and were no more than there is room for then none is missing.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/simd.h"
#include "knn/knn.h"

namespace {

using kdfast::KnnLists;
using kdfast::KnnMetric;

constexpr float kLargest = 0x1.fffffep127f;
constexpr int64_t kSpare = 16;  // columns that a list takes in at least between two cuts

struct Candidates {
  float* rank;
  int64_t* index;

  Candidates(const KnnLists& lists, int64_t row) : rank(lists.rank + row * lists.capacity), index(lists.index + row * lists.capacity) {}

  // What is not a number, or infinite, comes last.
  static float bounded(float x) { return x < kLargest ? x : kLargest; }
  bool before(int64_t i, int64_t j) const {
    const float a = bounded(rank[i]), b = bounded(rank[j]);
    return a < b || (a == b && index[i] < index[j]);
  }
  void swap(int64_t i, int64_t j) const {
    const float r = rank[i];
    const int64_t at = index[i];
    rank[i] = rank[j], index[i] = index[j];
    rank[j] = r, index[j] = at;
  }

  // Brings the `kept` first of `count` to the front; returns the rank of the last of them. kept < count.
  float keep(int64_t kept, int64_t count) const {
    select(kept, count);
    float worst = rank[0];
    for (int64_t i = 1; i < kept; ++i) worst = rank[i] > worst ? rank[i] : worst;
    return worst;
  }

  // Leaves those of a rank below `limit`, and the `first` whatever they are; returns how many.
  int64_t leave_below(float limit, int64_t first, int64_t count) const {
    int64_t left = first;
    for (int64_t i = first; i < count; ++i)
      if (rank[i] < limit) swap(i, left++);
    return left;
  }

  // The first `kept` of `count`, in order, to the front. A heap whose root is the last of them.
  void sort(int64_t kept, int64_t count) const {
    if (kept < count) select(kept, count);
    for (int64_t root = kept / 2; root-- > 0;) sift(root, kept);
    for (int64_t end = kept; end-- > 1;) {
      swap(0, end);
      sift(0, end);
    }
  }

 private:
  void sift(int64_t root, int64_t end) const {
    for (int64_t child; (child = 2 * root + 1) < end; root = child) {
      if (child + 1 < end && before(child, child + 1)) ++child;
      if (!before(root, child)) return;
      swap(root, child);
    }
  }

  // The `kept` first of `count`, in no order, to the front; kept < count. Quickselect: pairs (rank, index) are all different.
  void select(int64_t kept, int64_t count) const {
    int64_t low = 0, high = count - 1;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;  // the median of three, to the end
      if (before(middle, low)) swap(middle, low);
      if (before(high, low)) swap(high, low);
      if (before(middle, high)) swap(middle, high);
      int64_t first = low;
      for (int64_t i = low; i < high; ++i)
        if (before(i, high)) swap(i, first++);
      swap(first, high);
      if (first == kept) return;
      if (first < kept) {
        low = first + 1;
      } else {
        high = first - 1;
      }
    }
  }
};

// ||q||^2 as far as ranks leave it out: -cos for 1 - cos, ||k||^2 - 2 q.k for ||q - k||^2.
inline float left_out(const KnnLists& p, int64_t row) { return p.metric == KnnMetric::kCosine ? 1 : p.base[row]; }

// E, the most that the rank of a column at this cosine or squared distance can be off by. -cos is a product of unit rows; ||k||^2 - 2 q.k has
// ||k|| <= ||q|| + distance.
inline float slack(const KnnLists& p, int64_t row, float level) {
  if (p.metric == KnnMetric::kCosine) return p.product_error + p.float_error;
  const float query = __builtin_sqrtf(p.base[row]), key = query + __builtin_sqrtf(level);
  return 2 * p.product_error * query * key + p.float_error * (query + key) * (query + key);
}

// Whether a distance is nearer than any column that is not listed can be.
inline bool beats(const KnnLists& p, int64_t row, float distance) {
  const float level = p.metric == KnnMetric::kEuclidean ? distance * distance : distance;
  return level - left_out(p, row) + slack(p, row, level) < p.threshold[row];
}

// r + 2 E and a little, so that distances not above r + E beat it.
inline float reach(const KnnLists& p, int64_t row, float rank) {
  const float level = rank + left_out(p, row), positive = level > 0 ? level : 0, within = slack(p, row, positive);
  const float limit = rank + 1.125f * (within + slack(p, row, positive + within));
  return limit == limit ? limit : __builtin_inff();
}

// Cuts the list of a row, `count` long, to those that can be among the k nearest; returns how many are left.
inline int64_t cut(const KnnLists& p, int64_t row, int64_t count) {
  const Candidates list(p, row);
  if (count > p.k) {
    const float limit = reach(p, row, list.keep(p.k, count));
    if (limit < p.threshold[row]) p.threshold[row] = limit;
    count = list.leave_below(p.threshold[row], p.k, count);
    if (count > p.kept) {
      p.threshold[row] = list.keep(p.kept, count);
      count = p.kept;
    }
  }
  p.count[row] = count;
  p.room[row] = smaller(p.capacity - kLanes, count + (count > kSpare ? count : kSpare));
  return count;
}

}  // namespace
