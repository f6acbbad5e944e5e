// kdfast::rkd_angle on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "dispatch.h"

namespace {

using kdfast::AngleDistances;
using kdfast::kAngleBlock;

kdfast::Matrix rows_of(const char* name, const Tensor& x, int64_t rows) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), name, " must have 2 dimensions and be contiguous");
  return row_matrix(name, x, {rows, x.size(1)});
}

// f(worker, task, workspace of `words` floats) for every task.
template <class F>
void for_each_with_scratch(int64_t workers, int64_t tasks, int64_t words, const F& f) {
  const Tensor workspace = scratch(workers * words);
  float* const work = static_cast<float*>(workspace.mutable_data_ptr());
  for_each_task(workers, tasks, [&](int64_t worker, int64_t t) { f(t, work + worker * words); });
}

// All pairs of blocks j <= k, in rounds: in a round no two pairs share a block.
std::vector<std::vector<std::pair<int64_t, int64_t>>> rounds_of_pairs(int64_t blocks) {
  std::vector<std::vector<std::pair<int64_t, int64_t>>> rounds(1);
  for (int64_t j = 0; j < blocks; ++j) rounds[0].emplace_back(j, j);
  const int64_t circle = (blocks + 1) / 2 * 2 - 1;  // all but the last block, or all and an empty place
  for (int64_t round = 0; round < circle && blocks > 1; ++round) {
    rounds.emplace_back();
    const auto add = [&](int64_t j, int64_t k) {
      if (std::max(j, k) < blocks) rounds.back().emplace_back(std::min(j, k), std::max(j, k));
    };
    add(round, circle);
    for (int64_t s = 1; s <= circle / 2; ++s) add((round + s) % circle, (round - s + circle) % circle);
  }
  return rounds;
}

std::tuple<Tensor, Tensor> rkd_angle(const Tensor& student, const Tensor& teacher, bool gradient) {
  STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2, "student and teacher must have 2 dimensions");
  const int64_t n = student.size(0), width = student.size(1), blocks = (n + kAngleBlock - 1) / kAngleBlock;
  const kdfast::Matrix x = rows_of("student", student, n), y = rows_of("teacher", teacher, n);
  kdfast::AngleParams p{};
  p.rows = n, p.blocks = blocks;
  Tensor value = output(student, {}), gradients = output(student, gradient ? std::vector<int64_t>{n, width} : std::vector<int64_t>{0});
  float* const out = static_cast<float*>(value.mutable_data_ptr());
  *out = 0;
  if (n == 0) return {value, gradients};

  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t size = n * p.stride(), arrays = kdfast::AngleParams::kArrays;
  const Tensor memory = scratch((arrays + gradient) * size);
  float* const at = static_cast<float*>(memory.mutable_data_ptr());
  p.student = {at, at + kAngleBlock, at + 2 * kAngleBlock}, p.teacher = {at + 3 * kAngleBlock, at + 4 * kAngleBlock, at + 5 * kAngleBlock};
  p.slopes = gradient ? at + arrays * size : nullptr;
  std::fill_n(at + arrays * size, gradient ? size : 0, 0.0f);
  const double pairs = double(n) * double(n);
  const auto distances = [&](const kdfast::Matrix& rows, int64_t columns, const AngleDistances& to) {
    const double unit = kernels.angle_unit(rows, n, columns);
    for_each_with_scratch(workers_for(pairs * double(columns)), blocks, kernels.angle_distances_workspace(columns),
                          [&](int64_t t, float* work) { kernels.angle_distances(p, rows, columns, t * kAngleBlock, unit, to, work); });
    return unit;
  };
  const double unit = distances(x, width, p.student);
  distances(y, teacher.size(1), p.teacher);

  double sum = 0;
  const int64_t workers = workers_for(pairs * double(n) * 12, blocks);
  for (const auto& round : rounds_of_pairs(blocks)) {
    std::vector<double> losses(round.size());
    for_each_with_scratch(workers, int64_t(round.size()), kernels.angle_workspace(), [&](int64_t t, float* work) {
      losses[t] = kernels.angle_losses(p, round[t].first * kAngleBlock, round[t].second * kAngleBlock, work);
    });
    for (const double loss : losses) sum += loss;
  }
  *out = float(sum / pairs / double(n));
  if (gradient) {
    const int64_t lanes = kernels.angle_gradient_lanes();
    const float factor = float(std::sqrt(2 / (unit * pairs * double(n))));
    for_each_with_scratch(workers_for(pairs * double(width)), (n + lanes - 1) / lanes, kernels.angle_gradient_workspace(p),
                          [&](int64_t t, float* work) {
                            kernels.angle_gradient(p, x, width, t * lanes, factor, static_cast<float*>(gradients.mutable_data_ptr()), work);
                          });
  }
  return {value, gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("rkd_angle", TORCH_BOX(&rkd_angle)); }
