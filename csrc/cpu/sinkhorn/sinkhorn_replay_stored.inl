// A step of the unrolled gradient on stored exponentials: of each row two sums, with vectors that are known, and of each column two, with weights of
// the rows of which one is known and the other is made from the row's sums. Four multiply-adds an entry and no exponential.
#pragma once

#include "sinkhorn/sinkhorn_rows.inl"

namespace {

// Vectors of columns of which both sums stay in registers.
constexpr int kNarrowPairs = kLanes == 16 ? 8 : 4;
constexpr int64_t kStepBytes = 8192;  // of rows that are summed beside as many before them: with those half of L1

// Rows begin ... end of exponentials K [rows, width], taken together as weigh_costs stored them. Gives sums_i = sum_j K_ij y_j and
// x_i = (to_f_i - now_i sums_i) / sum_j K_ij start_j, and sums over rows: columns_j = sum_i x_i K_ij, carried_j = sum_i before_i K_ij.
template <class Real>
struct StoredStep {
  const Real* e;
  int64_t width, m, begin, end;
  const Real *y, *start, *now, *to_f, *before;
  Real *sums, *x, *columns, *carried;  // [n], [n], [2 width] and [2 width], the second half for those of the last rows
};

// What two multiply-adds take: the compiler would let each read memory, and loads are as scarce as those.
template <class Real>
inline VecOf<Real> load_once(const Real* p) {
  VecOf<Real> x = load(p);
#if KDFAST_LANES > 4
  asm("" : "+v"(x));
#endif
  return x;
}

// x of some rows at once. Where nothing is summed the potential is a constant.
template <class Real, class V>
inline V slope_of(V to_f, V mass, V sum, V start_sum) {
  const V zero = {}, least = zero + Real(1e-30);
  return start_sum == zero ? zero : (to_f - mass * sum) / (start_sum < least ? least : start_sum);
}

// Sums and x of kRows rows.
template <int kVectors, int kRows, class Real>
inline __attribute__((always_inline)) void sum_together(const StoredStep<Real>& k, int64_t i) {
  constexpr int64_t kW = kWidth<Real>;
  const Real* const e = k.e + i * k.width;
  VecOf<Real> with_y[kRows] = {}, with_start[kRows] = {};
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    const VecOf<Real> y = load(k.y + j * kW), start = load(k.start + j * kW);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const VecOf<Real> entry = load_once(e + (j * kRows + r) * kW);
      with_y[r] = multiply_add(entry, y, with_y[r]);
      with_start[r] = multiply_add(entry, start, with_start[r]);
    }
  }
  typedef Real Few __attribute__((vector_size(kRows * sizeof(Real)), aligned(sizeof(Real)), may_alias));
  const auto few = [&](const Real* p) { return *reinterpret_cast<const Few*>(p); };
  Real start_sums[kRows];
  sum_rows_of<kRows>(with_y, k.sums + i);
  sum_rows_of<kRows>(with_start, start_sums);
  *reinterpret_cast<Few*>(k.x + i) = slope_of<Real>(few(k.to_f + i), few(k.now + i), few(k.sums + i), few(start_sums));
}

// What kRows rows whose x is known add to the columns.
template <int kVectors, int kRows, class Real>
inline __attribute__((always_inline)) void add_together(const StoredStep<Real>& k, int64_t i, VecOf<Real>* columns, VecOf<Real>* carried) {
  constexpr int64_t kW = kWidth<Real>;
  const Real* const e = k.e + i * k.width;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const VecOf<Real> x = splat(k.x[i + r]), before = splat(k.before[i + r]);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const VecOf<Real> entry = load_once(e + (j * kRows + r) * kW);
      columns[j] = multiply_add(entry, x, columns[j]);
      carried[j] = multiply_add(entry, before, carried[j]);
    }
  }
}

// Columns of kVectors vectors, or more: up to kNarrowPairs. Rows are added, from L1, when those after them have been summed: by then their x is there.
template <int kVectors, class Real>
void step_narrow(StoredStep<Real> k) {
  constexpr int64_t kW = kWidth<Real>;
  if constexpr (kVectors < kNarrowPairs) {
    if (k.m > kVectors * kW) return step_narrow<kVectors + 1>(k);
  }
  for (int64_t i = k.begin; i < k.end; i += kChunk) {
    VecOf<Real> columns[kVectors] = {}, carried[kVectors] = {};
    const int64_t end = smaller(i + kChunk, k.end);
    int64_t r = i;
    for (; r + kTogether <= end; r += kTogether) {
      sum_together<kVectors, kTogether>(k, r);
      if (r > i) add_together<kVectors, kTogether>(k, r - kTogether, columns, carried);
    }
    if (r > i) add_together<kVectors, kTogether>(k, r - kTogether, columns, carried);
    for (; r < end; ++r) {
      sum_together<kVectors, 1>(k, r);
      add_together<kVectors, 1>(k, r, columns, carried);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      store(k.columns + j * kW, load(k.columns + j * kW) + columns[j]);
      store(k.carried + j * kW, load(k.carried + j * kW) + carried[j]);
    }
  }
}

