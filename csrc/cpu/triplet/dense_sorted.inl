// Hinges of every triplet where rows have many positives: a row's windows are sorted, and each level is looked up among them.
//
// Sorted by distance, the positives whose window holds a level v are a run r .. r': from the number of upper ends that are not above v to
// the number of lower ends that are not. The c = r' - r of a level weighs its gradient. Each row counts its runs by where they begin and end; running
// sums of these are the c_k of its positives, and with one t0 for the row
//   S = sum over k of c_k (t_k - t0) + sum over v of c (t0 - v),
// in double, for the two nearly cancel. So a row's hinges and all weights come from one look-up of each level. Rows are taken so few at a time that
// their tables stay near.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/dense_grad.inl"
#include "triplet/ranks.inl"

namespace {

// ---- the windows of a task's rows ---------------------------------------------------------------------------------------

constexpr int64_t kLine = 64;  // bytes

// Tables of each row: its upper and its lower ends as trees.
struct SortedWindows {
  int64_t stride;  // entries of a row's tables
  int depth;
  float *high, *low;
  double* start;           // t0 of each row, the largest t
  int32_t* taken;          // how many of each row's positives
  float *sorted, *ends;    // of one row

  void plan(int64_t rows, int64_t most, Arena& arena) {
    depth = depth_for(most);
    stride = int64_t(1) << depth;
    high = arena.take(rows * stride), low = arena.take(rows * stride);
    start = HingeStatistic::doubles(rows, arena);
    taken = reinterpret_cast<int32_t*>(arena.take(rows));
    sorted = arena.take(stride), ends = arena.take(stride);
  }

  RankTree upper(int64_t i) const { return {high + i * stride, depth}; }
  RankTree lower(int64_t i) const { return {low + i * stride, depth}; }

  // Trees and t0 of row `row`, number i of the task, of its positives that are taken; t0 is NaN where one of all its distances is, so that its sum will be.
  void build(const DenseParams& p, const HingeRule& rule, int64_t row, int64_t i, float nearest) const {
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
    start[i] = lost ? __builtin_nan("") : count > 0 ? double(sorted[count - 1]) + rule.margin : 0;
    grow(rule, p.farthest[row], count, [](const Windows& w) { return w.high; }, high + i * stride);
    if (has_low_end(rule)) grow(rule, p.farthest[row], count, [](const Windows& w) { return w.low; }, low + i * stride);
  }

  // The tree of the windows' ends, of `count` positives.
  template <class End>
  void grow(const HingeRule& rule, float farthest, int64_t count, const End& end, float* tree) const {
    for (int64_t r = 0; r < stride; r += kLanes) store(ends + r, end(windows(rule, load(sorted + r) * splat(rule.sign), splat(farthest))));
    for (int64_t r = count; r < stride; ++r) ends[r] = kInfinity;
    grow_tree(ends, depth, tree);
  }

