// How many of many sorted floats are not above others: sorting, and a tree to search.
//
// 2^depth - 1 floats are a binary tree in the order of its levels: node n has the children 2 n and 2 n + 1. A search goes down from node 1 and its
// rank is the leaf it would reach, one comparison a level. The first levels are a few vectors (of 16: eight levels, sixteen vectors), from which
// permutations take what each lane compares with; below them it is gathered. Searches of several vectors hide each other's latency.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "triplet/metric.inl"

namespace {

// ---- sorting ------------------------------------------------------------------------------------------------------------

// Lanes exchanged with those whose number differs in the bits of kMask.
template <int kMask>
inline Vec exchanged(Vec x) {
  IntVec from;
  for (int lane = 0; lane < kLanes; ++lane) from[lane] = lane ^ kMask;
#if KDFAST_LANES == 16
  return (Vec)_mm512_permutexvar_ps((__m512i)from, (__m512)x);
#elif KDFAST_LANES == 8
  return (Vec)_mm256_permutevar8x32_ps((__m256)x, (__m256i)from);
#else
  Vec y;
  for (int lane = 0; lane < kLanes; ++lane) y[lane] = x[from[lane]];
  return y;
#endif
}

// Of the lanes exchanged, those without the bit kGreater have the lesser.
template <int kMask, int kGreater>
inline Vec ordered(Vec x) {
  IntVec greater;
  for (int lane = 0; lane < kLanes; ++lane) greater[lane] = (lane & kGreater) != 0 ? -1 : 0;
  const Vec y = exchanged<kMask>(x);
  return greater ? larger(x, y) : lesser(x, y);
}

// Sorts runs of 2 kStride lanes that rise and then fall, or fall and then rise.
template <int kStride>
inline Vec merged(Vec x) {
  if constexpr (kStride == 0) {
    return x;
  } else {
    return merged<kStride / 2>(ordered<kStride, kStride>(x));
  }
}

// Sorts runs of kRun lanes.
template <int kRun>
inline Vec sorted_runs(Vec x) {
  if constexpr (kRun == 1) {
    return x;
  } else {
    return merged<kRun / 4>(ordered<kRun - 1, kRun / 2>(sorted_runs<kRun / 2>(x)));
  }
}

inline void order(float* first, float* second) {
  const Vec a = load(first), b = load(second);
  store(first, lesser(a, b)), store(second, larger(a, b));
}

// Sorts `size` floats, a power of two and whole vectors of them, none of them NaN: bitonic merges, the second half of each taken backwards.
inline void sort(float* x, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) store(x + i, sorted_runs<kLanes>(load(x + i)));
  for (int64_t run = 2 * kLanes; run <= size; run *= 2) {
    for (float* at = x; at < x + size; at += run) {
      float* back = at + run - kLanes;
      for (float* i = at; i < back; i += kLanes, back -= kLanes) {
        const Vec a = load(i), b = exchanged<kLanes - 1>(load(back));
        store(i, lesser(a, b)), store(back, exchanged<kLanes - 1>(larger(a, b)));
      }
      for (int64_t stride = run / 4; stride >= kLanes; stride /= 2)
        for (int64_t i = 0; i < run; i += i % (2 * stride) + kLanes == stride ? stride + kLanes : kLanes) order(at + i, at + i + stride);
      for (int64_t i = 0; i < run; i += kLanes) store(at + i, merged<kLanes / 2>(load(at + i)));
    }
  }
}

// ---- ranks --------------------------------------------------------------------------------------------------------------

constexpr int kAtOnce = kVecs;  // vectors whose searches hide each other's latency; a divisor of a panel

// Whether some lane is not 0.
inline bool any(IntVec x) {
#if KDFAST_LANES == 16
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#else
  for (int lane = 0; lane < kLanes; ++lane)
    if (x[lane] != 0) return true;
  return false;
#endif
}

// Of the tree of so many floats, at least, and of whole vectors.
inline int depth_for(int64_t size) {
  int depth = 1;
  while ((int64_t(1) << depth) - 1 < size || int64_t(1) << depth < kLanes) ++depth;
  return depth;
}

// `sorted`, 2^depth floats of which the last is none of it, as a tree of 2^depth, whose entry 0 means nothing. Uses up `sorted`.
inline void grow_tree(float* sorted, int depth, float* tree) {
  tree[0] = 0;
  for (int level = depth; level-- > 0;) {  // the even places are the deepest level's, the odd ones those of the levels above
    const int64_t nodes = int64_t(1) << level;
    for (int64_t n = 0; n < nodes; ++n) tree[nodes + n] = sorted[2 * n];
    for (int64_t n = 0; n < nodes; ++n) sorted[n] = sorted[2 * n + 1];
  }
}

// Levels whose nodes are compared from registers.
constexpr int kRegisterLevels = KDFAST_LANES == 16 ? 8 : KDFAST_LANES == 8 ? 5 : 0;

