// The gradient in the cost, as steps of a replay leave it: E at a reference times a product of low rank, added once for all steps near it.
#pragma once

#include "sinkhorn/sinkhorn_replay_arrays.inl"
#include "sinkhorn/sinkhorn_rows.inl"

namespace {

template <class Real, class T>
class LowRankGradient {
 public:
  LowRankGradient(const SinkhornProblem<Real>& problem, const SinkhornReplay<Real>& replay, const SinkhornTeam& team, const ReplayArrays<Real>& arrays)
      : p_(problem), r_(replay), team_(team), w_(arrays) {}

  int64_t rank = 0;      // rows of left and right in use, at exponents reference_f and reference_g
  Real reference_k = 0;

  bool written() const { return written_; }

  void clear() {
    for (int64_t i = 0; i < p_.n; ++i) __builtin_memset(r_.cost + i * r_.cost_stride, 0, size_t(p_.m) * sizeof(Real));
    written_ = true;
  }

  // dC_ij += E_ij sum_s left_is right_sj at the reference, whose E is `stored`, or is formed.
  void add(bool stored) {
    if (rank == 0) return;
    stored_ = stored;
    team_.run(team_.size, [](void* self, int64_t worker) { static_cast<LowRankGradient*>(self)->multiply(worker); }, this);
    written_ = true;
    rank = 0;
  }

 private:
  using V = VecOf<Real>;
  static constexpr int64_t kW = kWidth<Real>;

  void multiply(int64_t worker) const {
    const FlushDenormals flush;
    const int64_t end = (worker + 1) * p_.n / team_.size;
    for (int64_t i = worker * p_.n / team_.size, rows = 0; i < end; i += rows) {
      rows = smaller(kTogether, end - i);
      each_rows(rows, [&](int64_t r, auto together) {
        constexpr int kRows = decltype(together)::value;
        Real left[kRank * kRows];
        for (int64_t s = 0; s < rank; ++s) __builtin_memcpy(left + s * kRows, w_.left + s * w_.n + i + r, kRows * sizeof(Real));
        for (int64_t j = 0; j < p_.m; j += kPanelWidth<Real>) {
          if (stored_) {
            multiply_tile<kRows, true>(i + r, j, left);
          } else {
            multiply_tile<kRows, false>(i + r, j, left);
          }
        }
      });
    }
  }

  template <int kRows, bool kStored>
  void multiply_tile(int64_t i, int64_t j, const Real* left) const {
    V sum[kRows][kVecs] = {};
    const Real* right = w_.right + j;
    for (int64_t s = 0; s < rank; ++s, right += w_.m) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V factor = splat(left[s * kRows + r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] = multiply_add(factor, load(right + v * kW), sum[r][v]);
      }
    }
    const CostRows<Real, T> rows{static_cast<const T*>(p_.cost) + i * p_.cost_stride, p_.cost_stride, w_.reference_g, reference_k, p_.m};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Real* const to = r_.cost + (i + r) * r_.cost_stride;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const int64_t at = j + v * kW, count = smaller(kW, p_.m - at);
        if (count <= 0) continue;
        V e;
        if constexpr (kStored) {
          e = load(w_.kernel + i * w_.m + kRows * at + r * kW);
        } else {
          e = exp2(at_most_largest<Real>(rows.at(r, at, count, splat(w_.reference_f[i + r]))));
        }
        const V out = e * sum[r][v];
        store_count(to + at, written_ ? out + load_count<Real>(to + at, count) : out, count);
      }
    }
  }

  const SinkhornProblem<Real>& p_;
  const SinkhornReplay<Real>& r_;
  const SinkhornTeam& team_;
  const ReplayArrays<Real>& w_;
  bool stored_ = false, written_ = false;  // E is, something is in the gradient
};

}  // namespace
