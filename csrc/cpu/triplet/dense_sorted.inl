// Hinges of every triplet where rows have many positives: a row's windows are sorted, and each level is looked up among them.
//
// Sorted by distance, the positives whose window holds a level v are a run r .. r': from the number of upper ends that are not above v to
// the number of lower ends that are not. So c and S of a level are two differences,
//   c = r' - r,   S = T(r) - T(r') + c (t0 - v),   T(r) = sum over k >= r of (t_k - t0),
// in double, for the terms nearly cancel where windows are narrow. A rank takes log2 K comparisons: the first four with splitters in a
// register, the rest with gathered ends. Rows are taken so few at a time that their tables stay near. In the gradient each row counts its
// levels by rank; running sums of these are the c of its positives.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/dense_grad.inl"

namespace {

// ---- sorting ------------------------------------------------------------------------------------------------------------

// Keys in the upper halves of `count` words, sorted through `other`, a byte at a time. Returns the one of the two that holds the result.
inline uint64_t* sort_by_key(uint64_t* words, uint64_t* other, int64_t count) {
  for (int shift = 32; shift < 64; shift += 8) {
    int64_t begin[257] = {};
    for (int64_t i = 0; i < count; ++i) ++begin[(words[i] >> shift & 255) + 1];
    if (count > 0 && begin[(words[0] >> shift & 255) + 1] == count) continue;  // one byte for all
    for (int b = 0; b < 256; ++b) begin[b + 1] += begin[b];
    for (int64_t i = 0; i < count; ++i) other[begin[words[i] >> shift & 255]++] = words[i];
    uint64_t* const sorted = other;
    other = words, words = sorted;
  }
  return words;
}

// ---- ranks --------------------------------------------------------------------------------------------------------------

constexpr int kAtOnce = kVecs;  // vectors whose searches hide each other's latency; a divisor of a panel

// For kAtOnce vectors: how many of `sorted`, 2^depth - 1 floats, are not above v; none for NaN.
inline void ranks(const float* sorted, int depth, const Vec* v, IntVec* rank) {
  for (int i = 0; i < kAtOnce; ++i) rank[i] = IntVec{};
  int level = depth;
#if KDFAST_LANES == 16
  if (depth >= 4) {
    const int below_register = depth - 4;
    alignas(64) float every[16] = {};
    for (int i = 0; i < 15; ++i) every[i] = sorted[((i + 1) << below_register) - 1];
    const __m512 splitters = _mm512_load_ps(every);
    for (int step = 8; step > 0; step /= 2) {
      for (int i = 0; i < kAtOnce; ++i) {
        const Vec probe = (Vec)_mm512_permutexvar_ps((__m512i)(rank[i] + (step - 1)), splitters);
        rank[i] -= (probe <= v[i]) * step;
      }
    }
    for (int i = 0; i < kAtOnce; ++i) rank[i] <<= below_register;
    level = below_register;
  }
  for (int step = 1 << level >> 1; step > 0; step /= 2) {
    for (int i = 0; i < kAtOnce; ++i) {
      const Vec probe = (Vec)_mm512_i32gather_ps((__m512i)(rank[i] + (step - 1)), sorted, 4);
      rank[i] -= (probe <= v[i]) * step;
    }
  }
#else
  for (int i = 0; i < kAtOnce; ++i)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int step = 1 << level >> 1; step > 0; step /= 2)
        if (sorted[rank[i][lane] + step - 1] <= v[i][lane]) rank[i][lane] += step;
#endif
}

// For the levels v of kLanes columns in the windows from .. to of a row: adds T(from) - T(to) + (to - from) (start - v) to `part` [kLanes].
inline void add_hinges(const double* suffix, double start, IntVec from, IntVec to, Vec v, double* part) {
  alignas(64) int32_t first[kLanes], last[kLanes];
  alignas(64) float levels[kLanes];
  *reinterpret_cast<IntVec*>(first) = from, *reinterpret_cast<IntVec*>(last) = to;
  store(levels, lesser(splat(kLargestFinite), v));  // so that no window adds 0
  for (int i = 0; i < kLanes; ++i)
    part[i] += suffix[first[i]] - suffix[last[i]] + double(last[i] - first[i]) * (start - double(levels[i]));
}

