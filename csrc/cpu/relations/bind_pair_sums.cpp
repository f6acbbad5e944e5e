// kdfast::gaussian_sums and kdfast::rkd_distance on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "bind.h"
#include "dispatch.h"
#include "workspace.h"

namespace {

using kdfast::PairResults;
using kdfast::PairSide;
using kdfast::PairSumParams;

// One side of the pairs, and the memory of its squares. Rows and columns may be one tensor.
struct Side {
  PairSide side;
  Tensor squares;

  Side(const char* x_name, const Tensor& x, const char* y_name, const Tensor& y)
      : squares(scratch(x.size(0) + y.size(0))) {
    const int64_t n = x.size(0), m = y.size(0), width = x.size(1);
    const float *const rows = packed<float>(x_name, x, {n, width}), *const columns = packed<float>(y_name, y, {m, width});
    float* const square = static_cast<float*>(squares.mutable_data_ptr());
    kdfast::cpu_kernels().row_squares(rows, n, width, square);
    kdfast::cpu_kernels().row_squares(columns, m, width, square + n);
    side = {width, matrix(x_name, x), matrix(y_name, y), square, square + n};
  }
};

struct Totals {
  double value, second;
};

// pass(results, begin, end, workspace) over ranges of rows, one a worker; the sums over all rows, in their order.
template <class Pass>
Totals sum_rows(const PairSumParams& p, float* gradient, const Pass& pass) {
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  std::vector<double> value(p.rows), second(p.rows);
  const PairResults out{value.data(), second.data(), gradient};
  const double width = double(p.side.width) * (gradient != nullptr ? 2 : 1) + double(p.teacher.width);
  const int64_t workers = workers_for(double(p.rows) * double(p.columns) * width);
  const int64_t words = kernels.pair_sums_workspace(p, gradient != nullptr, (p.rows + workers - 1) / workers + kRowsApart);
  const Workspace<float> workspace = product_workspace(workers * words);
  float* const work = workspace.data();
  for_each_rows(workers, p.rows, [&](int64_t worker, int64_t begin, int64_t end) { pass(out, begin, end, work + worker * words); });
  return {std::accumulate(value.begin(), value.end(), 0.0), std::accumulate(second.begin(), second.end(), 0.0)};
}

Tensor gradient_like(const Tensor& x, bool wanted) {
  return output(x, wanted ? std::vector<int64_t>{x.size(0), x.size(1)} : std::vector<int64_t>{0});
}

// sum_ij sum_sigma exp(-|x_i - y_j|^2 / 2 sigma^2), and its gradient in x where y stays.
std::tuple<Tensor, Tensor> gaussian_sums(const Tensor& x, const Tensor& y, const std::vector<double>& sigmas, bool same, bool gradient) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2, "x and y must have 2 dimensions");
  STD_TORCH_CHECK(!same || x.size(0) == y.size(0), "x and y must be the same rows");
  const Side side("x", x, "y", y);
  PairSumParams p{};
  p.rows = x.size(0), p.columns = y.size(0), p.same = same, p.side = side.side;
  std::vector<float> rate, weight;
  for (const double sigma : sigmas) {
    rate.push_back(float(-1 / (2 * std::log(2.0) * sigma * sigma)));
    weight.push_back(float(1 / (sigma * sigma)));
  }
  Tensor value = output(x, {}, ScalarType::Double), out = gradient_like(x, gradient);
  float* const to = gradient ? static_cast<float*>(out.mutable_data_ptr()) : nullptr;
  const Totals totals = sum_rows(p, to, [&](const PairResults& results, int64_t begin, int64_t end, float* work) {
    kdfast::cpu_kernels().pair_gaussians(p, int64_t(rate.size()), rate.data(), weight.data(), results, begin, end, work);
  });
  *static_cast<double*>(value.mutable_data_ptr()) = totals.value;
  return {value, out};
}

// With mean and mean' those of the distances that are not 0, w the loss's derivative and c = sum w d / (mean count):
//   d loss / d x_i = 2 / (N^2 mean) sum_j (w_ij - c) (x_i - x_j) / d_ij.
std::tuple<Tensor, Tensor> rkd_distance(const Tensor& student, const Tensor& teacher, bool gradient) {
  STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2, "student and teacher must have 2 dimensions");
  const int64_t n = student.size(0), width = student.size(1);
  const Side students("student", student, "student", student), teachers("teacher", teacher, "teacher", teacher);
  check("teacher", teacher, ScalarType::Float, {n, teacher.size(1)});
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  PairSumParams p{};
  p.rows = p.columns = n, p.same = true, p.side = teachers.side;
  Tensor value = output(student, {}), out = gradient_like(student, gradient), of_mean = gradient_like(student, gradient);
  float* const slopes = gradient ? static_cast<float*>(out.mutable_data_ptr()) : nullptr;
  float* const mean_slopes = gradient ? static_cast<float*>(of_mean.mutable_data_ptr()) : nullptr;
  const auto distances = [&](float* to) {
    return sum_rows(p, to, [&](const PairResults& results, int64_t begin, int64_t end, float* work) {
      kernels.pair_distances(p, results, begin, end, work);
    });
  };
  const auto mean_of = [](const Totals& t) { return t.second > 0 ? t.value / t.second : t.value + 1; };  // 1 for no distance, or NaN
  const double teacher_mean = mean_of(distances(nullptr));
  p.side = students.side;
  const Totals of_student = distances(mean_slopes);
  const double mean = mean_of(of_student);
  p.teacher = teachers.side;
  const Totals losses = sum_rows(p, slopes, [&](const PairResults& results, int64_t begin, int64_t end, float* work) {
    kernels.pair_distance_losses(p, float(1 / mean), float(1 / teacher_mean), results, begin, end, work);
  });
  const double pairs = std::max(1.0, double(n) * double(n));
  *static_cast<float*>(value.mutable_data_ptr()) = float(losses.value / pairs);
  if (gradient) {
    const double factor = 2 / (pairs * mean), c = of_student.second > 0 ? losses.second / (mean * of_student.second) : 0;
    for (int64_t k = 0; k < n * width; ++k) slopes[k] = float(factor * (double(slopes[k]) - c * double(mean_slopes[k])));
  }
  return {value, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("gaussian_sums", TORCH_BOX(&gaussian_sums));
  m.impl("rkd_distance", TORCH_BOX(&rkd_distance));
}
