// The pass under every mining: anchors, class by class, past their positives and then past all references in blocks.
//
// A pair is ordered by its closeness, 2 x.y - |y|^2 of rows as the metric sees them (the cosine itself: x.y): among the references of one
// anchor the larger, the nearer. First the references of a chunk of anchors' classes, a run of the sorted order, are gathered and scored:
// an anchor's positives are K - 1 scores of its own. Then the references pass by in blocks as in stream.inl; columns of the anchor's class are
// overwritten in the tile, so that what follows is one comparison a score. Both scores of a pair have the same bits.
//
// Where a row is not finite, closeness may be NaN. Such rows and blocks go through a slow path that shows the visitor each NaN.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "engine/stream.inl"
#include "triplet/metric.inl"
#include "triplet/mining.h"

namespace {

using kdfast::ScanParams;

constexpr float kLargestFloat = 0x1.fffffep127f;
constexpr int64_t kSampled = 128;   // columns of a sampling block, by definition (kdfast/_ops/triplet/sampling.py)
constexpr int64_t kClassRows = 32;  // anchors, as whole tiles, whose classes are gathered together

inline bool finite(float x) { return x - x == 0; }

struct ScanWorkspace {
  int64_t rows, block, class_rows;
  Rows x;
  Streamed y;
  Tile tile;
  float* prepared;        // [block, width], or one row
  float *offset, *zeros;  // [block]
  float* base;            // [rows]: |x|^2
  int64_t* cursor;        // [rows]: the next of the anchor's class, in Classes.order

  template <class Product>
  ScanWorkspace(Product product, const ScanParams& p, int64_t row_count, int64_t most_rows, Arena& arena) {
    const int64_t chunks = most_rows / Product::kRowChunk;
    rows = smaller(rows_at_once<Product>(p.x.width, row_count), (chunks > 0 ? chunks : 1) * Product::kRowChunk);
    // whole sampling blocks (weighted.inl), or all columns
    block = smaller(round_up(block_columns<Product>(p.classes.columns, p.x.width), kSampled), round_up(p.classes.columns, kPanel));
    class_rows = kClassRows / Product::kRowMultiple * Product::kRowMultiple;
    x.plan(product, rows, p.x.width, arena);
    y.matrix = p.y.matrix;
    y.panels.plan(product, p.x.width, block, true, false, arena);
    tile.plan(product, rows, block, arena);
    prepared = arena.take(block * p.x.width);
    offset = arena.take(block), zeros = arena.take(block), base = arena.take(rows);
    cursor = reinterpret_cast<int64_t*>(arena.take(2 * rows));
  }
};

// Up to ScanWorkspace.rows anchors, begin .. begin + count of the sequence. A Visitor has, i counting from `begin`,
//   positives(i, at, closeness, offset, count)   those of number `at` and on in the anchor's class, and their |y|^2 (the cosine's: 0)
//   prepare(i)                                   all positives have been shown
//   negatives(i, block, closeness)               closeness.at(j) for each j of the block, -inf where there is no negative
//   unordered(i, column)                         a negative whose distance is not a number
//   finish(pass)                                 all has been shown; pass.again shows negatives once more
template <class Product, class Visitor>
struct ScanPass {
  const ScanParams& p;
  ScanWorkspace& w;
  const int64_t begin, count;
  Visitor& visitor;

  int64_t anchor(int64_t i) const { return p.sequence[begin + i]; }
  // |x|^2 and |y|^2 matter for their being finite alone where the metric is the cosine's.
  float length(float square) const { return p.metric == Metric::kCosine ? square - square : square; }

  bool run() const {
    bool sound = ready_rows();
    for (int64_t i = 0, rows; i < count; i += rows) sound &= classes(i, &rows);
    for (int64_t i = 0; i < count; ++i) visitor.prepare(i);
    if (p.positives_alone) return sound;
    const int64_t padded_rows = round_up(count, Product::kRowMultiple), chunk_rows = Product::kRowChunk;
    for (int64_t first = 0; first < p.classes.columns; first += w.block) {
      const int64_t columns = smaller(w.block, p.classes.columns - first);
      const Block block{first, columns, round_up(columns, kPanel)};
      sound &= pack(block, [&](int64_t j) { return first + j; });
      const bool wild = leave_out_absent(block);
      const Prefetch next = after_block(w.y, block, w.block, p.classes.columns, padded_rows);
      for (int64_t row = 0; row < padded_rows; row += chunk_rows)
        chunk(block, row, smaller(padded_rows - row, chunk_rows), wild, next);
    }
    return sound;
  }