// ---- the windows of a task's rows ---------------------------------------------------------------------------------------

struct SortedWindows {
  int64_t stride;  // of a row's tables
  int depth;
  float *high, *low;
  double *suffix, *start;  // T, and t0 of each row
  int32_t *order, *taken;  // numbers of the sorted positives; how many
  float* sorted;
  uint64_t *words, *other;

  template <class Product>
  void plan(Product, int64_t rows, int64_t most, Arena& arena) {
    depth = 1;
    while ((int64_t(1) << depth) - 1 < most) ++depth;
    stride = round_up(int64_t(1) << depth, kLanes);
    high = arena.take(rows * stride), low = arena.take(rows * stride);
    suffix = HingeStatistic::doubles(rows * stride, arena), start = HingeStatistic::doubles(rows, arena);
    order = reinterpret_cast<int32_t*>(arena.take(rows * stride)), taken = reinterpret_cast<int32_t*>(arena.take(rows));
    sorted = arena.take(stride);
    words = reinterpret_cast<uint64_t*>(arena.take(2 * stride)), other = reinterpret_cast<uint64_t*>(arena.take(2 * stride));
  }

  // Tables of row `row`, number i of the task, of its positives that are taken.
  void build(const DenseParams& p, const HingeRule& rule, int64_t row, int64_t i, float nearest) const {
    int64_t count = 0;
    for (int64_t k = 0; k < p.count(row); ++k) {
      const float d = p.distance[p.slot(row, k)];
      if (!takes(rule, d, nearest)) continue;
      uint32_t bits;
      __builtin_memcpy(&bits, &d, 4);
      const uint32_t key = d != d ? 0xffffffffu : rule.sign > 0 ? bits : ~bits;
      words[count++] = uint64_t(key) << 32 | uint64_t(k);
    }
    const uint64_t* const in_order = sort_by_key(words, other, count);
    float *const highs = high + i * stride, *const lows = low + i * stride;
    double* const sums = suffix + i * stride;
    for (int64_t r = 0; r < count; ++r) {
      order[i * stride + r] = int32_t(uint32_t(in_order[r]));
      sorted[r] = p.distance[p.slot(row, order[i * stride + r])];
    }
    for (int64_t r = count; r < stride; ++r) sorted[r] = 0;
    for (int64_t r = 0; r < stride; r += kLanes) {
      const Windows w = windows(rule, load(sorted + r), splat(p.farthest[row]));
      store(highs + r, w.high), store(lows + r, w.low);
    }
    for (int64_t r = count; r < stride; ++r) highs[r] = lows[r] = kInfinity;
    const auto exact = [&](int64_t r) { return double(rule.sign) * double(sorted[r]) + rule.margin; };
    start[i] = count > 0 ? exact(count - 1) : 0;
    double sum = 0;
    for (int64_t r = count; r < stride; ++r) sums[r] = 0;
    for (int64_t r = count; r-- > 0;) {
      sum += exact(r) - start[i];
      sums[r] = sum;
    }
    taken[i] = int32_t(count);
  }

  // Ranks among the upper ends of row i's windows, and among the lower ends, or the number of windows.
  template <bool kLow>
  void runs(int64_t i, const Vec* v, IntVec* from, IntVec* to) const {
    const IntVec count = IntVec{} + taken[i];
    ranks(high + i * stride, depth, v, from);
    if constexpr (kLow) ranks(low + i * stride, depth, v, to);
    for (int a = 0; a < kAtOnce; ++a) {
      from[a] = from[a] < count ? from[a] : count;
      to[a] = kLow ? (to[a] < count ? to[a] : count) : count;
    }
  }
};