#if KDFAST_LANES == 16
// Of kVectors vectors, the floats whose numbers are the low bits of `at`.
template <int kVectors>
inline __m512 floats_at(const float* from, __m512i at) {
  if constexpr (kVectors == 1) {
    return _mm512_permutexvar_ps(at, _mm512_loadu_ps(from));
  } else if constexpr (kVectors == 2) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(from), at, _mm512_loadu_ps(from + kLanes));
  } else {
    const __m512 low = floats_at<kVectors / 2>(from, at), high = floats_at<kVectors / 2>(from + kVectors / 2 * kLanes, at);
    return _mm512_mask_mov_ps(low, _mm512_test_epi32_mask(at, _mm512_set1_epi32(kVectors / 2 * kLanes)), high);
  }
}
#elif KDFAST_LANES == 8
template <int kVectors>
inline __m256 floats_at(const float* from, __m256i at) {
  if constexpr (kVectors == 1) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), at);
  } else {
    const __m256 low = floats_at<kVectors / 2>(from, at), high = floats_at<kVectors / 2>(from + kVectors / 2 * kLanes, at);
    return _mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32(at, __builtin_clz(kVectors / 2 * kLanes)));  // the sign tells
  }
}
#endif

// What lanes at the nodes of a level compare with.
template <int kLevel>
inline Vec nodes_at(const float* tree, IntVec node) {
  constexpr int kNodes = 1 << kLevel;
#if KDFAST_LANES == 16
  return (Vec)(kNodes < kLanes ? floats_at<1>(tree, (__m512i)node) : floats_at<(kNodes < kLanes ? 1 : kNodes / kLanes)>(tree + kNodes, (__m512i)node));
#elif KDFAST_LANES == 8
  return (Vec)(kNodes < kLanes ? floats_at<1>(tree, (__m256i)node) : floats_at<(kNodes < kLanes ? 1 : kNodes / kLanes)>(tree + kNodes, (__m256i)node));
#else
  static_assert(kLevel >= kRegisterLevels);  // no level is kept in registers
  return Vec{};
#endif
}
inline Vec nodes_at(const float* tree, IntVec node) {
#if KDFAST_LANES == 16
  return (Vec)_mm512_i32gather_ps((__m512i)node, tree, 4);
#elif KDFAST_LANES == 8
  return (Vec)_mm256_i32gather_ps(tree, (__m256i)node, 4);
#else
  Vec probe;
  for (int lane = 0; lane < kLanes; ++lane) probe[lane] = tree[node[lane]];
  return probe;
#endif
}

// To the right child where the probe is not above v; `last`: the probes passed on the left.
inline void descend(Vec probe, Vec v, IntVec* node, Vec* last) {
#if KDFAST_LANES == 16
  const __mmask16 right = _mm512_cmp_ps_mask((__m512)probe, (__m512)v, _CMP_LE_OQ);
  const __m512i child = _mm512_slli_epi32((__m512i)*node, 1);
  *node = (IntVec)_mm512_mask_add_epi32(child, right, child, _mm512_set1_epi32(1));
  if (last != nullptr) *last = (Vec)_mm512_mask_mov_ps((__m512)*last, right, (__m512)probe);
#else
  const IntVec right = probe <= v;
  *node = *node + *node - right;
  if (last != nullptr) *last = right ? probe : *last;
#endif
}

template <int kLevel>
inline void descend_in_registers(const float* tree, int depth, const Vec* v, IntVec* node, Vec* last) {
  if constexpr (kLevel < kRegisterLevels) {
    if (kLevel >= depth) return;
#pragma GCC unroll 4
    for (int a = 0; a < kAtOnce; ++a) descend(nodes_at<kLevel>(tree, node[a]), v[a], node + a, last != nullptr ? last + a : nullptr);
    descend_in_registers<kLevel + 1>(tree, depth, v, node, last);
  }
}

struct RankTree {
  const float* tree;
  int depth;

  // For kAtOnce vectors: how many floats of the tree are not above v; none for NaN. `last`: the greatest of these; null: not wanted.
  void ranks(const Vec* v, IntVec* rank, Vec* last = nullptr) const {
    const IntVec leaves = IntVec{} + (int32_t(1) << depth);
    for (int a = 0; a < kAtOnce; ++a) rank[a] = IntVec{} + 1;
    if (last != nullptr)
      for (int a = 0; a < kAtOnce; ++a) last[a] = splat(-kInfinity);
    descend_in_registers<0>(tree, depth, v, rank, last);
    for (int level = kRegisterLevels; level < depth; ++level)
#pragma GCC unroll 4
      for (int a = 0; a < kAtOnce; ++a) descend(nodes_at(tree, rank[a]), v[a], rank + a, last != nullptr ? last + a : nullptr);
    for (int a = 0; a < kAtOnce; ++a) rank[a] -= leaves;
  }

  // How many are below v.
  int32_t rank_before(float v) const {
    int32_t node = 1;
    for (int level = 0; level < depth; ++level) node = 2 * node + (tree[node] < v);
    return node - (int32_t(1) << depth);
  }
};

}  // namespace
