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

#include "triplet/dense_filter.inl"
#include "triplet/dense_grad.inl"
#include "triplet/ranks.inl"

namespace {

// ---- the windows of a task's rows ---------------------------------------------------------------------------------------

constexpr int64_t kLine = 64;            // bytes
constexpr int64_t kSortedColumns = 512;  // packed at a time: the more, the fewer times a row's tables come from L2

// Tables of each row: its upper and its lower ends as trees.
struct SortedWindows {
  int depth;
  int64_t stride;          // floats of a tree
  float *high, *low;
  double* start;           // t0 of each row, the largest t
  int32_t* taken;          // how many of each row's positives
  float *sorted, *ends;    // of one row

  SortedWindows(int64_t rows, int64_t most, Arena& arena) : depth(depth_for(most)), stride(int64_t(1) << depth) {
    high = arena.take(rows * stride), low = arena.take(rows * stride);
    start = HingeStatistic::doubles(rows, arena);
    taken = reinterpret_cast<int32_t*>(arena.take(rows));
    sorted = arena.take(stride), ends = arena.take(stride);
  }

  RankTree upper(int64_t i) const { return {high + i * stride, depth}; }
  RankTree lower(int64_t i) const { return {low + i * stride, depth}; }

  // Trees and t0 of row `row`, number i of the task, of its positives that are taken; t0 is NaN where one of all its distances is, so that its
  // sum will be.
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
  void runs(int64_t i, const Vec* v, IntVec* from, IntVec* to, Vec* last) const {
    const IntVec count = IntVec{} + taken[i];
    upper(i).ranks(v, from, last);
    if constexpr (kLow) lower(i).ranks(v, to);
    for (int a = 0; a < kAtOnce; ++a) {
      from[a] = from[a] < count ? from[a] : count;
      to[a] = kLow ? (to[a] < count ? to[a] : count) : count;
    }
  }
};

// How many of each row's runs begin at a rank, less those that end there. Most are often at the least or at the greatest rank: these are counted by lanes,
// for an addition to one number must wait for the last.
struct RankCounts {
  int64_t stride;   // of a row
  int32_t* counts;  // [rows][stride]

  RankCounts(int64_t rows, int64_t ranks, Arena& arena) : stride(ranks + 2 * kLanes) {
    counts = reinterpret_cast<int32_t*>(arena.take(rows * stride));
  }
  int32_t* of(int64_t i) const { return counts + i * stride; }

  static IntVec place(IntVec rank, IntVec greatest) {
    IntVec lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return rank == 0 ? lane : rank + int32_t(kLanes) + (rank < greatest ? IntVec{} : lane);
  }
  void prefetch(int64_t i) const {
    for (int64_t r = 0; r < stride; r += kLine / 4) __builtin_prefetch(of(i) + r);
  }
  // Sums up to each of `ranks` ranks, returned.
  const int32_t* running(int64_t i, int64_t ranks) const {
    int32_t sum = 0, *const from = of(i) + kLanes;
    for (int64_t lane = -kLanes; lane < 0; ++lane) sum += from[lane];
    from[0] = sum;
    for (int64_t r = 1; r < ranks; ++r) from[r] += from[r - 1];
    return from;
  }
};

// Terms number (start - v) of a row's levels, summed in double.
struct LevelSum {
  double start;
#if KDFAST_LANES == 16
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
#else
  WideVec sum = {};
#endif

  explicit LevelSum(double start) : start(start) {}

  void add(IntVec number, Vec v) {
    const Vec level = lesser(splat(kLargestFinite), v);  // so that no window adds 0
#if KDFAST_LANES == 16
    const __m512i n = (__m512i)number;
    low = term(_mm512_castsi512_si256(n), _mm512_castps512_ps256((__m512)level), low);
    high = term(_mm512_extracti64x4_epi64(n, 1), _mm512_extractf32x8_ps((__m512)level, 1), high);
#else
    sum += __builtin_convertvector(number, WideVec) * (start - __builtin_convertvector(level, WideVec));
#endif
  }

#if KDFAST_LANES == 16
  __m512d term(__m256i number, __m256 level, __m512d sum) const {
    const __m512d below = _mm512_sub_pd(_mm512_set1_pd(start), _mm512_cvtps_pd(level));
    return _mm512_fmadd_pd(_mm512_cvtepi32_pd(number), below, sum);
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
#else
  double total() const {
    double all = 0;
    for (int lane = 0; lane < kLanes; ++lane) all += sum[lane];
    return all;
  }
#endif
};

// ---- sums and weights -----------------------------------------------------------------------------------------------------

// As the statistic of a pass, the hinges alone; as its weights, W_ij of the rows beside them: in batch W_ji comes from the sums of the columns.
struct SortedHinges {
  static constexpr bool kKnowsIdle = true;

