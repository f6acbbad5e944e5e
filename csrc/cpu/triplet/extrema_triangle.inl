// The nearest negative of each row of a batch, from half its pairs.
//
// 2 x_i.x_j - |x_j|^2, the closeness of j to i, and that of i to j share their product. Rows meet the columns from their own on; a tile of products
// serves its rows as in extrema.inl and its columns by running maxima down it. Among equals the lower index stays, as rows come in
// ascending order, and where a column is met as a row too the two findings are compared.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/extrema.inl"

namespace {

// Of each row, the closeness of its nearest negative so far, and which that is; [round_up(rows, kPanel)].
struct Nearests {
  float* closeness;
  int32_t* column;

  void offer(int64_t row, const Nearest& found) const {
    if (found.column < 0) return;
    const bool lower = column[row] < 0 || found.column < column[row];
    if (found.closeness > closeness[row] || (found.closeness == closeness[row] && lower))
      closeness[row] = found.closeness, column[row] = int32_t(found.column);
  }
};

struct NoVisitor {};

// Rows begin .. begin + count, against columns from `begin` on.
template <class Product>
struct TrianglePass {
  using Scan = ScanPass<Product, NoVisitor>;
  const Scan& scan;
  Nearest* rows;  // what each has found among the columns
  Nearests all;

  // Whether every number was one that this pass is right for.
  bool run() const {
    const auto& [p, w, begin, count, visitor] = scan;
    bool sound = scan.ready_rows();
    for (int64_t i = 0; i < count; ++i) rows[i] = {};
    for (int64_t first = begin; first < p.classes.columns; first += w.block) {
      const int64_t columns = smaller(w.block, p.classes.columns - first);
      const Block block{first, columns, round_up(columns, kPanel)};
      sound &= scan.pack(block, [&](int64_t j) { return first + j; });
      for (int64_t j = 0; j < columns; ++j) sound &= w.offset[j] < 0x1p120f;  // products are finite then, and so is this
      if (!sound) return false;
      const int64_t met = smaller(count, first + columns - begin), padded_rows = round_up(met, Product::kRowMultiple);
      const Prefetch next = after_block(w.y, block, w.block, p.classes.columns, padded_rows);
      for (int64_t row = 0; row < padded_rows; row += Product::kRowChunk)
        chunk(block, row, smaller(padded_rows - row, int64_t(Product::kRowChunk)), next);
    }
    for (int64_t i = 0; i < count; ++i) all.offer(begin + i, rows[i]);
    return true;
  }

  void chunk(const Block& block, int64_t row, int64_t padded, const Prefetch& next) const {
    const ScanWorkspace& w = scan.w;
    score_rows(Product{}, w.x.at(row), w.x.stride, padded, w.y.panels, block.padded, w.tile.scores(0), w.tile.stride);
    const int64_t end = smaller(row + padded, scan.count);
    for (int64_t i = row; i < row + padded; ++i) next.fetch(i);
    for (int64_t i = row; i < end; ++i) {
      float* const scores = w.tile.scores(i - row);
      scan.leave_out_class(block, i, scores);
      rows[i].look(block, typename Scan::Closeness{scores, w.offset}, kInfinity);
    }
    for (int64_t j = 0; j < block.padded; j += kLanes) down(block.first + j, w.tile.scores(0) + j, row, end);
  }

  // The closeness of rows `row` to `end` to kLanes columns.
  void down(int64_t column, const float* scores, int64_t row, int64_t end) const {
    Vec best = load(all.closeness + column);
    IntVec nearest = load_int(all.column + column);
    for (int64_t i = row; i < end; ++i, scores += scan.w.tile.stride) {
      const Vec closeness = load(scores) - splat(scan.w.base[i]);
      const IntVec closer = closeness > best;
      best = closer ? closeness : best;
      nearest = closer ? IntVec{} + int32_t(scan.begin + i) : nearest;
    }
    store(all.closeness + column, best);
    __builtin_memcpy(all.column + column, &nearest, sizeof(nearest));
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Tiles are left out: their coarse products are no cost worth halving, and floats in parts have x_i.x_j and x_j.x_i with different
// bits, so that copies on either side of a row would not be at one distance. Few rows have no half to leave out.
bool triplet_triangle_serves(const ExtremaParams& p) {
#ifdef KDFAST_TILE_INSTRUCTIONS
  (void)p;
  return false;
#else
  const auto& c = p.scan.classes;
  constexpr int64_t kFewest = 512;
  if (p.beyond_farthest || p.beyond_nearest || p.farthest_negative || p.scan.x.matrix.data != p.scan.y.matrix.data) return false;
  if (c.rows != c.columns || c.rows < kFewest || c.columns >= int64_t(1) << 31) return false;
  for (int64_t i = 0; i < c.rows; ++i)
    if (c.own[i] != i || !c.exists[i] || c.label[i] != c.ref_label[i]) return false;
  return true;
#endif
}

int64_t triplet_triangle_workspace(const ExtremaParams& p, int64_t rows) {
  return with_product(p.scan.precision, [&](auto product) {
    Arena arena{nullptr};
    const ScanWorkspace w(product, p.scan, rows, rows, arena);
    arena.take(w.rows * int64_t(sizeof(Nearest) / 4));
    return arena.words;
  });
}

// Rows begin .. end of the batch. Offers what they are to the columns from `begin` on, and what these are to them. Returns whether it could:
// not for rows that are not finite, or far too long.
bool triplet_triangle(const ExtremaParams& p, int64_t begin, int64_t end, float* closeness, int32_t* nearest, float* workspace) {
  ScanParams natural = p.scan;
  natural.sequence = p.scan.classes.own;  // 0, 1, 2, ...
  return with_product(p.scan.precision, [&](auto product) {
    using Product = decltype(product);
    Arena arena{workspace};
    ScanWorkspace w(product, natural, end - begin, end - begin, arena);
    auto* const rows = reinterpret_cast<Nearest*>(arena.take(w.rows * int64_t(sizeof(Nearest) / 4)));
    [[maybe_unused]] typename Product::Session session;
    NoVisitor none;
    for (int64_t row = begin; row < end; row += w.rows) {
      const ScanPass<Product, NoVisitor> scan{natural, w, row, smaller(w.rows, end - row), none};
      if (!TrianglePass<Product>{scan, rows, {closeness, nearest}}.run()) return false;
    }
    return true;
  });
}

}  // namespace
