// Nearest neighbours: candidates by rank from streamed products, then distances from the rows themselves.
//
// A row keeps a buffer of candidates and a threshold, the rank of the worst it must keep. A column below the threshold is appended; when
// the buffer is full its best are selected and the threshold falls. Of M columns in random order about kept ln(M / kept) are ever
// appended, so nearly all the work is one comparison a score.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "knn/knn.h"
#include "engine/rows.inl"
#include "engine/stream.inl"

namespace {

using kdfast::KnnMetric;
using kdfast::KnnRefineParams;
using kdfast::KnnScanParams;

constexpr float kLargest = 0x1.fffffep127f;

// ---- the candidates of one row --------------------------------------------------------------------------------------

struct Candidates {
  float* rank;
  int64_t* index;

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

  // Keeps the `kept` first of `count`; returns the rank of the last of them, from which on nothing was kept.
  float keep(int64_t kept, int64_t count) const {
    select(kept, count);
    float worst = rank[0];
    for (int64_t i = 1; i < kept; ++i) worst = rank[i] > worst ? rank[i] : worst;
    return worst;
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

// ---- candidates -----------------------------------------------------------------------------------------------------

struct KnnWorkspace {
  int64_t rows, block;
  Rows queries;
  Streamed keys;
  Tile tile;
  BlockLabels labels;
  float *factor, *offset;  // per column of a block

  template <class Product>
  KnnWorkspace(Product product, const KnnScanParams& p, int64_t row_count, Arena& arena) {
    rows = rows_at_once<Product>(p.width, row_count);
    block = block_columns<Product>(p.columns, p.width);
    queries.plan(product, rows, p.width, arena);
    keys.panels.plan(product, p.width, block, true, false, arena);
    tile.plan(product, rows, block, arena);
    labels.plan(block, arena);
    factor = arena.take(block), offset = arena.take(block);
  }
};

// Up to rows_at_once rows, `begin` .. `begin + count` of the call, past every column.
template <class Product>
struct KnnPass {
  const KnnScanParams& p;
  KnnWorkspace& w;
  const int64_t begin, count;

  bool run() const {
    const int64_t padded_rows = round_up(count, Product::kRowMultiple);
    bool sound = true;
    for (int64_t i = 0; i < count; ++i) sound &= Packing<Product>::pack_row(p.query, begin + i, p.width, false, w.queries.at(i));
    __builtin_memset(w.queries.at(count), 0, size_t(4 * w.queries.stride * (padded_rows - count)));
    return stream_blocks(Product{}, w.block, padded_rows, 0, p.columns, *this, w.keys) && sound;
  }

  void begin_block(const Block& block) const {
    for (int64_t j = 0; j < block.padded; ++j) {
      w.factor[j] = j < block.columns ? p.factor[block.first + j] : 0;
      w.offset[j] = j < block.columns ? p.offset[block.first + j] : kInfinity;
    }
    if (p.query_labels != nullptr) w.labels.pack(p.key_labels + block.first, block);
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Prefetch& next) const {
    score_rows(Product{}, w.queries.at(row), w.queries.stride, rows, w.keys.panels, block.padded, w.tile.scores(0), w.tile.stride);
    for (int64_t i = row; i < row + rows; ++i) {
      next.fetch(i);
      if (i < count) keep(block, begin + i, w.tile.scores(i - row));
    }
  }

  // A rank that is not a number, or too large for one, is the largest there is: after all others, before what is left out.
  static Vec ranked(Vec score, Vec factor, Vec offset) {
    const Vec rank = multiply_add(score, factor, offset), largest = splat(kLargest);
    const Vec bounded = rank < largest ? larger(rank, -largest) : largest;
    return offset == splat(kInfinity) ? offset : bounded;
  }

  // Whether none of a panel's columns ranks below the threshold; lanes that are not numbers might.
  bool far(const float* scores, int64_t j, Vec threshold) const {
    uint32_t lanes = kAllLanes;
#pragma GCC unroll 4
    for (int64_t k = j; k < j + kPanel; k += kLanes)
      lanes &= lanes_at_least(multiply_add(load(scores + k), load(w.factor + k), load(w.offset + k)), threshold);
    return lanes == kAllLanes;
  }

  void keep(const Block& block, int64_t row, float* scores) const {
    const Candidates list{p.rank + row * p.capacity, p.index + row * p.capacity};
    int64_t used = p.count[row];
    Vec threshold = splat(p.threshold[row]);
    bool open = p.threshold[row] == kInfinity;
    const int64_t own = p.own != nullptr ? p.own[row] - p.first - block.first : -1;
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      // Nearly always the end of it, first for a panel. A list that has no threshold yet goes on.
      if (j % kPanel == 0 && !open && far(scores, j, threshold)) {
        j += kPanel - kLanes;
        continue;
      }
      if (lanes_at_least(multiply_add(load(scores + j), load(w.factor + j), load(w.offset + j)), threshold) == kAllLanes && !open) continue;
      Vec rank = ranked(load(scores + j), load(w.factor + j), load(w.offset + j));
      if (p.query_labels != nullptr) {
        const int64_t label = p.query_labels[row];
        const IntVec low = IntVec{} + int32_t(uint32_t(label)), high = IntVec{} + int32_t(label >> 32);
        const IntVec same = (load_int(w.labels.low + j) == low) & (load_int(w.labels.high + j) == high);
        rank = (p.only_same ? ~same : same) ? splat(kInfinity) : rank;
      }
      uint32_t below = kAllLanes & ~lanes_at_least(rank, threshold);
      if (below == 0) continue;
      float ranks[kLanes];
      store(ranks, rank);
      for (; below != 0; below &= below - 1) {
        const int lane = __builtin_ctz(below);
        if (j + lane == own) continue;
        list.rank[used] = ranks[lane];
        list.index[used] = p.first + block.first + j + lane;
        ++used;
      }
      if (used + kLanes > p.capacity) {
        p.threshold[row] = list.keep(p.kept, used);
        used = p.kept;
        threshold = splat(p.threshold[row]);
        open = p.threshold[row] == kInfinity;
      }
    }
    p.count[row] = used;
  }
};

// ---- distances ------------------------------------------------------------------------------------------------------

// Half the squared distance of unit rows is 1 - cos without the cancellation; the cosine of a zero row is 0.
template <class T, class U>
inline float distance_of(KnnMetric metric, const T* x, const U* y, int64_t width) {
  if (metric == KnnMetric::kCosine) {
    const float xx = row_square(x, width), yy = row_square(y, width);
    const float half = row_distance(x, inverse_norm(xx), y, inverse_norm(yy), width) / 2;
    return (xx == 0 || yy == 0) && half == half ? 1 : half;
  }
  const float square = row_distance(x, 1, y, 1, width);
  return metric == KnnMetric::kEuclidean ? __builtin_sqrtf(square) : square;
}

// Whether the k-th distance is nearer than any column that was not kept can be: such a column ranked no better than the threshold, to
// within the rounding of its rank. -cos is a product of unit rows; ||k||^2 - 2 q.k has ||k|| <= ||q|| + distance where it is as near.
inline bool beats(const KnnRefineParams& p, int64_t row, float distance) {
  if (p.metric == KnnMetric::kCosine) return distance - 1 + p.product_error + p.float_error < p.threshold[row];
  const float level = p.metric == KnnMetric::kEuclidean ? distance * distance : distance;
  const float query = __builtin_sqrtf(p.base[row]), key = query + __builtin_sqrtf(level);
  const float slack = 2 * p.product_error * query * key + p.float_error * (query + key) * (query + key);
  return level - p.base[row] + slack < p.threshold[row];
}

inline void refine_row(const KnnRefineParams& p, int64_t row) {
  const Candidates list{p.rank + row * p.capacity, p.index + row * p.capacity};
  int64_t count = p.count[row];
  if (count > p.kept) {
    p.threshold[row] = list.keep(p.kept, count);
    count = p.kept;
  }
  with_elements(p.query.from(row * p.width), [&](const auto* x) {
    with_elements(p.bank, [&](const auto* bank) {
      for (int64_t i = 0; i < count; ++i) {
        __builtin_prefetch(bank + list.index[smaller(i + 8, count - 1)] * p.width);
        list.rank[i] = distance_of(p.metric, x, bank + list.index[i] * p.width, p.width);
      }
    });
  });
  const int64_t found = smaller(p.k, count);
  list.sort(found, count);
  p.doubtful[row] = p.threshold[row] < kInfinity && !(found == p.k && beats(p, row, list.rank[p.k - 1]));
  for (int64_t i = 0; i < p.k; ++i) {
    p.distance[row * p.k + i] = i < found ? list.rank[i] : kInfinity;
    p.neighbour[row * p.k + i] = i < found ? list.index[i] : -1;
  }
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows.
int64_t knn_workspace(const KnnScanParams& p, int64_t rows) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    KnnWorkspace(product, p, rows, arena);
    return arena.words;
  });
}

// Rows `begin` to `end`.
void knn_scan(const KnnScanParams& p, int64_t begin, int64_t end, float* workspace) {
  const auto scan = [&](auto product) {
    using Product = decltype(product);
    Arena arena{workspace};
    KnnWorkspace w(product, p, end - begin, arena);
    w.keys.matrix = p.keys;
    [[maybe_unused]] typename Product::Session session;
    bool sound = true;
    for (int64_t row = begin; row < end; row += w.rows) sound &= KnnPass<Product>{p, w, row, smaller(w.rows, end - row)}.run();
    return sound;
  };
  with_product(p.precision, scan);  // parts of an infinity rank as NaN, that is last: what its distance decides comes with the refinement
}

void knn_refine(const KnnRefineParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) refine_row(p, row);
}

}  // namespace
