// Hinges of every triplet of the set minings, summed in one pass over the negatives.
//
// For each positive of a row a window (dense_levels.inl) is laid over the row's levels: S += t - v and c += 1 where v lies in it, in floats
// along a block and in double beyond. Nothing cancels. What a positive's filter needs to know of all negatives, their nearest, is
// found in the same pass: sums are kept apart for each positive, and those not taken are dropped at the end.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/dense_positives.inl"

namespace {

using kdfast::HingeResult;

// Lanes of kLanes rows, reduced to one number each and added to `to`.
inline void add_across(const float* lanes, double* to) {
  alignas(64) float sums[kLanes];
  store(sums, across<Sum>(lanes));
  for (int i = 0; i < kLanes; ++i) to[i] += double(sums[i]);
}

struct HingeStatistic {
  const DenseParams& p;
  const HingeRule& rule;
  const HingeResult& out;
  const PairTask& task;
  int64_t first = 0, base = 0;  // first row of the pass; slot that the task's sums begin with
  double *sum = nullptr, *active = nullptr;   // slots of the task
  double *ties = nullptr, *kept = nullptr;    // [rows of the task]: levels at the closed end of a window, negatives that pass the filter
  float* nearest = nullptr;                   // [rows of the task]
  float *sums = nullptr, *counts = nullptr, *lanes = nullptr;  // by lanes, of kLanes rows

  static double* doubles(int64_t count, Arena& arena) { return reinterpret_cast<double*>(arena.take(2 * count)); }

  WindowTable table() const { return {p, rule}; }

  void plan(int64_t rows, int64_t slots, Arena& arena) {
    const int64_t windows = slots > round_up(rows, kSlotRows) ? slots : round_up(rows, kSlotRows);
    sum = doubles(windows, arena), active = doubles(windows, arena);
    ties = doubles(rows + kSlotRows, arena), kept = doubles(rows + kSlotRows, arena);
    nearest = arena.take(rows + kSlotRows);
    sums = arena.take(kLanes * kLanes), counts = arena.take(kLanes * kLanes), lanes = arena.take(kLanes * kLanes);
  }

  // `slots` of the task's rows.
  void begin(int64_t rows, int64_t slots) {
    base = rule.threshold != nullptr ? task.row_begin : p.first_slot(task.row_begin);
    for (int64_t k = 0; k < slots; ++k) sum[k] = active[k] = 0;
    for (int64_t i = 0; i < rows + kSlotRows; ++i) ties[i] = kept[i] = 0, nearest[i] = kInfinity;
  }

  void begin_rows(int64_t row) { first = row; }
  void begin_block(const Block&) const {}

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    for (int64_t i = 0; i < rows; i += kLanes) subgroup(block, first + row + i, smaller(kLanes, rows - i), tile, i);
  }

  // kLanes rows of a group of slots.
  void subgroup(const Block& block, int64_t row, int64_t rows, const Tile& tile, int64_t in_tile) const {
    const WindowTable windows_of = table();
    int64_t most = 0;
    for (int64_t i = 0; i < rows; ++i) {
      level_row(block, row + i, tile.scores(in_tile + i), i);
      most = windows_of.count(row + i) > most ? windows_of.count(row + i) : most;
    }
    if (rule.mining == Mining::kMultiSimilarity) filter(block, row, rows, tile, in_tile);
    const bool low = has_low_end(rule), with_ties = rule.mining == Mining::kSemiHard && rule.sign > 0;
    double found = 0;
    for (int64_t k = 0; k < most; ++k) {
      const int64_t slot = windows_of.slot(row, k);
      alignas(64) float t[kLanes], low_end[kLanes], high_end[kLanes];
      const Windows w = windows_of.at(row, k);
      store(t, w.t), store(low_end, w.low), store(high_end, w.high);
      for (int64_t i = 0; i < kLanes; ++i) {
        if (i >= rows || k >= windows_of.count(row + i)) {
          store(sums + i * kLanes, Vec{}), store(counts + i * kLanes, Vec{}), store(lanes + i * kLanes, Vec{});
          continue;
        }
        const Windows own{splat(t[i]), splat(low_end[i]), splat(high_end[i])};
        const float* const levels = tile.scores(in_tile + i);
        if (with_ties) {
          add<true, true>(own, levels, block.padded, i);
        } else if (low) {
          add<true, false>(own, levels, block.padded, i);
        } else {
          add<false, false>(own, levels, block.padded, i);
        }
      }
      double counted[kLanes] = {};
      add_across(counts, counted);
      add_across(sums, sum + slot - base);
      for (int i = 0; i < kLanes; ++i) active[slot - base + i] += counted[i], found += counted[i];
      if (with_ties) add_across(lanes, ties + row - task.row_begin);
    }
    if (found != 0) mark_tiles(p, out.tiles, row, block);
  }