  // Packs the anchors, and nothing up to whole tiles.
  bool ready_rows() const {
    const float factor = p.metric == Metric::kCosine ? 1 : 2;
    bool sound = true;
    for (int64_t i = 0; i < count; ++i) {
      w.base[i] = length(prepare_row(p.x, anchor(i), factor, w.prepared));
      sound &= Packing<Product>::pack_row({w.prepared, ElementType::kFloat32}, 0, p.x.width, false, w.x.at(i));
      w.cursor[i] = p.classes.first[anchor(i)];
    }
    __builtin_memset(w.zeros, 0, size_t(w.block) * 4);
    __builtin_memset(w.x.at(count), 0, size_t(4 * w.x.stride * (round_up(count, Product::kRowMultiple) - count)));
    return sound;
  }

  // The references column(j), j < block.columns, as panels, and their offsets; zero columns, left out, up to block.padded.
  template <class Column>
  bool pack(const Block& block, const Column& column) const {
    for (int64_t j = 0; j < block.columns; ++j) w.offset[j] = length(prepare_row(p.y, column(j), 1, w.prepared + j * p.y.width));
    for (int64_t j = block.columns; j < block.padded; ++j) w.offset[j] = kInfinity;
    return Packing<Product>::pack_block(w.y.panels, {w.prepared, ElementType::kFloat32}, 0, block.columns, block.padded);
  }

  // Columns that do not exist get offset inf; returns whether another is not finite.
  bool leave_out_absent(const Block& block) const {
    bool wild = false;
    for (int64_t j = 0; j < block.columns; ++j) {
      if (!p.classes.exists[block.first + j]) {
        w.offset[j] = kInfinity;
      } else {
        wild |= !finite(w.offset[j]);
      }
    }
    return wild;
  }

  // Of rows that are not finite as |x|^2 + |y|^2 - 2 x.y has it, NaN included; bounded, so that an infinite distance is still one.
  float closeness(int64_t i, int64_t j, float score) const {
    if (finite(w.base[i]) && finite(w.offset[j])) return score - w.offset[j];
    const float x = score - (w.base[i] + w.offset[j]);
    return x > kLargestFloat ? kLargestFloat : x < -kLargestFloat ? -kLargestFloat : x;
  }

  // The references of the classes of up to class_rows anchors from `row` on: a run low .. high of the order where anchors are sorted.
  void run_of_classes(int64_t row, int64_t* low, int64_t* high) const {
    const auto& c = p.classes;
    *low = c.columns, *high = 0;
    for (int64_t i = row; i < smaller(row + w.class_rows, count); ++i) {
      const int64_t first = c.first[anchor(i)], size = c.size(anchor(i));
      if (size == 0) continue;
      *low = first < *low ? first : *low;
      *high = first + size > *high ? first + size : *high;
    }
  }

  // Shows anchors from `row` on the references of their classes: class_rows of them, and of large classes as many more as these references
  // serve. Their number goes to `rows`.
  bool classes(int64_t row, int64_t* rows) const {
    const auto& c = p.classes;
    int64_t low, high, next_low, next_high, end = row + w.class_rows;
    run_of_classes(row, &low, &high);
    for (; end < count; end += w.class_rows) {
      run_of_classes(end, &next_low, &next_high);
      if (next_low < low || next_high > high) break;
    }
    end = smaller(end, count), *rows = end - row;
    bool sound = true;
    for (; low < high; low += w.block) {
      const int64_t columns = smaller(w.block, high - low);
      const Block block{low, columns, round_up(columns, kPanel)};
      sound &= pack(block, [&](int64_t j) { return c.order[low + j]; });
      for (int64_t begin = row; begin < end; begin += w.class_rows) {
        const int64_t some = smaller(w.class_rows, end - begin);
        score_rows(Product{}, w.x.at(begin), w.x.stride, round_up(some, Product::kRowMultiple), w.y.panels, block.padded, w.tile.scores(0), w.tile.stride);
        for (int64_t i = begin; i < begin + some; ++i) positives(block, i, w.tile.scores(i - begin));
      }
    }
    return sound;
  }

  void positives(const Block& block, int64_t i, float* scores) const {
    const auto& c = p.classes;
    const int64_t first = c.first[anchor(i)], own = first + c.skip[anchor(i)];
    const int64_t begin = first > block.first ? first : block.first;
    const int64_t end = smaller(first + c.size(anchor(i)), block.first + block.columns);
    for (int64_t at = begin; at < end; ++at) scores[at - block.first] = closeness(i, at - block.first, scores[at - block.first]);
    const auto show = [&](int64_t from, int64_t to) {
      if (from < to) visitor.positives(i, from - first, scores + (from - block.first), w.offset + (from - block.first), to - from);
    };
    const int64_t split = own < begin ? begin : smaller(own, end);
    show(begin, split);
    show(split == own ? split + 1 : split, end);
  }

