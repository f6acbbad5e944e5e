// What potentials make of one problem: the marginals of its plan and what the plan costs.
#pragma once

#include "sinkhorn/sinkhorn_arrays.inl"
#include "sinkhorn/sinkhorn_rows.inl"

namespace {

using kdfast::SinkhornSolution;

constexpr double kMaxEntry = 0x1p115;  // rows without weight may be near any column: their sums are reported as at most this

// Exponents of columns: those without weight, which any row without weight may be infinitely near, are left out.
template <class V, class Real>
inline V column_exponent(V b, V g, Real k) {
  return b > V{} ? k * g : V{} + Real(-__builtin_inf());
}

template <class Real, class T>
class SinkhornMarginals {
 public:
  SinkhornMarginals(const SinkhornProblem<Real>& problem, const PointSums<Real>& points, const SinkhornTeam& team, const SinkhornArrays<Real>& arrays,
                    Real k, Real damp_b, const SinkhornSolution<Real>& out)
      : p_(problem), points_(points), team_(team), w_(arrays), k_(k), damp_b_(damp_b), out_(out) {}

  // row, col and transport of the solution; returns the L1 error of the row marginal.
  double measure() {
    for (int64_t j = 0; j < w_.m; j += kW) store(w_.scale + j, column_exponent(load(w_.b + j), load(w_.g + j), k_));
    team_.run(team_.size, [](void* self, int64_t worker) { static_cast<SinkhornMarginals*>(self)->measure_rows(worker); }, this);
    double error = 0, transport = 0;
    for (int64_t worker = 0; worker < team_.size; ++worker) error += double(w_.shares[worker * kShare]), transport += double(w_.shares[worker * kShare + 1]);
    *out_.transport = Real(transport);
    // of a column without weight: lambda_b log2 sum_i a_i 2^(k (f_i - C_ij)) = -k g
    for (int64_t j = 0; j < w_.m; j += kW) store(w_.scale + j, exp2((1 - 1 / damp_b_) * k_ * load(w_.g + j)));
    for (int64_t j = 0; j < p_.m; ++j) {
      Real sum = 0;
      for (int64_t worker = 0; worker < team_.size; ++worker) sum += w_.columns[worker * w_.worker_columns + j];
      out_.col[j] = w_.b[j] > 0 ? sum : w_.scale[j] > Real(kMaxEntry) ? Real(kMaxEntry) : w_.scale[j];
    }
    return error;
  }

 private:
  using V = VecOf<Real>;
  static constexpr int64_t kW = kWidth<Real>;

  void measure_rows(int64_t worker) const {
    const FlushDenormals flush;
    const int64_t begin = worker * p_.n / team_.size, end = (worker + 1) * p_.n / team_.size;
    Real *const columns = w_.columns + worker * w_.worker_columns, *const chunk = columns + w_.m;
    for (int64_t j = 0; j < w_.m; ++j) columns[j] = chunk[j] = 0;
    double error = 0, transport = 0;
    for (int64_t i = begin, rows = 0; i < end; i += rows) {
      rows = smaller(kGroup, end - i);
      CostRows<Real, T> costs{nullptr, 0, w_.scale, k_, p_.m};
      costs.c = cost_rows<Real, T>(p_, points_, i, rows, 0, p_.m, w_.costs + worker * w_.worker_entries, &costs.stride);
      V mass_lanes[kGroup], cost_lanes[kGroup];
      Real u[kGroup] = {}, mass[kGroup], cost[kGroup];
      for (int64_t r = 0; r < rows; ++r) u[r] = k_ * w_.f[i + r];
      each_rows(rows, [&](int64_t r, auto together) {
        add_costs<decltype(together)::value, true, Real>(costs.from(r), u + r, w_.b, w_.a + i + r, nullptr, chunk, mass_lanes + r, cost_lanes + r);
      });
      sum_lanes_of(mass_lanes, rows, mass);
      sum_lanes_of(cost_lanes, rows, cost);
      for (int64_t r = 0; r < rows; ++r) {
        const Real a = w_.a[i + r];
        out_.row[i + r] = mass[r] > Real(kMaxEntry) ? Real(kMaxEntry) : mass[r];
        if (a == 0) continue;  // its mass and cost may be infinite
        const double wanted = p_.rho_a > 0 ? __builtin_exp(-double(w_.f[i + r]) / p_.rho_a) : 1.0;
        transport += double(a) * double(cost[r]);
        error += __builtin_fabs(double(a) * (double(mass[r]) - wanted));
      }
      if ((i - begin) / kChunk != (i + rows - begin) / kChunk) add_chunk(columns, chunk, w_.m);
    }
    add_chunk(columns, chunk, w_.m);
    Real* const share = w_.shares + worker * kShare;
    share[0] = Real(error), share[1] = Real(transport);
  }

  const SinkhornProblem<Real>& p_;
  const PointSums<Real>& points_;
  const SinkhornTeam& team_;
  const SinkhornArrays<Real>& w_;
  const Real k_, damp_b_;
  const SinkhornSolution<Real>& out_;
};

}  // namespace