  void level_row(const Block& block, int64_t row, float* scores, int64_t i) const {
    if (rule.mining != Mining::kMultiSimilarity) return row_levels<false, false>(p, block, row, rule.sign, scores, nullptr, nullptr);
    Vec least = splat(kInfinity);
    row_levels<false, true>(p, block, row, rule.sign, scores, nullptr, &least);
    store(lanes + i * kLanes, least);
  }

  // The nearest negative of each row, and how many pass the filter.
  void filter(const Block& block, int64_t row, int64_t rows, const Tile& tile, int64_t in_tile) const {
    for (int64_t i = 0; i < rows; ++i) {
      float& best = nearest[row + i - task.row_begin];
      for (int lane = 0; lane < kLanes; ++lane) best = lanes[i * kLanes + lane] < best ? lanes[i * kLanes + lane] : best;
      const float* const levels = tile.scores(in_tile + i);
      const Vec limit = splat(p.farthest[row + i] + rule.epsilon), sign = splat(rule.sign);
      Vec number = {};
      for (int64_t j = 0; j < block.padded; j += kLanes) {
        const Vec level = load(levels + j);
        number = add_where(below(sign * level, limit) & below(level, splat(kInfinity)), number, splat(1.0f));
      }
      kept[row + i - task.row_begin] += double(total(number));
    }
  }

  template <bool kLow, bool kTies>
  void add(const Windows& w, const float* levels, int64_t padded, int64_t i) const {
    const Vec one = splat(1.0f);
    Vec sum = {}, number = {}, tied = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec v = load(levels + j);
      const Mask inside = kLow ? between(v, w.low, w.high) : below(v, w.high);
      sum = add_where(inside, sum, w.t - v);
      number = add_where(inside, number, one);
      if constexpr (kTies) tied += v == w.high ? one : Vec{};
    }
    store(sums + i * kLanes, sum);
    store(counts + i * kLanes, number);
    if constexpr (kTies) store(lanes + i * kLanes, tied);
  }

  void finish(int64_t row) const {
    if (rule.threshold != nullptr) {
      out.loss[row] = float(sum[row - base]), out.active[row] = int64_t(active[row - base]), out.mined[row] = p.negatives(row);
    } else {
      finish_triplets(row);
    }
  }

  void finish_triplets(int64_t row) const {
    const int64_t taken = p.count(row), negatives = p.negatives(row), at = row - task.row_begin;
    out.loss[row] = 0, out.mined[row] = out.active[row] = 0, out.nearest[row] = nearest[at];
    if (taken == 0 || negatives == 0) return;
    double loss = 0, number = 0, positives = 0;
    bool lost = false;
    for (int64_t k = 0; k < taken; ++k) {
      const int64_t slot = p.slot(row, k);
      // the window's t was rounded
      const double rest = rule.sign * double(p.distance[slot]) + rule.margin - double(windows(rule, splat(p.distance[slot]), splat(0.0f)).t[0]);
      const double part = sum[slot - base] + rest * active[slot - base];
      lost |= !(part >= 0);  // a NaN among the distances, or in the row's filter
      if (!takes(rule, p.distance[slot], nearest[at])) continue;
      positives += 1, loss += part, number += active[slot - base];
    }
    out.loss[row] = lost ? __builtin_nanf("") : float(loss);
    out.active[row] = int64_t(number);
    out.mined[row] = rule.mining == Mining::kBatchAll   ? taken * negatives
                     : rule.mining == Mining::kSemiHard ? int64_t(number + ties[at])
                                                        : int64_t(positives * kept[at]);
  }
};

// Slots of the windows of rows row_begin .. row_end.
inline int64_t slots_between(const DenseParams& p, const HingeRule& rule, int64_t row_begin, int64_t row_end) {
  if (rule.threshold != nullptr) return round_up(row_end - row_begin, kSlotRows);
  return p.slots(row_begin, row_end);
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows with `slots` slots.
int64_t triplet_hinges_workspace(const DenseParams& p, int64_t rows, int64_t slots) {
  return scratch_words(p.pairs.precision, [&](auto product) {
    Arena arena{nullptr};
    PairWorkspace(product, p.pairs, rows, p.columns, arena);
    HingeStatistic{p, HingeRule{}, HingeResult{}, PairTask{}}.plan(rows, slots, arena);
    return arena.words;
  });
}

// Rows begin .. end against all references; begin is a multiple of kSlotRows.
void triplet_hinges(const DenseParams& p, const HingeRule& rule, const HingeResult& out, int64_t begin, int64_t end, float* workspace) {
  const PairTask task{0, begin, end, 0, p.columns};
  const int64_t slots = slots_between(p, rule, begin, end);
  HingeStatistic statistic{p, rule, out, task};
  with_sound_product(p.pairs.precision, [&](auto product) {
    Arena arena{workspace};
    PairWorkspace w(product, p.pairs, end - begin, p.columns, arena);
    statistic.plan(end - begin, slots, arena);
    statistic.begin(end - begin, slots);
    return take_statistics(product, p.pairs, task, w, statistic);
  });
  for (int64_t i = begin; i < end; ++i) statistic.finish(i);
}

}  // namespace
