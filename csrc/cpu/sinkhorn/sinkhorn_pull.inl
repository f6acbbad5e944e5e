// From the gradient W in the cost of points to that in these, a tile of rows of W at a time:
//
//   squared: dx_i = 2 (x_i sum_j W_ij - sum_j W_ij y_j), dy_j = 2 (y_j sum_i W_ij - sum_i W_ij x_i);  dot: dx_i = -sum_j W_ij y_j, dy_j likewise
//
// and euclidean as squared, without the 2, of W_ij / C_ij. Where costs are made from differences so are these, dx_i = 2 sum_j W_ij (x_i - y_j): W/C of points
// that nearly meet is as large as their difference is small, and either part's sum alone would round it away. Points y are read in the panels their costs
// are formed from, and what is summed for dy lies in panels of the same kind, so that a point may have any number of coordinates.
#pragma once

#include "sinkhorn/sinkhorn_plan.inl"

namespace {

constexpr int kCoordinates = 4;          // whose sums are formed together
constexpr int64_t kPullBytes = 1 << 17;  // of a tile of W

template <class Real>
class PointPull {
 public:
  // Elements of what is summed for dy.
  static int64_t space(const SinkhornProblem<Real>& p) { return round_up(p.m, kPanelWidth<Real>) * (p.width + 1); }
  // From one row of W to the next: whole panels, and a vector more, or rows of 4 KB would share a place in L1.
  static int64_t stride(const SinkhornProblem<Real>& p) { return round_up(p.m, kPanelWidth<Real>) + kWidth<Real>; }
  // Rows of a tile.
  static int64_t tile(const SinkhornProblem<Real>& p) {
    const int64_t rows = kPullBytes / (stride(p) * int64_t(sizeof(Real))) / kTogether * kTogether;
    return rows < kTogether ? kTogether : smaller(rows, kChunk);
  }
  // Makes rows of W 0 past their last column, as add reads them.
  static void pad(const SinkhornProblem<Real>& p, Real* w, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = p.m; j < stride(p); ++j) w[r * stride(p) + j] = 0;
  }

  PointPull(const SinkhornProblem<Real>& p, const PointSums<Real>& points, Real* work)
      : p_(p), difference_(points.difference), panels_(points.panels), m_(round_up(p.m, kPanelWidth<Real>)), columns_(work), products_(work + m_) {
    for (int64_t j = 0; j < space(p); ++j) work[j] = 0;
  }