// ---- sums ---------------------------------------------------------------------------------------------------------------

struct SortedStatistic {
  const DenseParams& p;
  const HingeRule& rule;
  const HingeResult& out;
  const PairTask& task;
  int64_t first = 0;
  SortedWindows windows_of = {};
  double *sum = nullptr, *active = nullptr, *ties = nullptr;  // [rows of the task]

  template <class Product>
  void plan(Product product, int64_t rows, int64_t most, Arena& arena) {
    windows_of.plan(product, rows, most, arena);
    sum = HingeStatistic::doubles(rows, arena), active = HingeStatistic::doubles(rows, arena), ties = HingeStatistic::doubles(rows, arena);
  }

  void begin(const float* nearest) const {
    for (int64_t i = 0; i < task.row_end - task.row_begin; ++i) {
      windows_of.build(p, rule, task.row_begin + i, i, nearest[i]);
      sum[i] = active[i] = ties[i] = 0;
    }
  }

  void begin_rows(int64_t row) { first = row; }
  void begin_block(const Block&) const {}

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    for (int64_t i = 0; i < rows; ++i) {
      row_levels<false, false>(p, block, first + row + i, rule.sign, tile.scores(i), nullptr, nullptr);
      has_low_end(rule) ? add<true>(block, first + row + i, tile.scores(i)) : add<false>(block, first + row + i, tile.scores(i));
    }
  }

  template <bool kLow>
  void add(const Block& block, int64_t row, const float* levels) const {
    const int64_t i = row - task.row_begin;
    const double* const suffix = windows_of.suffix + i * windows_of.stride;
    const float* const high = windows_of.high + i * windows_of.stride;
    const bool with_ties = rule.mining == Mining::kSemiHard && rule.sign > 0;
    double part[kLanes] = {};
    Vec number = {};
    for (int64_t j = 0; j < block.padded; j += kAtOnce * kLanes) {
      Vec v[kAtOnce];
      IntVec from[kAtOnce], to[kAtOnce];
      for (int a = 0; a < kAtOnce; ++a) v[a] = load(levels + j + a * kLanes);
      windows_of.runs<kLow>(i, v, from, to);
      for (int a = 0; a < kAtOnce; ++a) {
        add_hinges(suffix, windows_of.start[i], from[a], to[a], v[a], part);
        number += __builtin_convertvector(to[a] - from[a], Vec);
        if (with_ties) ties[i] += double(tied(high, from[a], v[a]));
      }
    }
    for (const double hinges : part) sum[i] += hinges;
    active[i] += double(total(number));
    if (total(number) != 0) mark_tiles(p, out.tiles, row, block);
  }

  // How many windows end at v exactly.
  static int64_t tied(const float* high, IntVec rank, Vec v) {
    int64_t ties = 0;
    for (int lane = 0; lane < kLanes; ++lane)
      for (int64_t r = rank[lane]; r > 0 && high[r - 1] == v[lane] && v[lane] < kInfinity; --r) ++ties;
    return ties;
  }

  void finish(int64_t row, float nearest, double kept) const {
    const int64_t i = row - task.row_begin, negatives = p.negatives(row), taken = windows_of.taken[i];
    out.loss[row] = 0, out.mined[row] = out.active[row] = 0, out.nearest[row] = nearest;
    if (p.count(row) == 0 || negatives == 0) return;
    out.loss[row] = sum[i] == sum[i] ? float(sum[i]) : __builtin_nanf("");
    out.active[row] = int64_t(active[i]);
    out.mined[row] = rule.mining == Mining::kBatchAll   ? taken * negatives
                     : rule.mining == Mining::kSemiHard ? int64_t(active[i] + ties[i])
                                                        : int64_t(double(taken) * kept);
  }
};

// ---- weights ------------------------------------------------------------------------------------------------------------

