// Hinges of every triplet where rows have many positives: a row's windows are sorted, and each level is looked up among them.
//
// Sorted by distance, the positives whose window holds a level v are a run r .. r': from the number of upper ends that are not above v to
// the number of lower ends that are not. So c and S of a level are two differences,
//   c = r' - r,   S = T(r) - T(r') + c (t0 - v),   T(r) = sum over k >= r of (t_k - t0),
// in double, for the terms nearly cancel where windows are narrow. Rows are taken so few at a time that their tables stay near. In the gradient
// each row counts its levels by rank; running sums of these are the c of its positives.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/dense_grad.inl"
#include "triplet/ranks.inl"

namespace {

// ---- the windows of a task's rows ---------------------------------------------------------------------------------------

constexpr int64_t kLine = 64;  // bytes

// Tables of each row: its upper and its lower ends as trees, and T.
struct SortedWindows {
  int64_t stride;  // entries of a row's tables
  int depth;
  float *high, *low;
  double *suffix, *start;  // T, and t0 of each row
  int32_t* taken;          // how many of each row's positives
  float *sorted, *ends;    // of one row

  void plan(int64_t rows, int64_t most, Arena& arena) {
    depth = depth_for(most);
    stride = int64_t(1) << depth;
    high = arena.take(rows * stride), low = arena.take(rows * stride);
    suffix = HingeStatistic::doubles(rows * stride, arena), start = HingeStatistic::doubles(rows, arena);
    taken = reinterpret_cast<int32_t*>(arena.take(rows));
    sorted = arena.take(stride), ends = arena.take(stride);
  }

  RankTree upper(int64_t i) const { return {high + i * stride, depth}; }
  RankTree lower(int64_t i) const { return {low + i * stride, depth}; }

  // Trees of row `row`, number i of the task, of its positives that are taken. `sorted` becomes their distances, times the rule's sign, in
  // ascending order, +inf for NaN; returns whether there was one.
  bool build(const DenseParams& p, const HingeRule& rule, int64_t row, int64_t i, float nearest) const {
    const float* const distance = p.distance + p.slot(row, 0);
    const int64_t all = p.count(row);
    int64_t count = 0;
    bool lost = false;
    for (int64_t k = 0; k < all; ++k) {
      const float d = distance[k];
      sorted[count] = d == d ? rule.sign * d : kInfinity;
      count += takes(rule, d, nearest);
      lost |= d != d;
    }
    for (int64_t r = count; r < stride; ++r) sorted[r] = kInfinity;
    sort(sorted, stride);
    taken[i] = int32_t(count);
    grow(rule, p.farthest[row], count, [](const Windows& w) { return w.high; }, high + i * stride);
    if (has_low_end(rule)) grow(rule, p.farthest[row], count, [](const Windows& w) { return w.low; }, low + i * stride);
    return lost;
  }

  // The tree of the windows' ends, of `count` positives.
  template <class End>
  void grow(const HingeRule& rule, float farthest, int64_t count, const End& end, float* tree) const {
    for (int64_t r = 0; r < stride; r += kLanes) store(ends + r, end(windows(rule, load(sorted + r) * splat(rule.sign), splat(farthest))));
    for (int64_t r = count; r < stride; ++r) ends[r] = kInfinity;
    grow_tree(ends, depth, tree);
  }

  // T of row i, whose positives are `sorted`. Lost: NaN, whatever is summed.
  void sum_up(const HingeRule& rule, int64_t i, bool lost) const {
    double* const sums = suffix + i * stride;
    const int64_t count = taken[i];
    start[i] = lost ? __builtin_nan("") : count > 0 ? double(sorted[count - 1]) + rule.margin : 0;
    double sum = 0;
    for (int64_t r = count; r < stride; ++r) sums[r] = 0;
    for (int64_t r = count; r-- > 0;) {
      sum += double(sorted[r]) + rule.margin - start[i];
      sums[r] = sum;
    }
  }

  // Brings row i's tables near while another row is at work.
  template <class Other>
  void prefetch(int64_t i, bool with_low, const Other* other) const {
    for (int64_t r = 0; r < stride; r += kLine / 4) {
      __builtin_prefetch(high + i * stride + r);
      if (with_low) __builtin_prefetch(low + i * stride + r);
    }
    for (int64_t r = 0; r < stride; r += kLine / int64_t(sizeof(Other))) __builtin_prefetch(other + i * stride + r);
  }

  // Ranks among the upper ends of row i's windows, and among the lower ends, or the number of windows. `last`: as RankTree has it.
  template <bool kLow>
  void runs(int64_t i, const Vec* v, IntVec* from, IntVec* to, Vec* last = nullptr) const {
    const IntVec count = IntVec{} + taken[i];
    upper(i).ranks(v, from, last);
    if constexpr (kLow) lower(i).ranks(v, to);
    for (int a = 0; a < kAtOnce; ++a) {
      from[a] = from[a] < count ? from[a] : count;
      to[a] = kLow ? (to[a] < count ? to[a] : count) : count;
    }
  }
};

// The hinges of a row's levels, summed in double: T(from) - T(to) + (to - from) (start - v), T being 0 where kLow is not given.
struct HingeSum {
  const double* suffix;
  double start;
#if KDFAST_LANES == 16
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
#else
  double sum = 0;
#endif

