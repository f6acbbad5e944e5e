// The rows of a pass over every triplet (every_triplet.h), in units.
#pragma once

#include "triplet/bind_dense.h"

namespace {

struct Units {
  std::vector<int64_t> units{0}, anchor;             // where units begin; of each row its anchor, -1 for none
  std::vector<int64_t> reference, references;        // with swap: the reference in a row, -1; where those of an anchor's class begin
  std::vector<int64_t> first, last, own;             // with swap, of each row, as DenseParams has them
  int64_t most = 1;                                  // rows of a unit, at most
  const int64_t chunk;

  Units(const DenseParams& p, int64_t chunk, bool swap) : chunk(chunk) {
    swap ? classes(p) : anchors_alone(p);
    for (size_t u = 0; u + 1 < units.size(); ++u) most = std::max(most, units[u + 1] - units[u]);
  }

  int64_t rows() const { return int64_t(anchor.size()); }
  int64_t count() const { return int64_t(units.size()) - 1; }
  bool arranged() const { return !references.empty(); }

  // Where a part of the units begins.
  int64_t unit_of(int64_t part, int64_t parts) const { return count() * part / parts; }

 private:
  void anchors_alone(const DenseParams& p) {
    for (int64_t row = 0; row < p.pairs.rows; ++row) anchor.push_back(row);
    for (int64_t row = 0; row < p.pairs.rows; row += chunk) units.push_back(std::min(row + chunk, p.pairs.rows));
  }

  void classes(const DenseParams& p) {
    for (int64_t row = 0; row < p.pairs.rows;) {
      int64_t end = row + 1;
      while (end < p.pairs.rows && p.first[end] == p.first[row] && p.last[end] == p.last[row]) ++end;
      if (p.last[row] - p.first[row] > (p.symmetric ? 1 : 0)) add_class(p, row, end);
      row = end;
    }
    if (rows() > units.back()) units.push_back(rows());
  }

  // Anchors row .. end, of one class. Where they are its references they stand in both places.
  void add_class(const DenseParams& p, int64_t row, int64_t end) {
    const int64_t count = end - row, size = count + (p.symmetric ? 0 : p.last[row] - p.first[row]);
    const int64_t room = 4 * size <= chunk ? chunk : (256 + chunk - 1) / chunk * chunk;  // little of which is filled up in vain
    if (rows() > units.back() && rows() - units.back() + size > room) close_unit();
    const int64_t begin = rows(), refs = p.symmetric ? begin : begin + count;
    for (int64_t a = row; a < end; ++a) add_row(a, -1, refs, p.first[a], p.last[a], p.own[a]);
    for (int64_t r = p.first[row]; r < p.last[row] && !p.symmetric; ++r) add_row(-1, r, refs, 0, 0, -1);
  }

  void close_unit() {
    while (rows() % chunk != 0) add_row(-1, -1, 0, 0, 0, -1);
    units.push_back(rows());
  }

  void add_row(int64_t of_anchor, int64_t of_reference, int64_t refs, int64_t class_first, int64_t class_last, int64_t own_column) {
    anchor.push_back(of_anchor), reference.push_back(of_reference), references.push_back(refs);
    first.push_back(class_first), last.push_back(class_last), own.push_back(own_column);
  }
};

// The rows of the units as one space has them, and sums for these.
struct UnitRows {
  const Dense& dense;
  const Units& units;
  Tensor x, square, sums, weights;
  kdfast::TripletSpace space;

  UnitRows(const Dense& dense, const Units& units) : dense(dense), units(units), space{dense.p, dense.p} {
    if (!units.arranged()) return;
    const DenseParams& p = dense.p;
    const int64_t width = p.pairs.width, count = units.rows();
    x = zeros<float>(count * width, ScalarType::Float), square = zeros<float>(count + kPanelPad, ScalarType::Float);
    const auto copy = [&](int64_t to, const kdfast::Matrix& from, const float* squares, int64_t row) {
      std::copy_n(static_cast<const float*>(from.data) + row * width, width, memory<float>(x) + to * width);
      memory<float>(square)[to] = squares[row];
    };
    for (int64_t to = 0; to < count; ++to) {
      const int64_t anchor = units.anchor[size_t(to)], reference = units.reference[size_t(to)];
      if (anchor >= 0) copy(to, p.pairs.x, p.x_square, anchor);
      if (reference >= 0) copy(to, p.pairs.y, p.y_square, reference);
    }
    DenseParams& rows = space.rows;
    rows.pairs.rows = count, rows.pairs.x.data = memory<float>(x), rows.x_square = memory<float>(square);
    rows.first = units.first.data(), rows.last = units.last.data(), rows.own = units.own.data();
  }

  // Memory for sums of rows that are arranged.
  void plan() {
    if (!units.arranged()) return;
    sums = zeros<float>(units.rows() * dense.p.pairs.width, ScalarType::Float), weights = zeros<double>(units.rows(), ScalarType::Double);
  }

  // Adds what the rows have gathered to their anchors and references.
  void add_to(const PairSums& to, double* x_weight, double* y_weight) const {
    const int64_t width = dense.p.pairs.width;
    for (int64_t from = 0; units.arranged() && from < units.rows(); ++from) {
      const int64_t anchor = units.anchor[size_t(from)], reference = units.reference[size_t(from)];
      const bool as_row = anchor >= 0 || dense.p.in_batch;
      float* const to_sums = as_row ? to.x_sums : to.y_sums;
      if ((anchor < 0 && reference < 0) || to_sums == nullptr) continue;
      const int64_t row = anchor >= 0 ? anchor : reference;
      for (int64_t d = 0; d < width; ++d) to_sums[row * width + d] += memory<float>(sums)[from * width + d];
      (as_row ? x_weight : y_weight)[row] += memory<double>(weights)[from];
    }
  }
};

}  // namespace
