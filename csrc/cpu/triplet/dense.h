// What the kernels of losses over all negatives are given: anchors and references sorted by label. Plain pointers, no torch.
#pragma once

#include "similarity/pairs.h"
#include "triplet/metric.h"

namespace kdfast {

// Anchors are the rows and references the columns of `pairs`, both sorted by label, ready for the metric (unit length, moved to the centre).
// The references of a row's class are columns first .. last; its positives are the first `positives` of them at most, its own row left out.
// Numbers of a row's positives, `slots`, lie in groups of 2^group_shift rows: [group][positive][row of the group]. Few of them are taken as
// vectors of kSlotRows rows, many row by row.
struct DenseParams {
  PairParams pairs;
  Metric metric;
  bool in_batch;             // the references are the anchors
  bool symmetric;            // and each row's own one is itself
  bool mirrored;             // and each, with many positives, is one of all of these
  int64_t columns;           // references that exist, which come first
  int64_t positives;         // taken of a row, at most
  const int64_t *first, *last, *own;  // [rows]; own: the column of the row itself, -1 for none
  int group_shift;           // kSlotShift or 0
  const int64_t* group;      // [groups + 1]: where a group's slots begin, in its numbers of rows
  const float *x_square, *y_square;   // squared lengths, [rows] and [columns], zeros up to a multiple of a panel
  float* distance;           // slots: of the positives
  float* farthest;           // [rows]: the largest of all positives' distances, -inf where there is none; zeros as above

  static constexpr int kSlotShift = 4;
  static constexpr int64_t kSlotRows = 1 << kSlotShift;