  HingeSum(const double* suffix, double start) : suffix(suffix), start(start) {}

  template <bool kLow>
  void add(IntVec from, IntVec to, Vec v) {
    const Vec level = lesser(splat(kLargestFinite), v);  // so that no window adds 0
#if KDFAST_LANES == 16
    const __m512i begin = (__m512i)from, end = (__m512i)to, number = (__m512i)(to - from);
    add_half<kLow>(_mm512_castsi512_si256(begin), _mm512_castsi512_si256(end), _mm512_castsi512_si256(number),
                   _mm512_castps512_ps256((__m512)level), &low);
    add_half<kLow>(_mm512_extracti64x4_epi64(begin, 1), _mm512_extracti64x4_epi64(end, 1), _mm512_extracti64x4_epi64(number, 1),
                   _mm512_extractf32x8_ps((__m512)level, 1), &high);
#else
    for (int lane = 0; lane < kLanes; ++lane) {
      const double ends = suffix[from[lane]] - (kLow ? suffix[to[lane]] : 0);
      sum += ends + double(to[lane] - from[lane]) * (start - double(level[lane]));
    }
#endif
  }

#if KDFAST_LANES == 16
  template <bool kLow>
  void add_half(__m256i from, __m256i to, __m256i number, __m256 level, __m512d* sum) const {
    __m512d ends = _mm512_i32gather_pd(from, suffix, 8);
    if constexpr (kLow) ends = _mm512_sub_pd(ends, _mm512_i32gather_pd(to, suffix, 8));
    const __m512d below = _mm512_sub_pd(_mm512_set1_pd(start), _mm512_cvtps_pd(level));
    *sum = _mm512_add_pd(*sum, _mm512_fmadd_pd(_mm512_cvtepi32_pd(number), below, ends));
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
#else
  double total() const { return sum; }
#endif
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

  void plan(int64_t rows, int64_t most, Arena& arena) {
    windows_of.plan(rows, most, arena);
    sum = HingeStatistic::doubles(rows, arena), active = HingeStatistic::doubles(rows, arena), ties = HingeStatistic::doubles(rows, arena);
  }

  void begin(const float* nearest) const {
    for (int64_t i = 0; i < task.row_end - task.row_begin; ++i) {
      const bool lost = windows_of.build(p, rule, task.row_begin + i, i, nearest[i]);
      windows_of.sum_up(rule, i, lost);
      sum[i] = active[i] = ties[i] = 0;
    }
  }

  void begin_rows(int64_t row) { first = row; }
  void begin_block(const Block&) const {}

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t next = first + row + i + 1;
      if (next < task.row_end) windows_of.prefetch(next - task.row_begin, has_low_end(rule), windows_of.suffix);
      row_levels<false, false>(p, block, first + row + i, rule.sign, tile.scores(i), nullptr, nullptr);
      has_low_end(rule) ? add<true>(block, first + row + i, tile.scores(i)) : add<false>(block, first + row + i, tile.scores(i));
    }
  }

  template <bool kLow>
  void add(const Block& block, int64_t row, const float* levels) const {
    const int64_t i = row - task.row_begin;
    const bool with_ties = rule.mining == Mining::kSemiHard && rule.sign > 0;
    HingeSum hinges(windows_of.suffix + i * windows_of.stride, windows_of.start[i]);
    Vec number = {};
    for (int64_t j = 0; j < block.padded; j += kAtOnce * kLanes) {
      Vec v[kAtOnce], last[kAtOnce];
      IntVec from[kAtOnce], to[kAtOnce];
      for (int a = 0; a < kAtOnce; ++a) v[a] = load(levels + j + a * kLanes);
      windows_of.runs<kLow>(i, v, from, to, kLow ? last : nullptr);
      for (int a = 0; a < kAtOnce; ++a) {
        hinges.add<kLow>(from[a], to[a], v[a]);
        number += __builtin_convertvector(to[a] - from[a], Vec);
        if (kLow && with_ties) ties[i] += double(tied(windows_of.upper(i), from[a], last[a], v[a]));
      }
    }
    sum[i] += hinges.total();
    active[i] += double(total(number));
    if (total(number) != 0) mark_tiles(p, out.tiles, row, block);
  }

