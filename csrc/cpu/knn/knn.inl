// Nearest neighbours: candidates by rank from streamed products, then distances from the rows themselves.
//
// A row has a list of candidates and a threshold from which on a column cannot be among its k nearest (candidates.inl). A column below it is
// appended; now and then the list is cut and the threshold falls. Of M columns in random order a few times k ln(M / k) are ever appended, so
// that nearly all the work is one comparison a score.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "knn/candidates.inl"
#include "engine/rows.inl"
#include "engine/stream.inl"

namespace {

using kdfast::KnnRefineParams;
using kdfast::KnnScanParams;

// ---- the scan -------------------------------------------------------------------------------------------------------

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
    const KnnLists& lists = p.lists;
    const Candidates list(lists, row);
    int64_t used = lists.count[row];
    Vec threshold = splat(lists.threshold[row]);
    bool open = lists.threshold[row] == kInfinity;
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
      if (used > lists.room[row]) {
        used = cut(lists, row, used);
        threshold = splat(lists.threshold[row]);
        open = lists.threshold[row] == kInfinity;
      }
    }
    lists.count[row] = used;
  }
};

// ---- distances ------------------------------------------------------------------------------------------------------

// A query that is measured against many rows.
template <class T>
struct MeasuredRow {
  const T* x;
  int64_t width;
  float square;

  // Half the squared distance of unit rows is 1 - cos without the cancellation; the cosine of a zero row is 0.
  template <class U>
  float distance_to(KnnMetric metric, const U* y) const {
    if (metric == KnnMetric::kCosine) {
      const float y_square = row_square(y, width);
      const float half = row_distance(x, inverse_norm(square), y, inverse_norm(y_square), width) / 2;
      return (square == 0 || y_square == 0) && half == half ? 1 : half;
    }
    const float squared = row_distance(x, 1, y, 1, width);
    return metric == KnnMetric::kEuclidean ? __builtin_sqrtf(squared) : squared;
  }
};
template <class T>
MeasuredRow(const T*, int64_t, float) -> MeasuredRow<T>;

// Cuts a list for the last time and asks for the first of its rows.
inline void ready_row(const KnnRefineParams& p, int64_t row) {
  constexpr int64_t kAtOnce = 16;
  const Candidates list(p.lists, row);
  const int64_t count = cut(p.lists, row, p.lists.count[row]);
  with_elements(p.bank, [&](const auto* bank) {
    for (int64_t i = 0; i < smaller(kAtOnce, count); ++i) prefetch_row(bank + list.index[i] * p.width, p.width);
  });
}

inline void refine_row(const KnnRefineParams& p, int64_t row) {
  const KnnLists& lists = p.lists;
  const Candidates list(lists, row);
  const int64_t count = lists.count[row], k = lists.k, found = smaller(k, count);
  with_elements(p.query.from(row * p.width), [&](const auto* x) {
    with_elements(p.bank, [&](const auto* bank) {
      const MeasuredRow query{x, p.width, row_square(x, p.width)};
      for (int64_t i = 0; i < count; ++i) list.rank[i] = query.distance_to(lists.metric, bank + list.index[i] * p.width);
    });
  });
  list.sort(found, count);
  p.doubtful[row] = lists.threshold[row] < kInfinity && !(found == k && beats(lists, row, list.rank[k - 1]));
  for (int64_t i = 0; i < k; ++i) {
    p.distance[row * k + i] = i < found ? list.rank[i] : kInfinity;
    p.neighbour[row * k + i] = i < found ? list.index[i] : -1;
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
  if (begin < end) ready_row(p, begin);
  for (int64_t row = begin; row < end; ++row) {
    if (row + 1 < end) ready_row(p, row + 1);
    refine_row(p, row);
  }
}

}  // namespace