  bool own_inside(int64_t row) const { return own[row] >= first[row] && own[row] < last[row]; }
  int64_t all_positives(int64_t row) const { return last[row] - first[row] - (own_inside(row) ? 1 : 0); }
  int64_t count(int64_t row) const { return all_positives(row) < positives ? all_positives(row) : positives; }
  int64_t negatives(int64_t row) const {
    const bool own_outside = !own_inside(row) && own[row] >= 0 && own[row] < columns;
    return columns - (last[row] - first[row]) - (own_outside ? 1 : 0);
  }
  // The column of positive number k, and the number of a column among the positives.
  int64_t column(int64_t row, int64_t k) const { return first[row] + k + (own_inside(row) && first[row] + k >= own[row] ? 1 : 0); }
  int64_t number(int64_t row, int64_t column) const { return column - first[row] - (own_inside(row) && column > own[row] ? 1 : 0); }
  int64_t slot(int64_t row, int64_t k) const {
    return ((group[row >> group_shift] + k) << group_shift) + (row & ((int64_t(1) << group_shift) - 1));
  }
  // Slots of rows begin .. end, both multiples of kSlotRows or the end.
  int64_t slots(int64_t begin, int64_t end) const { return first_slot(end) - first_slot(begin); }
  int64_t first_slot(int64_t row) const { return group[(row + (int64_t(1) << group_shift) - 1) >> group_shift] << group_shift; }
};

constexpr int64_t kTileColumns = 256;

// Marks [groups][tile_columns] of tiles in which some negative of a row of the group has a gradient.
inline int64_t tile_columns(const DenseParams& p) { return (p.pairs.columns + kTileColumns - 1) / kTileColumns; }

enum class Mining : int32_t { kBatchAll, kSemiHard, kMultiSimilarity };

// Hinges sign (d_ap - d_an) + margin of mined triplets. With `threshold`, those of pairs instead: threshold - d_an of every negative.
struct HingeRule {
  Mining mining;
  float sign, epsilon;
  double margin;
  bool soft;                  // softplus instead of the hinge: of triplets alone
  const float* threshold;     // [rows], padded as DenseParams.farthest is; null: triplets
};

struct HingeResult {
  float* loss;                // [rows]
  int64_t *mined, *active;    // [rows]: triplets (pairs), those with a hinge > 0
  float* nearest;             // [rows]: the smallest distance of a negative; for multi-similarity mining alone
  uint8_t* tiles;
};

// Of all rows, to which a task adds what it finds.
struct HingeFilter {
  float* nearest;             // [rows], as above, and a panel
  int64_t* kept;              // [rows]: negatives that pass
};

struct HingeUpstream {
  const float* g;             // [rows], zeros up to a multiple of a panel; null: values alone are wanted
  const float* nearest;
  const uint8_t* tiles;
  int32_t* active;            // slots: active triplets of each positive, where these are few; null: not counted
  float* pull;                // slots: what each positive weighs, where they are many (DensePull)
  double *x_weight, *y_weight;  // [rows], [columns]: sums of the weights; the columns' null: not wanted
};

// Hinges d_ap - level of all positives: their sums and the number of those > 0.
struct PullHinges {
  const float* level;         // [rows]
  float* sum;                 // [rows]
  int64_t* active;            // [rows]
};

// The pull of the positives: what each one's distance weighs in the gradient, d factored out.
struct DensePull {
  const float* pull;          // slots
  double *x_weight, *y_weight;  // [rows], [columns]: sums of the weights; the columns' null: not wanted
};

// See multi_similarity.inl. epsilon inf: every pair is kept.
struct MultiSimilarityRule {
  double alpha, beta;
  float base, epsilon;
};

struct MultiSimilarityResult {
  float *loss, *nearest;               // [rows]
  double *positive_log, *negative_log; // [rows]: log(1 + sum), inf in rows that do not count
  uint8_t* tiles;
};

struct MultiSimilarityUpstream {
  const float *g, *nearest;
  const double *positive_log, *negative_log;
  const uint8_t* tiles;
};

// One instruction set's.
struct DenseKernels {
  // Losses over all negatives; rows, or columns, begin .. end.
  void (*dense_squares)(const float* x, int64_t width, int64_t begin, int64_t end, float* square);
  void (*dense_positives)(const DenseParams&, int64_t begin, int64_t end);
  void (*dense_mirror)(const DenseParams&, int64_t begin, int64_t end);
  int64_t (*dense_pull_workspace)(const DenseParams&, const PairSums&, int64_t rows, int64_t columns);
  void (*dense_pull)(const DenseParams&, const PairTask&, const DensePull&, const PairSums&, float* workspace);
  void (*dense_finish_rows)(const DenseParams&, const float* pull, const double* weight, float* sums, int64_t begin, int64_t end);
  void (*dense_finish_columns)(const DenseParams&, const float* pull, double* weight, float* sums, int64_t begin, int64_t end);
  int64_t (*triplet_hinges_workspace)(const DenseParams&, int64_t rows, int64_t slots);  // floats, for tasks up to this size
  void (*triplet_hinges)(const DenseParams&, const HingeRule&, const HingeResult&, int64_t begin, int64_t end, float* workspace);
  int64_t (*triplet_hinges_grad_workspace)(const DenseParams&, const PairSums&, int64_t rows, int64_t columns, int64_t most);
  void (*triplet_hinges_grad)(const DenseParams&, const HingeRule&, const HingeUpstream&, const PairTask&, const PairSums&, int64_t most,
                              float* workspace);
  int64_t (*hinge_filter_workspace)(const DenseParams&, int64_t rows);
  void (*hinge_filter)(const DenseParams&, const HingeRule&, const HingeFilter&, int64_t begin, int64_t end, float* workspace);
  int64_t (*sorted_hinges_workspace)(const DenseParams&, const PairSums&, int64_t rows, int64_t most);
  void (*sorted_hinges)(const DenseParams&, const HingeRule&, const HingeResult&, const HingeUpstream&, const PairSums&, int64_t begin, int64_t end,
                        int64_t most, float* workspace);
  int64_t (*soft_hinges_workspace)(const DenseParams&, const PairSums&, int64_t rows, int64_t slots);
  void (*soft_hinges)(const DenseParams&, const HingeRule&, const HingeResult&, const HingeUpstream&, const PairSums&, int64_t begin, int64_t end,
                      int64_t slots, float* workspace);
  void (*triplet_hinges_pull)(const DenseParams&, const HingeRule&, const HingeUpstream&, float* pull, int64_t begin, int64_t end);
  void (*pull_hinges)(const DenseParams&, const PullHinges&, int64_t begin, int64_t end);
  void (*pull_hinges_pull)(const DenseParams&, const float* level, const float* g, float* pull, int64_t begin, int64_t end);
  int64_t (*multi_similarity_workspace)(const DenseParams&, int64_t rows);
  void (*multi_similarity)(const DenseParams&, const MultiSimilarityRule&, const MultiSimilarityResult&, int64_t begin, int64_t end,
                           float* workspace);
  int64_t (*multi_similarity_grad_workspace)(const DenseParams&, const PairSums&, int64_t rows, int64_t columns);
  void (*multi_similarity_grad)(const DenseParams&, const MultiSimilarityRule&, const MultiSimilarityUpstream&, const PairTask&,
                                const PairSums&, float* workspace);
  void (*multi_similarity_pull)(const DenseParams&, const MultiSimilarityRule&, const MultiSimilarityUpstream&, float* pull, int64_t begin,
                                int64_t end);
};

}  // namespace kdfast
