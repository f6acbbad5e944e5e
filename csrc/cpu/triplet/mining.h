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

}  // namespace kdfast