// W_ij of the rows alone; in batch W_ji comes from the sums of the columns.
struct SortedWeights {
  static constexpr bool kKnowsIdle = false;

  const DenseParams& p;
  const HingeRule& rule;
  const HingeUpstream& upstream;
  const PairTask& task;
  int64_t first = 0;
  SortedWindows windows_of = {};
  ColumnWeights column_weights = {};
  float* factors = nullptr;    // [block]
  int32_t* by_rank = nullptr;  // [rows][stride]: runs that begin at a rank, less those that end there

  template <class Product>
  void plan(Product product, int64_t rows, int64_t block, int64_t most, Arena& arena) {
    windows_of.plan(product, rows, most, arena);
    column_weights.plan(block, arena);
    factors = arena.take(block);
    by_rank = reinterpret_cast<int32_t*>(arena.take(rows * windows_of.stride));
  }

  void begin() {
    column_weights.to = upstream.y_weight;
    const int64_t rows = task.row_end - task.row_begin;
    for (int64_t i = 0; i < rows; ++i) windows_of.build(p, rule, task.row_begin + i, i, upstream.nearest[task.row_begin + i]);
    __builtin_memset(by_rank, 0, size_t(4 * rows * windows_of.stride));
  }

  void begin_rows(int64_t row, int64_t) { first = row; }
  void begin_block(const Block& block) { column_weights.begin_block(block); }

  void weigh(const Block& block, int64_t i, float* scores) {
    row_levels<true, false>(p, block, first + i, rule.sign, scores, factors, nullptr);
    has_low_end(rule) ? weigh_row<true>(block, first + i, scores) : weigh_row<false>(block, first + i, scores);
    column_weights.end_row();
  }

  template <bool kLow>
  void weigh_row(const Block& block, int64_t row, float* scores) const {
    const int64_t i = row - task.row_begin;
    int32_t* const counts = by_rank + i * windows_of.stride;
    const Vec g = splat(rule.sign * upstream.g[row]);
    const IntVec whole = IntVec{} + windows_of.taken[i];
    int32_t in_all = 0;
    Vec sum = {};
    for (int64_t j = 0; j < block.padded; j += kAtOnce * kLanes) {
      Vec v[kAtOnce];
      IntVec from[kAtOnce], to[kAtOnce];
      for (int a = 0; a < kAtOnce; ++a) v[a] = load(scores + j + a * kLanes);
      windows_of.runs<kLow>(i, v, from, to);
      for (int a = 0; a < kAtOnce; ++a) {
        const IntVec number = to[a] - from[a];
        const Vec weight = __builtin_convertvector(number, Vec) * g * load(factors + j + a * kLanes);
        sum += weight;
        store(scores + j + a * kLanes, weight);
        column_weights.add(j + a * kLanes, weight);
        const IntVec all = number == whole;
        in_all += lanes_set(all);
        count<kLow>(counts, from[a], to[a], (number > 0) & ~all);
      }
    }
    counts[0] += in_all;
    if constexpr (kLow) counts[windows_of.taken[i]] -= in_all;
    upstream.x_weight[row] += double(total(sum));
  }

  static int32_t lanes_set(IntVec mask) {
    int32_t lanes = 0;
    for (int i = 0; i < kLanes; ++i) lanes -= mask[i];
    return lanes;
  }

  template <bool kLow>
  static void count(int32_t* counts, IntVec from, IntVec to, IntVec which) {
    alignas(64) int32_t begin[kLanes], end[kLanes], some[kLanes];
    *reinterpret_cast<IntVec*>(begin) = from, *reinterpret_cast<IntVec*>(end) = to, *reinterpret_cast<IntVec*>(some) = which;
    for (int lane = 0; lane < kLanes; ++lane) {
      counts[begin[lane]] -= some[lane];
      if constexpr (kLow) counts[end[lane]] += some[lane];
    }
  }