// Both sums of kRows rows by lanes, while as many rows of `old` go to both sums of their columns; as many entries from `next` on are fetched into L2.
template <int kRows, bool kFetch, class Real>
inline __attribute__((always_inline)) void weigh_twice(const Real* e, const Real* y, const Real* start, int64_t m, const WeightedRows<Real>& old,
                                                       const WeightedRows<Real>& again, const Real* next, VecOf<Real>* with_y, VecOf<Real>* with_start) {
  using V = VecOf<Real>;
  constexpr int64_t kW = kWidth<Real>;
  V sum_y[kRows], sum_start[kRows], weight[kRows], other[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sum_y[r] = sum_start[r] = V{}, weight[r] = splat(old.weight[r]), other[r] = splat(again.weight[r]);
  for (int64_t j = 0; j < m; j += kW) {
    const V first = load(y + j), second = load(start + j);
    V column = load(old.columns + j), carried = load(again.columns + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const V before = load_once(old.e + kRows * j + r * kW), now = load_once(e + kRows * j + r * kW);
      if constexpr (kFetch) __builtin_prefetch(next + kRows * j + r * kW, 0, 2);
      column = multiply_add(before, weight[r], column);
      carried = multiply_add(before, other[r], carried);
      sum_y[r] = multiply_add(now, first, sum_y[r]);
      sum_start[r] = multiply_add(now, second, sum_start[r]);
    }
    store(old.columns + j, column);
    store(again.columns + j, carried);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) with_y[r] = sum_y[r], with_start[r] = sum_start[r];
}

// Any number of columns: a group of rows is summed while as many before them, which are in cache, are added.
template <class Real>
void step_wide(const StoredStep<Real>& k) {
  constexpr int kMost = 8;
  const int64_t fit = kStepBytes / (k.width * int64_t(sizeof(Real))) / kTogether * kTogether, step = fit < kTogether ? kTogether : smaller(fit, kMost);
  const bool far = (k.end - k.begin) * k.width * int64_t(sizeof(Real)) > kNearBytes;
  const Real none[kMost] = {};
  Real sums[2 * kMost];
  VecOf<Real> lanes[2 * kMost] = {};
  Real *const columns = k.columns + k.width, *const carried = k.carried + k.width;
  int64_t waiting = 0;  // rows before i that are to be added
  for (int64_t i = k.begin, rows = 0; i < k.end; i += rows) {
    rows = smaller(step, k.end - i);
    const Real* const e = k.e + i * k.width;
    WeightedRows<Real> old{e - waiting * k.width, k.width, k.x + i - waiting, columns}, again{old.e, k.width, k.before + i - waiting, carried};
    if (waiting != rows) {  // taken together otherwise, or none
      add_rows(old, waiting, k.m), add_rows(again, waiting, k.m);
      old = {e, k.width, none, columns}, again = {e, k.width, none, carried};
    }
    each_rows(rows, [&](int64_t r, auto together) {
      constexpr int kRows = decltype(together)::value;
      const Real* const at = e + r * k.width;  // what follows the last row too: a fetch cannot fault
      if (far) {
        weigh_twice<kRows, true, Real>(at, k.y, k.start, k.m, old.from(r), again.from(r), at + rows * k.width, lanes + r, lanes + kMost + r);
      } else {
        weigh_twice<kRows, false, Real>(at, k.y, k.start, k.m, old.from(r), again.from(r), nullptr, lanes + r, lanes + kMost + r);
      }
    });
    sum_lanes_of(lanes, 2 * kMost, sums);
    each_vector<Real, 1>(rows, [&](int64_t r, int, int64_t count) {
      const VecOf<Real> sum = load_count<Real>(sums + r, count);
      store_count(k.sums + i + r, sum, count);
      const VecOf<Real> start_sum = load_count<Real>(sums + kMost + r, count);
      store_count(k.x + i + r, slope_of<Real>(load_count<Real>(k.to_f + i + r, count), load_count<Real>(k.now + i + r, count), sum, start_sum), count);
    });
    waiting = rows;
    if ((i - k.begin) / kChunk != (i + rows - k.begin) / kChunk) add_chunk(k.columns, columns, k.m), add_chunk(k.carried, carried, k.m);
  }
  const Real* const last = k.e + (k.end - waiting) * k.width;
  add_rows(WeightedRows<Real>{last, k.width, k.x + k.end - waiting, columns}, waiting, k.m);
  add_rows(WeightedRows<Real>{last, k.width, k.before + k.end - waiting, carried}, waiting, k.m);
  add_chunk(k.columns, columns, k.m), add_chunk(k.carried, carried, k.m);
}

template <class Real>
void step_stored(const StoredStep<Real>& k) {
  for (int64_t j = 0; j < 2 * k.width; ++j) k.columns[j] = k.carried[j] = 0;
  if (k.m <= kNarrowPairs * kWidth<Real>) {
    step_narrow<1>(k);
  } else {
    step_wide(k);
  }
}

}  // namespace