  // How many windows end at v exactly, of the columns of one vector.
  static int64_t tied(const RankTree& ends, IntVec rank, Vec last, Vec v) {
    const IntVec some = (last == v) & (v < splat(kInfinity));
    if (!any(some)) return 0;
    int64_t ties = 0;
    for (int lane = 0; lane < kLanes; ++lane)
      if (some[lane]) ties += rank[lane] - ends.rank_before(v[lane]);
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

  void plan(int64_t rows, int64_t block, int64_t most, Arena& arena) {
    windows_of.plan(rows, most, arena);
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
    const int64_t next = first + i + 1;
    if (next < task.row_end) windows_of.prefetch(next - task.row_begin, has_low_end(rule), by_rank);
    row_levels<true, false>(p, block, first + i, rule.sign, scores, factors, nullptr);
    has_low_end(rule) ? weigh_row<true>(block, first + i, scores) : weigh_row<false>(block, first + i, scores);
    column_weights.end_row();
  }

  template <bool kLow>
  void weigh_row(const Block& block, int64_t row, float* scores) const {
    const int64_t i = row - task.row_begin;
    int32_t* const counts = by_rank + i * windows_of.stride;
    const Vec g = splat(rule.sign * upstream.g[row]);
    Vec sum = {};
    for (int64_t j = 0; j < block.padded; j += kAtOnce * kLanes) {
      Vec v[kAtOnce];
      IntVec from[kAtOnce], to[kAtOnce];
      for (int a = 0; a < kAtOnce; ++a) v[a] = load(scores + j + a * kLanes);
      windows_of.runs<kLow>(i, v, from, to);
      for (int a = 0; a < kAtOnce; ++a) {
        const Vec weight = __builtin_convertvector(to[a] - from[a], Vec) * g * load(factors + j + a * kLanes);
        sum += weight;
        store(scores + j + a * kLanes, weight);
        column_weights.add(j + a * kLanes, weight);
        count<kLow>(counts, from[a], to[a]);
      }
    }
    upstream.x_weight[row] += double(total(sum));
  }

  // Empty runs end where they begin; those of all windows, or of none, are often a whole vector's.
  template <bool kLow>
  static void count(int32_t* counts, IntVec from, IntVec to) {
    if (!any(from - to)) return;
    alignas(64) int32_t begin[kLanes], end[kLanes];
    *reinterpret_cast<IntVec*>(begin) = from, *reinterpret_cast<IntVec*>(end) = to;
    asm volatile("" : : : "memory");  // read one by one from there, not taken out of the registers
    if (!any(from)) {
      counts[0] += kLanes;
    } else {
      for (int lane = 0; lane < kLanes; ++lane) ++counts[begin[lane]];
    }
    if constexpr (kLow)
      for (int lane = 0; lane < kLanes; ++lane) --counts[end[lane]];
  }

  // The c of the positives: sums of the counts up to the rank of each, which its window's end has in the tree.
  void end() const {
    for (int64_t i = 0; i < task.row_end - task.row_begin; ++i) {
      int32_t* const counts = by_rank + i * windows_of.stride;
      for (int64_t r = 1; r < windows_of.taken[i]; ++r) counts[r] += counts[r - 1];
      const bool by_low = rule.mining == Mining::kSemiHard && rule.sign > 0;  // where its upper ends may be rounded to one
      const RankTree ends = by_low ? windows_of.lower(i) : windows_of.upper(i);
      for (int64_t k = 0; k < p.count(task.row_begin + i); k += kAtOnce * kLanes) number(i, k, by_low, ends, counts);
    }
  }

  // Of row i's positives number k .. k + kAtOnce kLanes.
  void number(int64_t i, int64_t k, bool by_low, const RankTree& ends, const int32_t* counts) const {
    const int64_t row = task.row_begin + i, first = p.slot(row, 0), count = p.count(row);
    Vec end[kAtOnce];
    alignas(64) IntVec rank[kAtOnce];
    for (int a = 0; a < kAtOnce; ++a) {
      const Windows w = windows(rule, load_row(p.distance + first, k + a * kLanes, count), splat(p.farthest[row]));
      end[a] = by_low ? w.low : w.high;
    }
    ends.ranks(end, rank);
    for (int64_t r = 0; r < smaller(kAtOnce * kLanes, count - k); ++r) {
      const int64_t at = rank[r / kLanes][r % kLanes];
      const bool taken = takes(rule, p.distance[first + k + r], upstream.nearest[row]);
      upstream.active[first + k + r] = taken && at > 0 ? counts[smaller(at, windows_of.taken[i]) - 1] : 0;
    }
  }
};

struct SortedGradientWorkspace : PairGradientWorkspace {
  template <class Product>
  SortedGradientWorkspace(Product product, const DenseParams& p, const PairSums& out, int64_t rows, int64_t most, SortedWeights& weights,
                          Arena& arena)
      : PairGradientWorkspace(product, p.pairs, out.x_sums != nullptr, out.y_sums != nullptr, rows, p.columns, arena) {
    weights.plan(rows, block, most, arena);
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows with at most `most` positives to a row.
int64_t sorted_hinges_workspace(const DenseParams& p, int64_t rows, int64_t most) {
  return scratch_words(p.pairs.precision, [&](auto product) {
    Arena arena{nullptr};
    PairWorkspace(product, p.pairs, rows, p.columns, arena);
    SortedStatistic{p, HingeRule{}, HingeResult{}, PairTask{}}.plan(rows, most, arena);
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
    statistic.plan(rows, most, arena);
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
