// The gradient in the bank of scores against sampled rows: o_m = sum over (n, k) with index_nk = m of w_nk q_n.
//
// Samples come ordered by block of bank rows. Within a block they are ordered once more, by bank row, which then adds up the
// queries that drew it: these are few, and stay in cache. A thread owns its blocks, so there are no atomics, each element of the
// result is written once, and the sums have the same bits for any number of threads.
//
// Included after an instruction set's header (isa/).
#pragma once

#include "gather/gather.inl"

namespace {

using kdfast::ScatterEntry;
using kdfast::ScatterParams;

struct RowWeight {
  int32_t row;  // n
  float weight;
};

// The scratch of one thread.
struct ScatterSpace {
  RowWeight* ordered;  // a block's samples by bank row
  int32_t* end;        // [block]: where in `ordered` each bank row's end
  float* sum;          // [width]: of one bank row
  int64_t floats;

  ScatterSpace(const ScatterParams& p, float* base) : floats(2 * p.largest + p.block + p.width) {
    ordered = reinterpret_cast<RowWeight*>(base);
    end = reinterpret_cast<int32_t*>(base + 2 * p.largest);
    sum = base + 2 * p.largest + p.block;
  }
};

// The queries that drew one bank row.
struct ScatterTerms {
  const float* query;
  int64_t width;
  const RowWeight* entries;
  int64_t count;

  inline const float* at(int64_t k) const { return query + entries[k].row * width; }
  inline float weight(int64_t k) const { return entries[k].weight; }
  template <int kWidth>
  inline void fetch(int64_t, int64_t) const {}
};

inline void order_by_row(const ScatterSpace& s, const ScatterEntry* entries, int64_t count, int64_t columns) {
  __builtin_memset(s.end, 0, size_t(columns) * sizeof(int32_t));
  for (int64_t i = 0; i < count; ++i) ++s.end[entries[i].column];
  int32_t begin = 0;
  for (int64_t c = 0; c < columns; ++c) {
    const int32_t drawn = s.end[c];
    s.end[c] = begin;  // until the samples have moved it to their end
    begin += drawn;
  }
  for (int64_t i = 0; i < count; ++i) s.ordered[s.end[entries[i].column]++] = {entries[i].row, entries[i].weight};
}

template <class T>
void scatter_block(const ScatterParams& p, const ScatterSpace& s, int64_t block) {
  const int64_t first = block * p.block, columns = smaller(p.block, p.columns - first);
  order_by_row(s, p.entries + p.begin[block], p.begin[block + 1] - p.begin[block], columns);
  int64_t begin = 0;
  for (int64_t c = 0; c < columns; begin = s.end[c++]) {
    T* const out = static_cast<T*>(p.out) + (first + c) * p.width;
    ScatterTerms terms{p.query, p.width, s.ordered + begin, s.end[c] - begin};
    if (terms.count == 0) {
      __builtin_memset(out, 0, size_t(p.width) * sizeof(T));
      continue;
    }
    if constexpr (__is_same(T, float)) {
      add_terms(terms, p.width, out);
    } else {
      add_terms(terms, p.width, s.sum);
      for (int64_t d = 0; d < p.width; d += kLanes) store_row(out, d, p.width, load_row(s.sum, d, p.width));
    }
  }
}

// ---- the entries of the dispatch table --------------------------------------------------------------------------------

int64_t gather_scatter_workspace(const ScatterParams& p) { return ScatterSpace(p, nullptr).floats; }

// Blocks first .. last.
void gather_scatter(const ScatterParams& p, int64_t first, int64_t last, float* workspace) {
  const ScatterSpace space(p, workspace);
  for (int64_t block = first; block < last; ++block) {
    switch (p.type) {
      case ElementType::kFloat32:
        scatter_block<float>(p, space, block);
        break;
      case ElementType::kBFloat16:
        scatter_block<BFloat16>(p, space, block);
        break;
      case ElementType::kFloat16:
        scatter_block<Half>(p, space, block);
        break;
    }
  }
}

}  // namespace
