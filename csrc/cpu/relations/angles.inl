// Relational distillation by angles: sum over all i, j, k of smooth_l1(cos of the angle at x_i between x_j and x_k, the teacher's).
//
//   cos_ijk = (q_ij + q_ik - q_jk) r_ij r_ik,   q the squared distances, r = sqrt(1 / 2 q)
//
// Rounded to floats the q of two far rows would bury that of a near one, and so would inner products of centred rows. q is formed from
// differences in double and kept as two floats, the first on a grid so coarse that q_ij + q_ik - q_jk is exact in it.
//
// With l' the loss's derivative, summed over all ordered (j, k):
//   dcos/dq_jk = -r_ij r_ik,   dcos/dq_ij = r_ij (r_ik - r_ij cos),   and the same with j and k exchanged.
// Tasks are blocks of j against blocks of k, k's not before j's: each holds for (k, j) too. One pass makes the value and the slopes D, and
// dx_a = 2 sum_b (D_ab + D_ba) (x_a - x_b). A vector of k takes 25 operations for each i and j, N^3 / 2 / kLanes times.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "relations/angles.h"
#include "relations/smooth_l1.inl"
#include "matching/symmetric.inl"
#include "engine/vector_math.h"

namespace {

using kdfast::AngleDistances;
using kdfast::AngleParams;
using kdfast::kAngleBlock;

typedef double WideVec __attribute__((vector_size(8 * KDFAST_LANES), aligned(8), may_alias));  // kLanes doubles

constexpr int64_t kAngleGroup = 16;     // rows j whose distances to a block of k stay in L1 while anchors pass by
constexpr int64_t kAngleAnchors = 64;   // anchors whose distances to both blocks stay in L2
constexpr double kAngleGrid = 1.5 * 0x1p30;  // added and subtracted it leaves multiples of 2^-22

// ---- squared distances ------------------------------------------------------------------------------------------------------

// sqrt(1 / 2 q), 0 for 0.
inline Vec angle_inverse(Vec q) {
  const Vec inverse = root(splat(0.5f) / q);
  return q == Vec{} ? Vec{} : inverse;
}

int64_t angle_distances_workspace(int64_t width) { return 2 * (kAngleBlock + kLanes) * round_up(width, kLanes); }

// A power of four that no squared distance of two of the rows exceeds.
double angle_unit(const Matrix& x, int64_t rows, int64_t width) {
  double farthest = 0;
  with_elements(x, [&](const auto* elements) {
    for (int64_t i = 1; i < rows; ++i) {
      WideVec sum = {};
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec row = load_row(elements + i * width, d, width), origin = load_row(elements, d, width);
        const WideVec difference = __builtin_convertvector(row, WideVec) - __builtin_convertvector(origin, WideVec);
        sum += difference * difference;
      }
      double q = 0;
      for (int k = 0; k < kLanes; ++k) q += sum[k];
      farthest = q > farthest ? q : farthest;
    }
  });
  int exponent = 0;
  if (farthest > 0 && farthest < 1e300) __builtin_frexp(4 * farthest, &exponent);  // all are within sqrt(farthest) of row 0
  return __builtin_ldexp(1, exponent + (exponent & 1));
}

// Squared distances from rows `first` and on, kAngleBlock of them, to all, into `out`, which is one side of p's.
void angle_distances(const AngleParams& p, const Matrix& x, int64_t width, int64_t first, double unit, const AngleDistances& out,
                     float* workspace) {
  const int64_t rows = p.rows, count = smaller(kAngleBlock, rows - first), padded = round_up(width, kLanes);
  double* const own = reinterpret_cast<double*>(workspace);  // [count][padded]
  double* const columns = own + kAngleBlock * padded;        // [padded][kLanes]
  const auto widen_row = [&](int64_t row, double* to, int64_t step) {
    with_elements(x, [&](const auto* elements) {
      for (int64_t d = 0; d < width; d += kLanes) {
        const Vec values = load_row(elements + row * width, d, width);
        for (int k = 0; k < kLanes; ++k) to[(d + k) * step] = values[k];
      }
    });
  };
  for (int64_t i = 0; i < count; ++i) widen_row(first + i, own + i * padded, 1);
  for (int64_t j = 0; j < p.stride(); j += kLanes) {
    const int64_t exist = j < rows ? smaller(kLanes, rows - j) : 0;
    for (int64_t k = 0; k < exist; ++k) widen_row(j + k, columns + k, kLanes);
    for (int64_t i = 0; i < count; i += 4) {
      const double* a[4];
      for (int r = 0; r < 4; ++r) a[r] = own + smaller(i + r, count - 1) * padded;
      DoubleVec sums[4][2] = {};
      for (int64_t d = 0; d < width; ++d) {
        const DoubleVec column[2] = {load(columns + d * kLanes), load(columns + d * kLanes + kLanes / 2)};
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const DoubleVec x = splat(a[r][d]), first = column[0] - x, second = column[1] - x;
          sums[r][0] += first * first;
          sums[r][1] += second * second;
        }
      }
      for (int64_t r = 0; r < smaller(4, count - i); ++r) {
        alignas(64) double squares[kLanes];
        alignas(64) float q[kLanes];
        store(squares, sums[r][0]);
        store(squares + kLanes / 2, sums[r][1]);
        const int64_t at = p.at(first + i + r, j);
        for (int64_t k = 0; k < kLanes; ++k) {
          const double square = k < exist ? squares[k] / unit : 0, high = (square + kAngleGrid) - kAngleGrid;
          out.high[at + k] = float(high);
          out.low[at + k] = float(square - high);
          q[k] = float(square);
        }
        store(out.inverse + at, angle_inverse(load(q)));
      }
    }
  }
}