  const DenseParams& p;
  const HingeRule& rule;
  const HingeUpstream& upstream;
  const PairTask& task;
  int64_t rows, first = 0;
  SortedWindows windows_of;
  ColumnWeights column_weights = {};
  float* factors;                  // [block]
  int32_t *held, *begins, *ends;   // [block]: the windows that hold a row's levels, and where these runs are counted
  RankCounts by_rank;
  double *sum, *active, *ties;     // [rows]

  // `rows` of the task.
  SortedHinges(const DenseParams& p, const HingeRule& rule, const HingeUpstream& upstream, const PairTask& task, int64_t rows, int64_t block,
               int64_t most, Arena& arena)
      : p(p), rule(rule), upstream(upstream), task(task), rows(rows), windows_of(rows, most, arena), by_rank(rows, windows_of.stride, arena) {
    column_weights.plan(block, arena);
    factors = arena.take(block);
    int32_t** const runs[] = {&held, &begins, &ends};
    for (int32_t** const of : runs) *of = reinterpret_cast<int32_t*>(arena.take(block));
    sum = HingeStatistic::doubles(rows, arena), active = HingeStatistic::doubles(rows, arena), ties = HingeStatistic::doubles(rows, arena);
  }

  void begin() {
    column_weights.to = upstream.y_weight;
    for (int64_t i = 0; i < rows; ++i) {
      windows_of.build(p, rule, task.row_begin + i, i, upstream.nearest[task.row_begin + i]);
      sum[i] = active[i] = ties[i] = 0;
    }
    __builtin_memset(by_rank.counts, 0, size_t(4 * rows * by_rank.stride));
  }

  void begin_rows(int64_t row) { first = row; }
  void begin_rows(int64_t row, int64_t) { first = row; }
  void begin_block(const Block& block) {
    if (upstream.g != nullptr) column_weights.begin_block(block);
  }

  bool idle(const Block& block, int64_t row, int64_t rows) const { return no_negatives(p, block, first + row, rows); }

  void chunk(const Block& block, int64_t row, int64_t rows, const Tile& tile) const {
    for (int64_t i = 0; i < rows; ++i) take_row<false>(block, first + row + i, tile.scores(i));
  }
  void weigh(const Block& block, int64_t i, float* scores) {
    take_row<true>(block, first + i, scores);
    column_weights.end_row();
  }

  template <bool kWeights>
  void take_row(const Block& block, int64_t row, float* scores) const {
    if (row + 1 < task.row_end) {
      windows_of.prefetch(row + 1 - task.row_begin, has_low_end(rule));
      by_rank.prefetch(row + 1 - task.row_begin);
    }
    row_levels<kWeights, false>(p, block, row, rule.sign, scores, factors, nullptr);
    has_low_end(rule) ? take_levels<true, kWeights>(block, row, scores) : take_levels<false, kWeights>(block, row, scores);
  }

  template <bool kLow, bool kWeights>
  void take_levels(const Block& block, int64_t row, float* levels) const {
    const int64_t i = row - task.row_begin;
    rule.mining == Mining::kSemiHard && rule.sign > 0 ? find_runs<kLow, kLow>(i, block.padded, levels) : find_runs<kLow, false>(i, block.padded, levels);
    const Vec g = kWeights ? splat(rule.sign * upstream.g[row]) : Vec{};
    LevelSum hinges(windows_of.start[i]);
    Vec number = {}, weights = {};
    for (int64_t j = 0; j < block.padded; j += kLanes) {
      const Vec v = load(levels + j);
      const IntVec windows_here = load_int(held + j);
      const Vec c = __builtin_convertvector(windows_here, Vec);
      hinges.add(windows_here, v);
      number += c;
      if constexpr (kWeights) {
        const Vec weight = c * g * load(factors + j);
        weights += weight;
        store(levels + j, weight);
        column_weights.add(j, weight);
      }
    }
    sum[i] += hinges.total();
    active[i] += double(total(number));
    if constexpr (kWeights) upstream.x_weight[row] += double(total(weights));
    int32_t* const counts = by_rank.of(i);
#pragma GCC unroll 8
    for (int64_t j = 0; j < block.padded; ++j) {
      ++counts[begins[j]];
      if constexpr (kLow) --counts[ends[j]];
    }
  }