  void chunk(const Block& block, int64_t row, int64_t rows, bool wild, const Prefetch& next) const {
    score_rows(Product{}, w.x.at(row), w.x.stride, rows, w.y.panels, block.padded, w.tile.scores(0), w.tile.stride);
    for (int64_t i = row; i < row + rows; ++i) {
      next.fetch(i);
      if (i < count) negatives(block, i, w.tile.scores(i - row), wild);
    }
  }

  // The negatives of those blocks and anchors once more that needs(i, block) tells. `gathered` holds class_rows packed rows.
  template <class Needs>
  void again(float* gathered, const Needs& needs) const {
    for (int64_t i = 0; i < count; ++i) w.cursor[i] = p.classes.first[anchor(i)];
    int64_t at[kClassRows], found = 0;
    for (int64_t first = 0; first < p.classes.columns; first += w.block) {
      const int64_t columns = smaller(w.block, p.classes.columns - first);
      const Block block{first, columns, round_up(columns, kPanel)};
      bool packed = false, wild = false;
      const auto show = [&] {
        if (!packed) {
          pack(block, [&](int64_t j) { return first + j; });
          wild = leave_out_absent(block);
          packed = true;
        }
        const int64_t rows = round_up(found, Product::kRowMultiple);
        score_rows(Product{}, gathered, w.x.stride, rows, w.y.panels, block.padded, w.tile.scores(0), w.tile.stride);
        for (int64_t r = 0; r < found; ++r) negatives(block, at[r], w.tile.scores(r), wild);
        found = 0;
      };
      for (int64_t i = 0; i < count; ++i) {
        if (!needs(i, block)) continue;
        __builtin_memcpy(gathered + found * w.x.stride, w.x.at(i), size_t(w.x.stride) * 4);
        at[found++] = i;
        if (found == w.class_rows) show();
      }
      if (found > 0) show();
    }
  }

  void negatives(const Block& block, int64_t i, float* scores, bool wild) const {
    leave_out_class(block, i, scores);
    if (wild || !finite(w.base[i])) {
      slow_negatives(block, i, scores);
    } else {
      visitor.negatives(i, block, Closeness{scores, w.offset});
    }
  }

  void leave_out_class(const Block& block, int64_t i, float* scores) const {
    const auto& c = p.classes;
    const int64_t past = block.first + block.columns, end = c.first[anchor(i)] + c.size(anchor(i));
    int64_t& at = w.cursor[i];
    for (; at < end && c.order[at] < past; ++at)
      if (c.order[at] >= block.first) scores[c.order[at] - block.first] = -kInfinity;
    const int64_t own = c.own[anchor(i)];
    if (own >= block.first && own < past) scores[own - block.first] = -kInfinity;
  }

  void slow_negatives(const Block& block, int64_t i, float* scores) const {
    const auto& c = p.classes;
    for (int64_t j = 0; j < block.padded; ++j) {
      const int64_t column = block.first + j;
      const bool negative = j < block.columns && c.label[anchor(i)] != c.ref_label[column] && c.admitted(anchor(i), column);
      scores[j] = negative ? closeness(i, j, scores[j]) : -kInfinity;
      if (scores[j] == scores[j]) continue;
      visitor.unordered(i, column);
      scores[j] = -kInfinity;
    }
    visitor.negatives(i, block, Closeness{scores, w.zeros});
  }

  struct Closeness {
    const float *scores, *offset;
    Vec at(int64_t j) const { return load(scores + j) - load(offset + j); }
  };
};

// Takes positions begin .. end of the sequence past the references, at most `most_rows` at a time, as far as chunks of rows allow:
// visit(w, arena, begin, count) makes their visitor.
template <class MakeVisitor>
inline void scan(const ScanParams& p, int64_t begin, int64_t end, int64_t most_rows, float* workspace, const MakeVisitor& visit) {
  with_sound_product(p.precision, [&](auto product) {
    using Product = decltype(product);
    Arena arena{workspace};
    ScanWorkspace w(product, p, end - begin, most_rows, arena);
    [[maybe_unused]] typename Product::Session session;
    bool sound = true;
    for (int64_t row = begin; row < end; row += w.rows) {
      const int64_t count = smaller(w.rows, end - row);
      Arena own = arena;
      auto visitor = visit(w, own, row, count);
      const ScanPass<Product, decltype(visitor)> pass{p, w, row, count, visitor};
      sound &= pass.run();
      visitor.finish(pass);
    }
    return sound;
  });
}

// Words of workspace for tasks of at most `rows` anchors.
template <class MakeVisitor>
inline int64_t scan_workspace(const ScanParams& p, int64_t rows, int64_t most_rows, const MakeVisitor& visit) {
  return scratch_words(p.precision, [&](auto product) {
    Arena arena{nullptr};
    const ScanWorkspace w(product, p, rows, most_rows, arena);
    visit(w, arena, 0, 0);
    return arena.words;
  });
}

}  // namespace
