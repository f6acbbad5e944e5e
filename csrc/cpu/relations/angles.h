// What the kernels of angles are given: squared distances of all pairs of rows, the student's and the teacher's. Plain pointers, no torch.
#pragma once

#include "engine/element.h"

namespace kdfast {

constexpr int64_t kAngleBlock = 64;  // j's, and k's, of a task; columns are padded to a multiple of it

// q_ij = |x_i - x_j|^2 in units of a power of four, 0 where j does not exist. high is a multiple of 2^-22, so that the sum of three is exact; low
// the rest. inverse is sqrt(1 / 2 q), 0 where q is 0.
struct AngleDistances {
  float *high, *low, *inverse;
};

// The distances lie block by block, kAngleBlock of each of the six arrays together: every array's element (i, j) is its `at(i, j)`.
struct AngleParams {
  int64_t rows, blocks;
  AngleDistances student, teacher;
  float* slopes;  // [rows, stride()] D: the losses' derivative by the distance of i and j is D_ij + D_ji; null: not wanted

  static constexpr int64_t kArrays = 6;
  int64_t stride() const { return blocks * kAngleBlock; }
  int64_t at(int64_t i, int64_t j) const { return (i * blocks + j / kAngleBlock) * kArrays * kAngleBlock + j % kAngleBlock; }
};

// One instruction set's.
struct AnglesKernels {
  double (*angle_unit)(const Matrix& x, int64_t rows, int64_t width);
  int64_t (*angle_distances_workspace)(int64_t width);  // floats
  // Rows `first` and on, kAngleBlock of them, of one side's squared distances, in units of `unit`.
  void (*angle_distances)(const AngleParams&, const Matrix& x, int64_t width, int64_t first, double unit, const AngleDistances&, float* workspace);
  int64_t (*angle_workspace)();  // floats
  double (*angle_losses)(const AngleParams&, int64_t j0, int64_t k0, float* workspace);  // between two blocks
  int64_t (*angle_gradient_lanes)();                                                      // rows of a call
  int64_t (*angle_gradient_workspace)(const AngleParams&);                                // floats
  void (*angle_gradient)(const AngleParams&, const Matrix& x, int64_t width, int64_t first, float factor, float* out, float* workspace);
};

}  // namespace kdfast