  // Rows i ... i + rows, at most kChunk, of W: dx, and their part of dy.
  void add(const Real* w, int64_t i, int64_t rows, Real* to_x) {
    const int64_t width = stride(p_);
    if (difference_)
      return each_rows(rows, [&](int64_t r, auto together) {
        constexpr int kRows = decltype(together)::value;
        each_coordinate([&](int64_t d, auto count) { pull_apart<kRows, decltype(count)::value>(w + r * width, width, i + r, d, to_x); });
      });
    each_rows(rows, [&](int64_t r, auto together) {
      constexpr int kRows = decltype(together)::value;
      const Real* const from = w + r * width;
      V sums[kRows] = {};
      for (int64_t j = 0; j < m_; j += kW)
        for (int q = 0; q < kRows; ++q) sums[q] += load(from + q * width + j);
      Real totals[kRows];
      for (int q = 0; q < kRows; ++q) totals[q] = sum_lanes(sums[q]);
      each_coordinate([&](int64_t d, auto count) { pull_rows<kRows, decltype(count)::value>(from, width, i + r, d, totals, to_x); });
    });
    for (int64_t j = 0; j < m_; j += kPanelWidth<Real>) {
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < kVecs; ++v) store(columns_ + j + v * kW, load(columns_ + j + v * kW) + load(w + r * width + j + v * kW));
      Real* const products = products_ + j * p_.width;
      each_coordinate([&](int64_t d, auto count) {
        add_columns<decltype(count)::value>(w + j, width, p_.x + i * p_.width + d, rows, products + d * kPanelWidth<Real>);
      });
    }
  }

  // dy, of sums in `work`.
  static void finish(const SinkhornProblem<Real>& p, const Real* work, Real* to_y) {
    constexpr int64_t kP = kPanelWidth<Real>;
    const Real* const products = work + round_up(p.m, kP);
    const bool difference = PointSums<Real>::from_differences(p);
    for (int64_t j = 0; j < p.m; ++j)
      for (int64_t d = 0; d < p.width; ++d) {
        const Real sum = products[j / kP * kP * p.width + d * kP + j % kP];
        to_y[j * p.width + d] = difference ? -slope(p) * sum : pulled(p, work[j], p.y[j * p.width + d], sum);
      }
  }
  void finish(Real* to_y) const { finish(p_, columns_, to_y); }

 private:
  using V = VecOf<Real>;
  static constexpr int64_t kW = kWidth<Real>;

  const SinkhornProblem<Real>& p_;
  bool difference_;
  const Real* panels_;
  int64_t m_;
  Real *columns_, *products_;  // of products sum_i W_ij [m_], and sum_i W_ij x_i, or of differences sum_i W_ij (x_i - y_j) [panel][width][lanes]

  static Real slope(const SinkhornProblem<Real>& p) { return p.metric == SinkhornMetric::kEuclidean ? Real(1) : Real(2); }

  static Real pulled(const SinkhornProblem<Real>& p, Real total, Real point, Real product) {
    return p.metric == SinkhornMetric::kDot ? -product : slope(p) * (total * point - product);
  }

  template <class F>
  void each_coordinate(const F& f) const {
    int64_t d = 0;
    for (; d + kCoordinates <= p_.width; d += kCoordinates) f(d, RowCount<kCoordinates>{});
    for (; d < p_.width; ++d) f(d, RowCount<1>{});
  }

  // Coordinates d ... d + kCount of dx for kRows rows.
  template <int kRows, int kCount>
  __attribute__((noinline)) void pull_rows(const Real* w, int64_t width, int64_t i, int64_t d, const Real* totals, Real* to_x) const {
    V acc[kRows][kCount];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) acc[r][c] = V{};
    for (int64_t j = 0; j < m_; j += kPanelWidth<Real>) {
      const Real* const panel = panels_ + j * p_.width + d * kPanelWidth<Real>;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        V y[kCount];
#pragma GCC unroll 4
        for (int c = 0; c < kCount; ++c) y[c] = load(panel + c * kPanelWidth<Real> + v * kW);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const V weight = load(w + r * width + j + v * kW);
#pragma GCC unroll 4
          for (int c = 0; c < kCount; ++c) acc[r][c] = multiply_add(weight, y[c], acc[r][c]);
        }
      }
    }
    V lanes[kRows * kCount];
    Real sums[16];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) lanes[r * kCount + c] = acc[r][c];
    sum_lanes_of(lanes, kRows * kCount, sums);
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kCount; ++c) {
        const int64_t at = (i + r) * p_.width + d + c;
        to_x[at] = pulled(p_, totals[r], p_.x[at], sums[r * kCount + c]);
      }
  }

  // The same from differences, which go to both sums.
  template <int kRows, int kCount>
  __attribute__((noinline)) void pull_apart(const Real* w, int64_t width, int64_t i, int64_t d, Real* to_x) const {
    V acc[kRows * kCount];
#pragma GCC unroll 16
    for (int q = 0; q < kRows * kCount; ++q) acc[q] = V{};
    const Real* const x = p_.x + i * p_.width + d;
    for (int64_t j = 0; j < m_; j += kPanelWidth<Real>) {
      const int64_t at = j * p_.width + d * kPanelWidth<Real>;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        V y[kCount], column[kCount];
#pragma GCC unroll 4
        for (int c = 0; c < kCount; ++c) {
          y[c] = load(panels_ + at + c * kPanelWidth<Real> + v * kW);
          column[c] = load(products_ + at + c * kPanelWidth<Real> + v * kW);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const V weight = load(w + r * width + j + v * kW);
#pragma GCC unroll 4
          for (int c = 0; c < kCount; ++c) {
            const V apart = splat(x[r * p_.width + c]) - y[c];
            acc[r * kCount + c] = multiply_add(weight, apart, acc[r * kCount + c]);
            column[c] = multiply_add(weight, apart, column[c]);
          }
        }
#pragma GCC unroll 4
        for (int c = 0; c < kCount; ++c) store(products_ + at + c * kPanelWidth<Real> + v * kW, column[c]);
      }
    }
    Real sums[16];
    sum_lanes_of(acc, kRows * kCount, sums);
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kCount; ++c) to_x[(i + r) * p_.width + d + c] = slope(p_) * sums[r * kCount + c];
  }

  // products_cj += sum_r w_rj x_rc over one panel.
  template <int kCount>
  __attribute__((noinline)) void add_columns(const Real* w, int64_t width, const Real* x, int64_t rows, Real* products) const {
    V acc[kCount][kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[c][v] = V{};
    for (int64_t r = 0; r < rows; ++r, w += width, x += p_.width) {
      V weight[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) weight[v] = load(w + v * kW);
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) {
        const V point = splat(x[c]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[c][v] = multiply_add(point, weight[v], acc[c][v]);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        Real* const to = products + c * kPanelWidth<Real> + v * kW;
        store(to, load(to) + acc[c][v]);
      }
  }
};

template <class Real>
int64_t sinkhorn_pull_workspace(const SinkhornProblem<Real>& p) {
  return PlanArrays<Real>{}.place(p, nullptr) + PointPull<Real>::tile(p) * PointPull<Real>::stride(p) + PointPull<Real>::space(p);
}

// The gradient in points of rows of `plan`, which has no `out`: of rows begin ... end in x, and what these add to that in y.
template <class Real>
void sinkhorn_pull(const SinkhornProblem<Real>& p, const SinkhornPlan<Real>& plan, Real* to_x, Real* to_y, Real* work) {
  using Pull = PointPull<Real>;
  const FlushDenormals flush;
  PlanArrays<Real> w;
  Real* const tile = work + w.place(p, work);
  const PointSums<Real> points(p, w.points);
  Pull pull(p, points, tile + Pull::tile(p) * Pull::stride(p));
  Pull::pad(p, tile, Pull::tile(p));
  begin_plan(p, plan, w);
  double steepness = 0;
  for (int64_t i = plan.begin, rows = 0; i < plan.end; i += rows) {
    rows = smaller(Pull::tile(p), plan.end - i);
    SinkhornPlan<Real> part = plan;
    part.begin = i, part.end = i + rows, part.out = tile, part.out_stride = Pull::stride(p);
    if (plan.row != nullptr) part.row += i - plan.begin;
    steepness += plan_rows<Real, Real>(p, part, points, w);
    pull.add(tile, i, rows, to_x);
  }
  pull.finish(to_y);
  if (plan.row != nullptr) finish_moments(p, plan, w, steepness);
}

}  // namespace
