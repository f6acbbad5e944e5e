// What the minings with few triplets are given: one triplet an anchor, or one a positive pair.
#pragma once

#include "triplet/metric.h"

namespace kdfast {

// Anchors against references, both as rows in the metric.
struct ScanParams {
  Precision precision;
  Metric metric;
  MetricRows x, y;
  Classes classes;
  const int64_t* sequence;  // [rows]: the anchors by class, in which order they are taken
  bool positives_alone;     // no negative is shown
};

struct ExtremaParams {
  ScanParams scan;
  // Only negatives farther than the anchor's farthest (nearest) positive compete to be the nearest.
  bool beyond_farthest, beyond_nearest;
  bool farthest_negative;  // whether that is looked for too
  // [rows] each, -1 where there is none. A distance that is not a number is nearest and farthest.
  int64_t *farthest_positive, *nearest_positive, *nearest_negative, *most_distant_negative;
  bool* unordered;  // [rows]: a positive, or a negative that competes, has such a distance
};

// One negative for each of an anchor's first `each` positives.
struct PairsParams {
  ScanParams scan;
  int64_t each;
  int32_t* negative;  // [rows, each]; -1: none
  bool* unordered;    // [rows]: has positives and negatives, and a distance among them is not a number
};

// Drawn with weights 1 / q(d), q the density of distances on the unit sphere: d^(2 - width) (1 - d^2 / 4)^((3 - width) / 2).
struct WeightedParams {
  PairsParams pairs;
  int64_t seed;
  float least, low, high;  // squared distances: below `least` they count as it; eligible between low and high, both excluded
  bool fallback;           // an anchor without an eligible negative draws among all, else none
  int64_t existing;        // references that exist
};

// One instruction set's.
struct MiningKernels {
  // Of a batch among itself: the nearest negatives from half the pairs (extrema_triangle.inl), where that is the faster way.
  bool (*triplet_triangle_serves)(const ExtremaParams&);
  int64_t (*triplet_triangle_workspace)(const ExtremaParams&, int64_t rows);  // floats, for tasks up to this size
  bool (*triplet_triangle)(const ExtremaParams&, int64_t begin, int64_t end, float* closeness, int32_t* nearest, float* workspace);
  int64_t (*triplet_extrema_workspace)(const ExtremaParams&, int64_t rows);  // floats, for tasks up to this size
  void (*triplet_extrema)(const ExtremaParams&, int64_t begin, int64_t end, float* workspace);  // of the sequence
  int64_t (*triplet_facenet_workspace)(const PairsParams&, int64_t rows);
  void (*triplet_facenet)(const PairsParams&, int64_t begin, int64_t end, float* workspace);
  int64_t (*triplet_weighted_workspace)(const WeightedParams&, int64_t rows);
  void (*triplet_weighted)(const WeightedParams&, int64_t begin, int64_t end, float* workspace);
};

}  // namespace kdfast
