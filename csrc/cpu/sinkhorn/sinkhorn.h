// What the Sinkhorn kernels are given: plain pointers, 64-bit sizes, no torch. Real is float or double.
#pragma once

#include "engine/element.h"

namespace kdfast {

enum class SinkhornMetric : int32_t { kGiven, kSquared, kEuclidean, kDot };  // kDot: 1 - x.y
enum class SinkhornMethod : int32_t { kLog, kKernel, kProximal };

// One problem: P_ij = a_i b_j exp((f_i + g_j - C_ij)/epsilon). Everything is contiguous but the cost's rows.
template <class Real>
struct SinkhornProblem {
  SinkhornMetric metric;
  ElementType type;     // of a given cost where Real is float; a double problem has a double cost
  const void* cost;     // [n, m], each row contiguous
  int64_t cost_stride;  // elements from one row of the cost to the next
  const Real *x, *y;    // [n, width], [m, width] where the cost is not given
  int64_t n, m, width;
  const Real *a, *b;  // [n], [m]
  double epsilon;
  double rho_a, rho_b;  // 0: fixed marginal
};

struct SinkhornSchedule {
  SinkhornMethod method;
  int64_t iterations;
  double tol;           // negative: none
  double anneal_start;  // 0: none
  double anneal_factor;
};

// Outputs. Where no iterations are asked for, f and g are given, and only what they make is written: row, col, transport and error. Without a
// tolerance row may be null, and none of these are, which take a pass. History may be null: [iterations][n] and [iterations][m], with strides.
template <class Real>
struct SinkhornSolution {
  Real *f, *row;  // [n]; row: sum_j b_j E_ij, E = exp((f + g - C)/epsilon)
  Real *g, *col;  // [m]; col: sum_i a_i E_ij; before: what to start from
  Real *transport, *error;
  int64_t* done;
  Real *history_f, *history_g;
  int64_t history_f_stride, history_g_stride;
};

// The gradient through the first `done` iterations of a schedule from upstream [n], [m] of the last potentials.
template <class Real>
struct SinkhornReplay {
  SinkhornSchedule schedule;
  int64_t done;
  const Real *start_g, *history_f, *history_g;  // [m], [iterations][n], [iterations][m]
  int64_t history_f_stride, history_g_stride;
  const Real *to_f, *to_g;
  bool to_epsilon;
  Real *cost, *a, *b, *epsilon;  // gradients; of the cost untouched where nothing was done
  int64_t cost_stride;
  Real *x, *y;  // gradients in points [n, width], [m, width], in place of the cost's
};

// Rows of (weight + slope C_ij) P_ij, P_ij = a_i b_j E_ij at some potentials; f null: of the cost.
template <class Real>
struct SinkhornPlan {
  const Real *f, *g;  // [n], [m]
  double weight;
  bool over_cost;      // divided by C_ij, 0 where that is 0
  bool add;            // to what is in out
  int64_t begin, end;  // rows
  Real* out;           // [end - begin, m]
  int64_t out_stride;
  double slope;            // only with moments
  // Null, or moments of these rows: sum_j b_j E_ij C_ij [end - begin], sum_i a_i E_ij C_ij [m], sum_ij P_ij C_ij log E_ij
  Real *row, *col, *steepness;
};

// Of rows begin ... end: columns_j = sum_i E_ij (plus_i + factor_i sum_j' E_ij' v_j'), E at potentials f and g.
template <class Real>
struct SinkhornProduct {
  const Real *f, *g;          // [n], [m]
  const Real* v;              // [m]
  const Real *plus, *factor;  // [n]
  int64_t begin, end;
  Real* columns;  // [m], written
};

// Sums with which codes are made from stored exponentials (sinkhorn_codes.inl) lie between the inverse of this and this.
constexpr double kBalancedCodes = 0x1p30;

// One pass over rows begin ... end of scores [rows, columns]; factor = log2(e)/epsilon. Without v: the largest factor s of each column
// and its sum of 2^(factor s - largest). With v [columns]: the column sums of softmax(s/epsilon + v) (padded by a vector), or that itself.
// Or by stored exponentials K: with codes, but no v, K is written there, and its column sums; without scores K is in the codes, v holds
// factors of its columns, and the sums are those of K_ij / sum_j K_ij v_j; without sums the codes are made. With end < begin rows are taken
// from the last to the first. Where a row is not balanced the first of largest is NaN, else 0.
template <class Real>
struct SinkhornAssign {
  ElementType type;  // of the scores where Real is float
  const void* scores;
  int64_t stride, columns, begin, end;
  double factor;
  const Real* v;
  Real *largest, *sums, *codes;
};

// Matrices [n, n] one after another, or the gradient in logits where one is given.
template <class Real>
struct SinkhornNormalize {
  int64_t n, iterations;
  double eps;
  const Real *logits, *gradient;
  Real* out;
};

// Those who share the work on one problem: run(size, body, self) calls body(self, worker) for each worker < size.
struct SinkhornTeam {
  int64_t size;
  void (*run)(int64_t size, void (*body)(void* self, int64_t worker), void* self);
};

// One instruction set's.
struct SinkhornKernels {
  // Elements of workspace for problems up to this size; the solution of one.
  int64_t (*sinkhorn_workspace)(const SinkhornProblem<float>&, const SinkhornSchedule&, int64_t workers);
  int64_t (*sinkhorn_workspace_double)(const SinkhornProblem<double>&, const SinkhornSchedule&, int64_t workers);
  void (*sinkhorn_solve)(const SinkhornProblem<float>&, const SinkhornSchedule&, const SinkhornTeam&, const SinkhornSolution<float>&, float* workspace);
  void (*sinkhorn_solve_double)(const SinkhornProblem<double>&, const SinkhornSchedule&, const SinkhornTeam&, const SinkhornSolution<double>&, double* workspace);
};

// One instruction set's.
struct SinkhornGradientKernels {
  int64_t (*sinkhorn_plan_workspace)(const SinkhornProblem<float>&);
  int64_t (*sinkhorn_plan_workspace_double)(const SinkhornProblem<double>&);
  void (*sinkhorn_plan)(const SinkhornProblem<float>&, const SinkhornPlan<float>&, float* workspace);
  void (*sinkhorn_plan_double)(const SinkhornProblem<double>&, const SinkhornPlan<double>&, double* workspace);
  // The gradient in points that rows of a plan, its `out` null, are in their cost: rows begin ... end of that in x, and what they add to that in y [m, width].
  int64_t (*sinkhorn_pull_workspace)(const SinkhornProblem<float>&);
  int64_t (*sinkhorn_pull_workspace_double)(const SinkhornProblem<double>&);
  void (*sinkhorn_pull)(const SinkhornProblem<float>&, const SinkhornPlan<float>&, float* x, float* y, float* workspace);
  void (*sinkhorn_pull_double)(const SinkhornProblem<double>&, const SinkhornPlan<double>&, double* x, double* y, double* workspace);
  int64_t (*sinkhorn_product_workspace)(const SinkhornProblem<float>&);
  int64_t (*sinkhorn_product_workspace_double)(const SinkhornProblem<double>&);
  void (*sinkhorn_product)(const SinkhornProblem<float>&, const SinkhornProduct<float>&, float* workspace);
  void (*sinkhorn_product_double)(const SinkhornProblem<double>&, const SinkhornProduct<double>&, double* workspace);
  int64_t (*sinkhorn_replay_workspace)(const SinkhornProblem<float>&, const SinkhornReplay<float>&, int64_t workers);
  int64_t (*sinkhorn_replay_workspace_double)(const SinkhornProblem<double>&, const SinkhornReplay<double>&, int64_t workers);
  void (*sinkhorn_replay)(const SinkhornProblem<float>&, const SinkhornReplay<float>&, const SinkhornTeam&, float* workspace);
  void (*sinkhorn_replay_double)(const SinkhornProblem<double>&, const SinkhornReplay<double>&, const SinkhornTeam&, double* workspace);
};

// One instruction set's.
struct SinkhornLayersKernels {
  int64_t (*sinkhorn_assign_workspace)(const SinkhornAssign<float>&);
  int64_t (*sinkhorn_assign_workspace_double)(const SinkhornAssign<double>&);
  void (*sinkhorn_assign)(const SinkhornAssign<float>&, float* workspace);
  void (*sinkhorn_assign_double)(const SinkhornAssign<double>&, double* workspace);
  int64_t (*sinkhorn_normalize_workspace)(const SinkhornNormalize<float>&);
  int64_t (*sinkhorn_normalize_workspace_double)(const SinkhornNormalize<double>&);
  void (*sinkhorn_normalize)(const SinkhornNormalize<float>&, int64_t begin, int64_t end, float* workspace);  // matrices
  void (*sinkhorn_normalize_double)(const SinkhornNormalize<double>&, int64_t begin, int64_t end, double* workspace);
};

}  // namespace kdfast