  // Brings row i's trees near while another row is at work.
  void prefetch(int64_t i, bool with_low) const {
    for (int64_t r = 0; r < stride; r += kLine / 4) {
      __builtin_prefetch(high + i * stride + r);
      if (with_low) __builtin_prefetch(low + i * stride + r);
    }
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

// Terms number (start - v) of a row's levels, summed in double.
struct LevelSum {
  double start;
#if KDFAST_LANES == 16
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
#else
  double sum = 0;
#endif

  explicit LevelSum(double start) : start(start) {}

  void add(IntVec number, Vec v) {
    const Vec level = lesser(splat(kLargestFinite), v);  // so that no window adds 0
#if KDFAST_LANES == 16
    const __m512i n = (__m512i)number;
    low = term(_mm512_castsi512_si256(n), _mm512_castps512_ps256((__m512)level), low);
    high = term(_mm512_extracti64x4_epi64(n, 1), _mm512_extractf32x8_ps((__m512)level, 1), high);
#else
    for (int lane = 0; lane < kLanes; ++lane) sum += double(number[lane]) * (start - double(level[lane]));
#endif
  }

#if KDFAST_LANES == 16
  __m512d term(__m256i number, __m256 level, __m512d sum) const {
    const __m512d below = _mm512_sub_pd(_mm512_set1_pd(start), _mm512_cvtps_pd(level));
    return _mm512_fmadd_pd(_mm512_cvtepi32_pd(number), below, sum);
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
#else
  double total() const { return sum; }
#endif
};

// ---- sums and weights -----------------------------------------------------------------------------------------------------

// As the statistic of a pass, the hinges alone; as its weights, W_ij of the rows beside them: in batch W_ji comes from the sums of the columns.
struct SortedHinges {
  static constexpr bool kKnowsIdle = false;

  const DenseParams& p;
  const HingeRule& rule;
  const HingeUpstream& upstream;
  const PairTask& task;
  int64_t first = 0;
  SortedWindows windows_of = {};
  ColumnWeights column_weights = {};
  float* factors = nullptr;                           // [block]
  int32_t *begins = nullptr, *ends = nullptr;         // [block]: the runs of a row
  int32_t* by_rank = nullptr;                         // [rows of the task][stride]: runs that begin at a rank, less those that end there
  double *sum = nullptr, *active = nullptr, *ties = nullptr;  // [rows of the task]

  void plan(int64_t rows, int64_t block, int64_t most, Arena& arena) {
    windows_of.plan(rows, most, arena);
    column_weights.plan(block, arena);
    factors = arena.take(block);
    begins = reinterpret_cast<int32_t*>(arena.take(block)), ends = reinterpret_cast<int32_t*>(arena.take(block));
    by_rank = reinterpret_cast<int32_t*>(arena.take(rows * windows_of.stride));
    sum = HingeStatistic::doubles(rows, arena), active = HingeStatistic::doubles(rows, arena), ties = HingeStatistic::doubles(rows, arena);
  }

  // `nearest` of the task's rows.
  void begin(const float* nearest) {
    column_weights.to = upstream.y_weight;
    const int64_t rows = task.row_end - task.row_begin;
    for (int64_t i = 0; i < rows; ++i) {
      windows_of.build(p, rule, task.row_begin + i, i, nearest[i]);
      sum[i] = active[i] = ties[i] = 0;
    }
    __builtin_memset(by_rank, 0, size_t(4 * rows * windows_of.stride));
  }

  void begin_rows(int64_t row) { first = row; }
  void begin_rows(int64_t row, int64_t) { first = row; }
  void begin_block(const Block& block) {
    if (upstream.g != nullptr) column_weights.begin_block(block);
  }

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    for (int64_t i = 0; i < rows; ++i) take_row<false>(block, first + row + i, tile.scores(i));
  }
  void weigh(const Block& block, int64_t i, float* scores) {
    take_row<true>(block, first + i, scores);
    column_weights.end_row();
  }

  template <bool kWeights>
  void take_row(const Block& block, int64_t row, float* scores) const {
    if (row + 1 < task.row_end) windows_of.prefetch(row + 1 - task.row_begin, has_low_end(rule));
    row_levels<kWeights, false>(p, block, row, rule.sign, scores, factors, nullptr);
    has_low_end(rule) ? take_levels<true, kWeights>(block, row, scores) : take_levels<false, kWeights>(block, row, scores);
  }

  template <bool kLow, bool kWeights>
  void take_levels(const Block& block, int64_t row, float* levels) const {
    const int64_t i = row - task.row_begin;
    int32_t* const counts = by_rank + i * windows_of.stride;
    const bool with_ties = rule.mining == Mining::kSemiHard && rule.sign > 0;
    const Vec g = kWeights ? splat(rule.sign * upstream.g[row]) : Vec{};
    LevelSum hinges(windows_of.start[i]);
    Vec number = {}, weights = {};
    int64_t runs = 0;
    for (int64_t j = 0; j < block.padded; j += kAtOnce * kLanes) {
      Vec v[kAtOnce], last[kAtOnce];
      IntVec from[kAtOnce], to[kAtOnce];
      for (int a = 0; a < kAtOnce; ++a) v[a] = load(levels + j + a * kLanes);
      windows_of.runs<kLow>(i, v, from, to, kLow ? last : nullptr);
      for (int a = 0; a < kAtOnce; ++a) {
        const IntVec held = to[a] - from[a];
        const Vec c = __builtin_convertvector(held, Vec);
        hinges.add(held, v[a]);
        number += c;
        if (kLow && with_ties) ties[i] += double(tied(windows_of.upper(i), from[a], last[a], v[a]));
        if constexpr (kWeights) {
          const Vec weight = c * g * load(factors + j + a * kLanes);
          weights += weight;
          store(levels + j + a * kLanes, weight);
          column_weights.add(j + a * kLanes, weight);
        }
        if (!any(held)) continue;
        if (!kLow && !any(from[a])) {  // all windows hold all of them
          counts[0] += kLanes;
          continue;
        }
        *reinterpret_cast<IntVec*>(begins + runs) = from[a];
        if constexpr (kLow) *reinterpret_cast<IntVec*>(ends + runs) = to[a];
        runs += kLanes;
      }
    }
    for (int64_t r = 0; r < runs; ++r) ++counts[begins[r]];
    if constexpr (kLow)
      for (int64_t r = 0; r < runs; ++r) --counts[ends[r]];
    sum[i] += hinges.total();
    active[i] += double(total(number));
    if constexpr (kWeights) upstream.x_weight[row] += double(total(weights));
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

  // Once all levels have passed: the c of a row's positives, and the rest of its sum.
  void finish(int64_t row, float nearest) const {
    const int64_t i = row - task.row_begin;
    int32_t* const counts = by_rank + i * windows_of.stride;
    for (int64_t r = 1; r < windows_of.taken[i]; ++r) counts[r] += counts[r - 1];
    const bool by_low = rule.mining == Mining::kSemiHard && rule.sign > 0;  // where its upper ends may be rounded to one
    const RankTree window_ends = by_low ? windows_of.lower(i) : windows_of.upper(i);
    for (int64_t k = 0; k < p.count(row); k += kAtOnce * kLanes) number_positives(row, k, nearest, by_low, window_ends, counts);
  }

  // Of positives number k .. k + kAtOnce kLanes: sums of the counts up to the rank of each, which its window's end has in the tree.
  void number_positives(int64_t row, int64_t k, float nearest, bool by_low, const RankTree& window_ends, const int32_t* counts) const {
    const int64_t i = row - task.row_begin, slot = p.slot(row, 0), count = p.count(row);
    Vec end[kAtOnce];
    alignas(64) IntVec rank[kAtOnce];
    for (int a = 0; a < kAtOnce; ++a) {
      const Windows w = windows(rule, load_row(p.distance + slot, k + a * kLanes, count), splat(p.farthest[row]));
      end[a] = by_low ? w.low : w.high;
    }
    window_ends.ranks(end, rank);
    double rest = 0;
    for (int64_t r = 0; r < smaller(kAtOnce * kLanes, count - k); ++r) {
      const float d = p.distance[slot + k + r];
      const int64_t at = rank[r / kLanes][r % kLanes];
      const int32_t c = at > 0 && takes(rule, d, nearest) ? counts[smaller(at, windows_of.taken[i]) - 1] : 0;
      if (upstream.active != nullptr) upstream.active[slot + k + r] = c;
      rest += double(c) * (double(rule.sign * d) + rule.margin - windows_of.start[i]);
    }
    sum[i] += rest;
  }

  void report(const HingeResult& out, int64_t row, float nearest, double kept) const {
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

struct SortedWorkspace : PairWorkspace {
  template <class Product>
  SortedWorkspace(Product product, const DenseParams& p, int64_t rows, int64_t most, SortedHinges& hinges, Arena& arena)
      : PairWorkspace(product, p.pairs, rows, p.columns, arena) {
    hinges.plan(rows, block, most, arena);
  }
};
struct SortedGradientWorkspace : PairGradientWorkspace {
  template <class Product>
  SortedGradientWorkspace(Product product, const DenseParams& p, const PairSums& out, int64_t rows, int64_t most, SortedHinges& hinges,
                          Arena& arena)
      : PairGradientWorkspace(product, p.pairs, out.x_sums != nullptr, out.y_sums != nullptr, rows, p.columns, arena) {
    hinges.plan(rows, block, most, arena);
  }
};

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows with at most `most` positives to a row.
int64_t sorted_hinges_workspace(const DenseParams& p, const PairSums& sums, int64_t rows, int64_t most) {
  return scratch_words(p.pairs.precision, [&](auto product) {
    const PairTask none{};
    SortedHinges hinges{p, HingeRule{}, HingeUpstream{}, none};
    Arena filter{nullptr};
    HingeStatistic{p, HingeRule{}, HingeResult{}, none}.plan(rows, 0, filter);
    Arena values = filter, gradients = filter;
    SortedWorkspace(product, p, rows, most, hinges, values);
    SortedGradientWorkspace(product, p, sums, rows, most, hinges, gradients);
    return values.words > gradients.words ? values.words : gradients.words;
  });
}

// Rows begin .. end against all references, as triplet_hinges and triplet_hinges_grad: values where out.loss is given, weights into `sums` where
// upstream.g is. The filter of multi-similarity mining, which the windows depend on, takes a pass of its own.
void sorted_hinges(const DenseParams& p, const HingeRule& rule, const HingeResult& out, const HingeUpstream& upstream, const PairSums& sums,
                   int64_t begin, int64_t end, int64_t most, float* workspace) {
  const PairTask task{0, begin, end, 0, p.columns};
  const int64_t rows = end - begin;
  const bool values = out.loss != nullptr;
  Arena arena{workspace};
  DenseParams without = p;
  without.positives = 0;
  HingeStatistic filter{without, rule, out, task};
  filter.plan(rows, 0, arena);
  filter.begin(rows, 0);
  if (values && rule.mining == Mining::kMultiSimilarity) {
    with_sound_product(p.pairs.precision, [&](auto product) {
      Arena own = arena;
      PairWorkspace w(product, p.pairs, rows, p.columns, own);
      filter.begin(rows, 0);
      return take_statistics(product, p.pairs, task, w, filter);
    });
  }
  const float* const nearest = values ? filter.nearest : upstream.nearest + begin;
  SortedHinges hinges{p, rule, upstream, task};
  if (upstream.g == nullptr) {
    with_sound_product(p.pairs.precision, [&](auto product) {
      Arena own = arena;
      SortedWorkspace w(product, p, rows, most, hinges, own);
      hinges.begin(nearest);
      return take_statistics(product, p.pairs, task, w, hinges);
    });
  } else {
    with_holding_product(p.pairs, task, [&](auto product) {
      Arena own = arena;
      SortedGradientWorkspace w(product, p, sums, rows, most, hinges, own);
      hinges.begin(nearest);
      take_gradients(product, p.pairs, task, sums, w, hinges);
      hinges.column_weights.flush();
    });
  }
  for (int64_t i = begin; i < end; ++i) {
    hinges.finish(i, nearest[i - begin]);
    if (values) hinges.report(out, i, nearest[i - begin], filter.kept[i - begin]);
  }
}

}  // namespace