  // The runs of windows that hold row i's levels.
  template <bool kLow, bool kTies>
  void find_runs(int64_t i, int64_t padded, const float* levels) const {
    for (int64_t j = 0; j < padded; j += kAtOnce * kLanes) {
      Vec v[kAtOnce], last[kAtOnce];
      IntVec from[kAtOnce], to[kAtOnce];
      for (int a = 0; a < kAtOnce; ++a) v[a] = load(levels + j + a * kLanes);
      windows_of.runs<kLow>(i, v, from, to, kTies ? last : nullptr);
      const IntVec greatest = IntVec{} + windows_of.taken[i];
      for (int a = 0; a < kAtOnce; ++a) {
        const auto keep = [at = j + a * kLanes](int32_t* array, IntVec x) { *reinterpret_cast<IntVec*>(array + at) = x; };
        keep(held, to[a] - from[a]);
        keep(begins, RankCounts::place(from[a], greatest));
        if constexpr (kLow) keep(ends, RankCounts::place(to[a], greatest));
        if constexpr (kTies) ties[i] += double(tied(windows_of.upper(i), from[a], last[a], v[a]));
      }
    }
  }

  // How many windows end at v exactly, of the columns of one vector.
  static int64_t tied(const RankTree& tree, IntVec rank, Vec last, Vec v) {
    const IntVec some = (last == v) & (v < splat(kInfinity));
    if (!any(some)) return 0;
    int64_t ties = 0;
    for (int lane = 0; lane < kLanes; ++lane)
      if (some[lane]) ties += rank[lane] - tree.rank_before(v[lane]);
    return ties;
  }

  // Once all levels have passed: the c of a row's positives, the rest of its sum, and what the positives weigh.
  void finish(int64_t row) const {
    const int64_t i = row - task.row_begin, slot = p.slot(row, 0), count = p.count(row), taken = windows_of.taken[i];
    const int32_t* const counts = by_rank.running(i, taken);
    const bool by_low = rule.mining == Mining::kSemiHard && rule.sign > 0;  // where its upper ends may be rounded to one
    const RankTree window_ends = by_low ? windows_of.lower(i) : windows_of.upper(i);
    const float g = upstream.g != nullptr ? rule.sign * upstream.g[row] : 0, nearest = upstream.nearest[row];
    LevelSum rest(windows_of.start[i] - rule.margin);
    for (int64_t k = 0; k < count; k += kAtOnce * kLanes) {
      Vec d[kAtOnce], end[kAtOnce];
      alignas(64) IntVec rank[kAtOnce];
      alignas(64) int32_t c[kAtOnce * kLanes] = {};
      for (int a = 0; a < kAtOnce; ++a) {
        d[a] = load_row(p.distance + slot, k + a * kLanes, count);
        const Windows w = windows(rule, d[a], splat(p.farthest[row]));
        end[a] = by_low ? w.low : w.high;
      }
      window_ends.ranks(end, rank);
      const int32_t* const at = reinterpret_cast<const int32_t*>(rank);
      for (int64_t r = 0; r < smaller(kAtOnce * kLanes, count - k); ++r)
        if (at[r] > 0 && takes(rule, p.distance[slot + k + r], nearest)) c[r] = counts[smaller(at[r], taken) - 1];
      for (int a = 0; a < kAtOnce; ++a) {
        const IntVec number = load_int(c + a * kLanes);
        rest.add(number, splat(rule.sign) * d[a]);
        const Vec pull = __builtin_convertvector(number, Vec) * splat(g) * weight_factors(p.metric, d[a]);
        if (upstream.g != nullptr && k + a * kLanes < count) store_row(upstream.pull + slot, k + a * kLanes, count, pull);
      }
    }
    sum[i] -= rest.total();
  }

