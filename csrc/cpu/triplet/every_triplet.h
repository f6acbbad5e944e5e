// What the kernels that visit every triplet are given: the space that mines and those whose losses are summed. Plain pointers, no torch.
#pragma once

#include "triplet/dense.h"

namespace kdfast {

// A batch and its references as one tensor has them.
struct TripletSpace {
  DenseParams anchors;  // their positives, at `slots`
  DenseParams rows;     // the rows of the pass, as far as distances to the columns, and columns left out, are concerned
};

constexpr int64_t kMostLayers = 16;

// Triplets are mined in one space and have a loss in each layer. Rows pass in units; with `swap` a unit holds whole classes, anchors beside all
// their references, else anchors alone.
struct EveryTriplet {
  HingeRule rule;
  bool swap;                    // the nearer of d_an and d_pn
  bool separate;                // no layer is mined on; else layer 0 is
  TripletSpace mine;
  const TripletSpace* layers;   // [layer_count], at most kMostLayers
  int64_t layer_count;
  int64_t rows, unit_count;
  const int64_t* units;         // [unit_count + 1]: where units begin, multiples of every_triplet_chunk
  const int64_t* anchor;        // [rows]: the anchor there, -1 for none
  const int64_t* references;    // [rows]: where the references of its class begin; with swap alone
  int64_t most_unit;            // rows of a unit, at most
};

// What is added to: sums of the anchors, and of a layer's rows and pairs.
struct EveryState {
  double *sum, *mined, *active;       // [anchors]
  double *const *pull, *const *weight;  // of each layer: slots, sums of the slopes; [rows], sums of the weights
};

struct EveryGradients {
  const float* g;                // [anchors]; null: values alone are wanted
  const float* nearest;          // [anchors], as HingeResult has it
  const PairSums* sums;          // of each layer: [rows], and all columns
  double* const* y_weight;       // of each layer: [columns], sums of the weights; null: not wanted
};

// One instruction set's.
struct EveryTripletKernels {
  int64_t (*every_triplet_chunk)(Precision);  // rows that a unit has a multiple of
  int64_t (*every_triplet_workspace)(const EveryTriplet&, const PairSums* sums);
  void (*every_triplet)(const EveryTriplet&, const EveryGradients&, const EveryState&, int64_t unit_begin, int64_t unit_end, float* workspace);
  void (*every_triplet_finish)(const EveryTriplet&, const EveryState&, const HingeResult&);
  void (*every_triplet_pull)(const EveryTriplet&, int64_t layer, const float* g, const EveryState&, float* pull);
};

}  // namespace kdfast
