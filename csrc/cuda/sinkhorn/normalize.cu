// Doubly stochastic normalisation of small matrices, many to a block, and its gradient: a lane a column, its rows in registers.
//
// x = softmax of the rows + eps; columns; then rows and columns by turns, each x <- y = x/d, d = sum x + eps. Backwards from the last
// step, dx = (dy - sum dy y)/d along the dimension that was normalised, and x = y d: of a step only the divisors are kept, one a lane.
#include <math.h>

#include "sinkhorn/sinkhorn.h"
#include "sinkhorn/team.cuh"

namespace kdfast {
namespace {

template <class Team>
class Normalizer {
 public:
  __device__ Normalizer(const SinkhornNormalize& params, int matrix)
      : p_(params), team_(1), matrix_(matrix), divisors_(device::shared_memory() + threadIdx.x) {}

  __device__ void run() {
    forward(p_.gradient != nullptr);
    if (p_.gradient != nullptr) backward();
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (inside(r)) p_.out[at(r)] = x_[r];
  }

 private:
  static constexpr int R = Team::kThreadRows;
  static_assert(Team::kThreadColumns == 1 && R == Team::kLanes, "");

  const SinkhornNormalize& p_;
  const Team team_;
  const int matrix_;
  float* const divisors_;  // of step s: [s * kThreads]
  float x_[R];

  __device__ bool inside(int r) const { return r < p_.n && team_.lane < p_.n; }
  __device__ int64_t at(int r) const { return (int64_t(matrix_) * p_.n + r) * p_.n + team_.lane; }
  __device__ float& divisor(int step) const { return divisors_[step * Team::kThreads]; }

  template <class Op>
  __device__ float row_total(const float (&x)[R], Op op) const {
    float part[R];
#pragma unroll
    for (int r = 0; r < R; ++r) part[r] = x[r];
    return team_.row_total(part, op);
  }

  __device__ float column_total(const float (&x)[R]) const {
    float sum = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) sum += x[r];
    return sum;
  }

  // Steps 0, 2, ... normalise columns, the others rows.
  __device__ void forward(bool keep) {
#pragma unroll
    for (int r = 0; r < R; ++r) x_[r] = inside(r) ? kBitsPerNat * p_.logits[at(r)] : -INFINITY;
    const float most = row_total(x_, Larger()), shift = most == -INFINITY && team_.own_row() >= p_.n ? 0 : most;
#pragma unroll
    for (int r = 0; r < R; ++r) x_[r] = device::exp2_fast(x_[r] - team_.of_row(shift, r));
    const float inverse = device::divide(1, row_total(x_, Add()));
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float p = x_[r] * team_.of_row(inverse, r);
      x_[r] = inside(r) ? p + p_.eps : 0.0f;
    }
#pragma unroll 1
    for (int step = 0; step < 2 * p_.iterations - 1; ++step) {
      const bool columns = step % 2 == 0;
      const float sum = columns ? column_total(x_) : row_total(x_, Add());
      const float d = (columns ? team_.lane : team_.own_row()) < p_.n ? sum + p_.eps : 1.0f, factor = device::divide(1, d);
      if (keep) divisor(step) = d;
#pragma unroll
      for (int r = 0; r < R; ++r) x_[r] *= columns ? factor : team_.of_row(factor, r);
    }
  }

  // x: from the result to the gradient in the logits.
  __device__ void backward() {
    float dy[R], pull[R];
#pragma unroll
    for (int r = 0; r < R; ++r) dy[r] = inside(r) ? p_.gradient[at(r)] : 0.0f;
#pragma unroll 1
    for (int step = 2 * p_.iterations - 2; step >= 0; --step) {
      const bool columns = step % 2 == 0;
#pragma unroll
      for (int r = 0; r < R; ++r) pull[r] = dy[r] * x_[r];
      const float d = divisor(step), factor = device::divide(1, d);
      const float mean = columns ? column_total(pull) : row_total(pull, Add());
#pragma unroll
      for (int r = 0; r < R; ++r) {
        dy[r] = (dy[r] - (columns ? mean : team_.of_row(mean, r))) * (columns ? factor : team_.of_row(factor, r));
        x_[r] *= columns ? d : team_.of_row(d, r);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) x_[r] = inside(r) ? x_[r] - p_.eps : 0.0f, pull[r] = dy[r] * x_[r];
    const float mean = row_total(pull, Add());
#pragma unroll
    for (int r = 0; r < R; ++r) x_[r] *= dy[r] - team_.of_row(mean, r);
  }
};

template <class Team>
__global__ void __launch_bounds__(Team::kThreads) normalize_kernel(const SinkhornNormalize params) {
  const int matrix = int(blockIdx.x) * Team::kTeams + int(threadIdx.x) / Team::kLanes;
  if (matrix < params.batch) Normalizer<Team>(params, matrix).run();
}

template <class Team>
const char* run(const SinkhornNormalize& params, void* stream) {
  const int64_t blocks = (params.batch + Team::kTeams - 1) / Team::kTeams;
  const int64_t divisors = params.gradient == nullptr ? 0 : int64_t(sizeof(float)) * Team::kThreads * (2 * params.iterations - 1);
  return launch(normalize_kernel<Team>, Launch{blocks, Team::kThreads, divisors, 1, stream}, params);
}

}  // namespace

const char* sinkhorn_normalize(const SinkhornNormalize& params, void* stream) {
  if (params.n <= 4) return run<Team<4, 1, 4, 1>>(params, stream);
  if (params.n <= 8) return run<Team<8, 1, 8, 1>>(params, stream);
  if (params.n <= 32) return run<Team<32, 1, 32, 1>>(params, stream);
  return "matrices of more than 32 rows do not fit on chip";
}

}  // namespace kdfast