  // The c of the positives, from the rows' counts.
  void end() const {
    for (int64_t i = 0; i < task.row_end - task.row_begin; ++i) {
      int32_t sum = 0;
      for (int64_t r = 0; r < windows_of.taken[i]; ++r) {
        sum += by_rank[i * windows_of.stride + r];
        upstream.active[p.slot(task.row_begin + i, windows_of.order[i * windows_of.stride + r])] = sum;
      }
    }
  }
};

struct SortedGradientWorkspace : PairGradientWorkspace {
  template <class Product>
  SortedGradientWorkspace(Product product, const DenseParams& p, const PairSums& out, int64_t rows, int64_t most, SortedWeights& weights,
                          Arena& arena)
      : PairGradientWorkspace(product, p.pairs, out.x_sums != nullptr, out.y_sums != nullptr, rows, p.columns, arena) {
    weights.plan(product, rows, block, most, arena);
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows with at most `most` positives to a row.
int64_t sorted_hinges_workspace(const DenseParams& p, int64_t rows, int64_t most) {
  return scratch_words(p.pairs.precision, [&](auto product) {
    Arena arena{nullptr};
    PairWorkspace(product, p.pairs, rows, p.columns, arena);
    SortedStatistic{p, HingeRule{}, HingeResult{}, PairTask{}}.plan(product, rows, most, arena);
    HingeStatistic{p, HingeRule{}, HingeResult{}, PairTask{}}.plan(rows, 0, arena);
    return arena.words;
  });
}

// As triplet_hinges. The filter of multi-similarity mining, which the windows depend on, takes a pass of its own.
void sorted_hinges(const DenseParams& p, const HingeRule& rule, const HingeResult& out, int64_t begin, int64_t end, int64_t most,
                   float* workspace) {
  const PairTask task{0, begin, end, 0, p.columns};
  const int64_t rows = end - begin;
  DenseParams without = p;
  without.positives = 0;
  HingeStatistic filter{without, rule, out, task};
  SortedStatistic statistic{p, rule, out, task};
  with_sound_product(p.pairs.precision, [&](auto product) {
    Arena arena{workspace};
    PairWorkspace w(product, p.pairs, rows, p.columns, arena);
    statistic.plan(product, rows, most, arena);
    filter.plan(rows, 0, arena);
    filter.begin(rows, 0);
    bool sound = true;
    if (rule.mining == Mining::kMultiSimilarity) sound = take_statistics(product, p.pairs, task, w, filter);
    statistic.begin(filter.nearest);
    return take_statistics(product, p.pairs, task, w, statistic) && sound;
  });
  for (int64_t i = begin; i < end; ++i) statistic.finish(i, filter.nearest[i - begin], filter.kept[i - begin]);
}

int64_t sorted_hinges_grad_workspace(const DenseParams& p, const PairSums& out, int64_t rows, int64_t most) {
  return scratch_words(p.pairs.precision, [&](auto product) {
    Arena arena{nullptr};
    SortedWeights weights{p, HingeRule{}, HingeUpstream{}, PairTask{}};
    SortedGradientWorkspace(product, p, out, rows, most, weights, arena);
    return arena.words;
  });
}

// Rows begin .. end against all references: their weights into `out`, the number of active triplets of their positives into `upstream`.
void sorted_hinges_grad(const DenseParams& p, const HingeRule& rule, const HingeUpstream& upstream, const PairSums& out, int64_t begin, int64_t end,
                        int64_t most, float* workspace) {
  const PairTask task{0, begin, end, 0, p.columns};
  with_holding_product(p.pairs, task, [&](auto product) {
    Arena arena{workspace};
    SortedWeights weights{p, rule, upstream, task};
    SortedGradientWorkspace w(product, p, out, end - begin, most, weights, arena);
    weights.begin();
    take_gradients(product, p.pairs, task, out, w, weights);
    weights.column_weights.flush();
    weights.end();
  });
}

}  // namespace
