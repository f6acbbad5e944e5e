// What the Sinkhorn kernels are given: plain pointers of the device, sizes, no torch. Potentials are in units of the cost.
#pragma once

#include <stdint.h>

#include "element_type.h"

namespace kdfast {

// B problems: P_ij = a_i b_j exp((f_i + g_j - C_ij)/epsilon). All but the cost is contiguous.
struct SinkhornBatch {
  int64_t batch, n, m;
  const void* cost;  // [B, n, m], each row contiguous; a shared cost has batch stride 0
  Element element;
  int64_t batch_stride, row_stride;
  const float *a, *b, *epsilon;  // [B, n], [B, m], [B]
  const int64_t *rows, *columns; // [B], the rest is padding and is not read; null: all
  float rho_a, rho_b;            // 0: fixed marginal
};

struct SinkhornSchedule {
  int iterations;
  float tol;                           // negative: none
  bool proximal;                       // iteration t at epsilon/t, from extrapolated g
  double anneal_start, anneal_factor;  // start 0: none
};

// Outputs; 0 at padding.
struct SinkhornSolution {
  float *f, *row;            // [B, n]; row: sum_j b_j E_ij, E = exp((f + g - C)/epsilon)
  float *g, *column;         // [B, m]; column: sum_i a_i E_ij
  float *transport, *error;  // [B]
  int64_t* done;             // [B]
  float *history_f, *history_g;  // [B, iterations, n], [B, iterations, m], or null
};

// All iterations of every problem in one launch, each problem on chip.
struct SinkhornOnChip {
  SinkhornBatch problems;
  SinkhornSchedule schedule;
  const float* start_g;  // [B, m]
  SinkhornSolution out;
  int cluster;  // blocks that share a problem
};

// Matrices [B, n, n], or, where `gradient` [B, n, n] is given, what it pulls back to the logits.
struct SinkhornNormalize {
  int batch, n, iterations;
  float eps;
  const float *logits, *gradient;
  float* out;
};

// Matrices [B, rows, columns], each row contiguous, that a pass reads once.
struct SinkhornRows {
  int64_t rows, columns;
  const void* data;
  Element element;
  bool aligned;  // four numbers of a row, the first at a multiple of four, are one load
  int64_t batch_stride, row_stride;
  // How they are shared: blocks of a cluster by columns, threads of a block, ranges of rows whose sums are scratch
  int cluster, threads, parts;
};

// A pass over scores: softmax of s/epsilon + v, or its sums over the rows, or, where v is null, the log-sum-exp of s/epsilon over the rows.
struct SinkhornAssign {
  int64_t batch;
  SinkhornRows scores;
  const float* inverse_epsilon;  // []
  const float* v;                // [B, columns]
  bool codes;
  float* out;          // [B, rows, columns] or [B, columns]
  float *sums, *tops;  // [B, parts, columns], scratch
};

// All iterations of problems of any size in one launch whose blocks wait for one another.
struct SinkhornStreamed {
  int64_t batch;
  SinkhornRows cost;             // [B, n, m]; as many ranges of a problem's rows as blocks, or clusters, have it at a time
  const float *a, *b, *epsilon;  // as in SinkhornBatch, as all of these
  const int64_t *rows, *columns;
  float rho_a, rho_b;
  SinkhornSchedule schedule;
  const float* start_g;
  SinkhornSolution out;
  int slots;  // problems that are solved at a time
};

// On the current device.
bool sinkhorn_fits_on_chip(int64_t n, int64_t m);
// Whether there is SinkhornStreamed on it.
bool sinkhorn_streams();
// Set how rows are shared; false where there are too many columns.
bool sinkhorn_streamed_plan(SinkhornStreamed& params);
bool sinkhorn_assign_plan(SinkhornAssign& params);
// In floats, of a plan.
int64_t sinkhorn_streamed_scratch(const SinkhornStreamed& params);

// Each puts its work in a stream and returns null, or what went wrong.
const char* sinkhorn_on_chip(SinkhornOnChip params, void* stream);
const char* sinkhorn_streamed(const SinkhornStreamed& params, float* scratch, void* stream);
const char* sinkhorn_assign(const SinkhornAssign& params, void* stream);
const char* sinkhorn_normalize(const SinkhornNormalize& params, void* stream);

}  // namespace kdfast