// ---- the losses -----------------------------------------------------------------------------------------------------------------

constexpr int64_t kAngleVectors = kAngleBlock / kLanes;

// Squared distances of one block of j to one of k, and the sums of l' r_ij r_ik over some anchors, so few that little is rounded off: for each
// j the student's high and low, the teacher's, and the sums, kAngleBlock each.
struct AngleTile {
  float* rows;

  static constexpr int64_t kSums = 4 * kAngleBlock, kStride = 5 * kAngleBlock;
  float* row(int64_t j) const { return rows + j * kStride; }
};

// Squared distances of one side from an anchor to one j, and r.
struct AngleRow {
  Vec high, low, inverse;

  AngleRow(const AngleDistances& from, int64_t at) : high(splat(from.high[at])), low(splat(from.low[at])), inverse(splat(from.inverse[at])) {}
  // q_ij + q_ik - q_jk; `at`: of the distances from the anchor to k, `other`: from j to k.
  Vec numerator(const AngleDistances& from, int64_t at, const float* other) const {
    return ((load(from.high + at) - load(other)) + high) + ((load(from.low + at) - load(other + kAngleBlock)) + low);
  }
};

// The losses at anchor i between `count` <= kAngleGroup rows j, j0 + `first` and on, and a block of k; times `times` into the slopes.
template <bool kSlopes>
inline void angle_group(const AngleParams& p, int64_t i, int64_t j0, int64_t first, int64_t count, int64_t k0, float times,
                        const AngleTile& tile, WideVec* losses) {
  alignas(64) float of_rows[kAngleGroup * kLanes];
  const AngleDistances student = p.student, teacher = p.teacher;
  const int64_t at_j = p.at(i, j0 + first), at_k = p.at(i, k0);
  Vec loss = {}, of_columns[kAngleVectors] = {};
  for (int64_t a = 0; a < count; ++a) {
    const AngleRow own(student, at_j + a), wanted(teacher, at_j + a);
    float* const other = tile.row(first + a);
    Vec of_row = {};
#pragma GCC unroll 4
    for (int64_t v = 0; v < kAngleVectors; ++v) {
      const int64_t k = v * kLanes;
      const Vec inverse = load(student.inverse + at_k + k), both = own.inverse * inverse;
      const Vec cosine = own.numerator(student, at_k + k, other + k) * both;
      const Vec target = wanted.numerator(teacher, at_k + k, other + 2 * kAngleBlock + k) * (wanted.inverse * load(teacher.inverse + at_k + k));
      Vec slope;
      loss += smooth_l1(cosine - target, &slope);
      if constexpr (kSlopes) {
        float* const sum = other + AngleTile::kSums + k;
        store(sum, multiply_add(slope, both, load(sum)));
        of_row = multiply_add(slope, multiply_add(-cosine, own.inverse, inverse), of_row);
        of_columns[v] = multiply_add(slope, multiply_add(-cosine, inverse, own.inverse), of_columns[v]);
      }
    }
    store(of_rows + a * kLanes, of_row);
  }
  *losses += __builtin_convertvector(loss, WideVec);
  if constexpr (!kSlopes) return;
  const auto add = [&](int64_t at, int64_t column, Vec sums) {
    float* const to = p.slopes + i * p.stride() + column;
    store(to, multiply_add(splat(times) * load(student.inverse + at), sums, load(to)));
  };
  for (int64_t k = 0; k < kAngleBlock; k += kLanes) add(at_k + k, k0 + k, of_columns[k / kLanes]);
  for (int64_t a = count; a < round_up(count, kLanes); ++a) store(of_rows + a * kLanes, Vec{});
  for (int64_t a = 0; a < count; a += kLanes) add(at_j + a, j0 + first + a, across<Sum>(of_rows + a * kLanes));
}

