// Rows of a problem arranged in teams (dense_swap.inl): anchors of a class beside all its references.
#pragma once

#include "triplet/bind_dense.h"

namespace {

using kdfast::Team;

struct ArrangedTeams {
  kdfast::Teams teams{};
  std::vector<Team> list;
  std::vector<int32_t> team;                 // of each row, -1 for none
  std::vector<int64_t> first, last, own;     // of each row
  Tensor x, square;

  explicit ArrangedTeams(const Dense& dense) {
    const DenseParams& p = dense.p;
    for (int64_t row = 0; row < p.pairs.rows;) {
      int64_t end = row + 1;
      while (end < p.pairs.rows && p.first[end] == p.first[row] && p.last[end] == p.last[row]) ++end;
      if (p.last[row] - p.first[row] > (p.symmetric ? 1 : 0)) add_class(p, row, end);
      row = end;
    }
    copy_rows(dense);
  }

  int64_t rows() const { return int64_t(team.size()); }

  // Anchors row .. end, of one class. Where they are its references they stand in both places.
  void add_class(const DenseParams& p, int64_t row, int64_t end) {
    const int64_t references = p.last[row] - p.first[row], room = kdfast::Teams::kRows - (p.symmetric ? 0 : references);
    STD_TORCH_CHECK(room > 0 && (!p.symmetric || references <= room), "with swap a class must have fewer than ", kdfast::Teams::kRows,
                    " references, got ", references);
    for (int64_t anchor = row; anchor < end; anchor += room) {
      const int64_t anchors = std::min(room, end - anchor), size = p.symmetric ? anchors : anchors + references;
      const int64_t left = kdfast::Teams::kRows - rows() % kdfast::Teams::kRows;
      if (size > left) team.resize(size_t(rows() + left), -1);  // whole within a chunk
      const int64_t begin = rows();
      list.push_back({begin, begin + size, p.symmetric ? begin : begin + anchors, anchor, anchors});
      team.resize(size_t(begin + size), int32_t(list.size()) - 1);
    }
  }

  void copy_rows(const Dense& dense) {
    const DenseParams& p = dense.p;
    const int64_t width = p.pairs.width, count = rows();
    first.assign(size_t(count), 0), last.assign(size_t(count), 0), own.assign(size_t(count), -1);
    x = zeros<float>(count * width, ScalarType::Float), square = zeros<float>(count + kPanelPad, ScalarType::Float);
    const auto copy = [&](int64_t to, const kdfast::Matrix& from, const float* squares, int64_t row) {
      std::copy_n(static_cast<const float*>(from.data) + row * width, width, memory<float>(x) + to * width);
      memory<float>(square)[to] = squares[row];
    };
    for (const Team& t : list) {
      for (int64_t a = 0; a < t.anchors; ++a) {
        const int64_t to = t.begin + a, row = t.anchor + a;
        copy(to, p.pairs.x, p.x_square, row);
        first[size_t(to)] = p.first[row], last[size_t(to)] = p.last[row], own[size_t(to)] = p.own[row];
      }
      for (int64_t to = t.begin + t.anchors; to < t.end; ++to) copy(to, p.pairs.y, p.y_square, reference(p, t, to));
    }
    teams.rows = p;
    teams.rows.pairs.rows = count, teams.rows.pairs.x.data = memory<float>(x);
    teams.rows.first = first.data(), teams.rows.last = last.data(), teams.rows.own = own.data(), teams.rows.x_square = memory<float>(square);
    teams.teams = list.data(), teams.team = team.data();
  }

  // The reference in row `at` of a team.
  static int64_t reference(const DenseParams& p, const Team& t, int64_t at) { return p.first[t.anchor] + at - t.refs; }

  // Adds what the rows have gathered to their anchors and references.
  void add_to(const DenseParams& p, const float* sums, const double* weights, const PairSums& to, double* x_weight, double* y_weight) const {
    const int64_t width = p.pairs.width;
    const auto add = [&](float* to_sums, double* to_weights, int64_t row, int64_t from) {
      if (to_sums == nullptr) return;
      for (int64_t d = 0; d < width; ++d) to_sums[row * width + d] += sums[from * width + d];
      to_weights[row] += weights[from];
    };
    for (const Team& t : list) {
      for (int64_t a = 0; a < t.anchors; ++a) add(to.x_sums, x_weight, t.anchor + a, t.begin + a);
      for (int64_t r = t.begin + t.anchors; r < t.end; ++r)
        p.in_batch ? add(to.x_sums, x_weight, reference(p, t, r), r) : add(to.y_sums, y_weight, reference(p, t, r), r);
    }
  }
};

}  // namespace