  // out.mined holds how many negatives of the row pass multi-similarity mining's filter.
  void report(const HingeResult& out, int64_t row) const {
    const int64_t i = row - task.row_begin, negatives = p.negatives(row), taken = windows_of.taken[i], kept = out.mined[row];
    out.loss[row] = 0, out.mined[row] = out.active[row] = 0;
    if (p.count(row) == 0 || negatives == 0) return;
    out.loss[row] = sum[i] == sum[i] ? float(sum[i]) : __builtin_nanf("");
    out.active[row] = int64_t(active[i]);
    out.mined[row] = rule.mining == Mining::kBatchAll   ? taken * negatives
                     : rule.mining == Mining::kSemiHard ? int64_t(active[i] + ties[i])
                                                        : taken * kept;
  }
};

template <>
constexpr bool kSkipsChunks<SortedHinges> = true;

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

// Words of workspace for tasks of at most `rows` rows. `size`: of their tables, as Hinges takes it.
template <class Hinges>
int64_t row_hinges_workspace(const DenseParams& p, const PairSums& sums, int64_t rows, int64_t size) {
  return scratch_words(p.pairs.precision, [&](auto product) {
    const PairTask none{};
    Arena values{nullptr}, gradients{nullptr};
    const PairWorkspace w(product, p.pairs, rows, p.columns, values);
    Hinges(p, HingeRule{}, HingeUpstream{}, none, rows, w.block, size, values);
    const PairGradientWorkspace v(product, p.pairs, sums.x_sums != nullptr, sums.y_sums != nullptr, rows, p.columns, gradients,
                                  kSortedColumns);
    Hinges(p, HingeRule{}, HingeUpstream{}, none, rows, v.block, size, gradients);
    return values.words > gradients.words ? values.words : gradients.words;
  });
}

// Rows begin .. end against all references, as triplet_hinges and triplet_hinges_grad: values where out.loss is given, weights into `sums` where
// upstream.g is.
template <class Hinges>
void row_hinges(const DenseParams& p, const HingeRule& rule, const HingeResult& out, const HingeUpstream& upstream, const PairSums& sums,
                int64_t begin, int64_t end, int64_t size, float* workspace) {
  const PairTask task{0, begin, end, 0, p.columns};
  const int64_t rows = end - begin;
  const auto finish = [&](const Hinges& hinges) {
    for (int64_t i = begin; i < end; ++i) {
      hinges.finish(i);
      if (out.loss != nullptr) hinges.report(out, i);
    }
  };
  if (upstream.g == nullptr) {
    with_sound_product(p.pairs.precision, [&](auto product) {
      Arena arena{workspace};
      PairWorkspace w(product, p.pairs, rows, p.columns, arena);
      Hinges hinges(p, rule, upstream, task, rows, w.block, size, arena);
      hinges.begin();
      const bool sound = take_statistics(product, p.pairs, task, w, hinges);
      finish(hinges);
      return sound;
    });
  } else {
    with_product(p.pairs.precision, [&](auto product) {  // which holds all rows
      Arena arena{workspace};
      PairGradientWorkspace w(product, p.pairs, sums.x_sums != nullptr, sums.y_sums != nullptr, rows, p.columns, arena, kSortedColumns);
      Hinges hinges(p, rule, upstream, task, rows, w.block, size, arena);
      hinges.begin();
      take_gradients(product, p.pairs, task, sums, w, hinges);
      hinges.column_weights.flush();
      finish(hinges);
    });
  }
}

// `size`: positives of a row, at most.
int64_t sorted_hinges_workspace(const DenseParams& p, const PairSums& sums, int64_t rows, int64_t size) {
  return row_hinges_workspace<SortedHinges>(p, sums, rows, size);
}
void sorted_hinges(const DenseParams& p, const HingeRule& rule, const HingeResult& out, const HingeUpstream& upstream, const PairSums& sums,
                   int64_t begin, int64_t end, int64_t size, float* workspace) {
  row_hinges<SortedHinges>(p, rule, out, upstream, sums, begin, end, size, workspace);
}

}  // namespace