int64_t angle_workspace() { return AngleTile::kStride * kAngleBlock; }

// Twice the sum over all anchors, j of block j0 and k of block k0, or once where the blocks are the same. Writes the slopes of
// those columns alone.
template <bool kSlopes>
inline double angle_tile(const AngleParams& p, int64_t j0, int64_t k0, float* workspace) {
  const AngleTile tile{workspace};
  const int64_t rows = smaller(kAngleBlock, p.rows - j0);
  const float* const from[4] = {p.student.high, p.student.low, p.teacher.high, p.teacher.low};
  for (int64_t j = 0; j < rows; ++j)
    for (int side = 0; side < 4; ++side)
      __builtin_memcpy(tile.row(j) + side * kAngleBlock, from[side] + p.at(j0 + j, k0), 4 * kAngleBlock);
  const float times = j0 == k0 ? 1 : 2;
  WideVec losses = {};
  for (int64_t begin = 0; begin < p.rows; begin += kAngleAnchors) {
    for (int64_t j = 0; j < rows; ++j) __builtin_memset(tile.row(j) + AngleTile::kSums, 0, 4 * kAngleBlock);
    for (int64_t j = 0; j < rows; j += kAngleGroup)
      for (int64_t i = begin; i < smaller(begin + kAngleAnchors, p.rows); ++i)
        angle_group<kSlopes>(p, i, j0, j, smaller(kAngleGroup, rows - j), k0, times, tile, &losses);
    for (int64_t j = 0; kSlopes && j < rows; ++j) {
      float* const to = p.slopes + (j0 + j) * p.stride() + k0;
      for (int64_t k = 0; k < kAngleBlock; k += kLanes)
        store(to + k, load(to + k) - splat(times) * load(tile.row(j) + AngleTile::kSums + k));
    }
  }
  double sum = 0;
  for (int k = 0; k < kLanes; ++k) sum += losses[k];
  return double(times) * sum;
}

double angle_losses(const AngleParams& p, int64_t j0, int64_t k0, float* workspace) {
  return p.slopes != nullptr ? angle_tile<true>(p, j0, k0, workspace) : angle_tile<false>(p, j0, k0, workspace);
}

// ---- from slopes in the distances to the rows ---------------------------------------------------------------------------------------

int64_t angle_gradient_lanes() { return kLanes; }
int64_t angle_gradient_workspace(const AngleParams& p) { return kLanes * p.stride(); }

// factor^2 times sum_b (D_ab + D_ba) (x_a - x_b) for kLanes rows a, `first` and on, to `out` [rows, width].
void angle_gradient(const AngleParams& p, const Matrix& x, int64_t width, int64_t first, float factor, float* out, float* workspace) {
  const int64_t count = smaller(kLanes, p.rows - first);
  float* const weights = workspace;  // [kLanes][stride]
  const Vec times = splat(factor);
  for (int64_t b = 0; b < p.stride(); b += kLanes) {
    alignas(64) float square[kLanes * kLanes] = {};
    for (int64_t k = 0; k < kLanes && b + k < p.rows; ++k) store(square + k * kLanes, load(p.slopes + (b + k) * p.stride() + first));
    transpose(square, kLanes, weights + b, p.stride());
    for (int64_t a = 0; a < count; ++a) {
      float* const to = weights + a * p.stride() + b;
      store(to, (load(to) + load(p.slopes + (first + a) * p.stride() + b)) * times);
    }
  }
  with_elements(x, [&](const auto* elements) {
    for (int64_t a = 0; a < count; a += 4) {
      const float* w[4];
      int64_t row[4];
      for (int r = 0; r < 4; ++r) row[r] = smaller(a + r, count - 1), w[r] = weights + row[r] * p.stride();
      for (int64_t d = 0; d < width; d += kLanes) {
        Vec own[4], sums[4] = {};
        for (int r = 0; r < 4; ++r) own[r] = load_row(elements + (first + row[r]) * width, d, width);
        for (int64_t begin = 0; begin < p.rows; begin += kAngleBlock) {
          Vec part[4] = {};
          for (int64_t b = begin; b < smaller(begin + kAngleBlock, p.rows); ++b) {
            const Vec other = load_row(elements + b * width, d, width);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) part[r] = multiply_add(splat(w[r][b]), own[r] - other, part[r]);
          }
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) sums[r] += part[r];
        }
        for (int r = 0; r < 4 && a + r < count; ++r) store_row(out + (first + a + r) * width, d, width, sums[r] * times);
      }
    }
  });
}

}  // namespace
