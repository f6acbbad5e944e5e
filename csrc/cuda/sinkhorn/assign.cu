// A pass of the assignment codes over scores [N, K]: softmax of each row of s/epsilon + v, as it is or summed down the columns; or, without
// v, the log-sum-exp of each column. One reading of the scores: two rows are weighed while the next two are on their way, and columns' parts
// are added up in a second launch, in order.
#include "sinkhorn/row_pairs.cuh"

namespace kdfast {
namespace {

enum class Pass { kColumnLse, kColumnSums, kCodes };

template <Pass kPass>
class Assigner {
 public:
  __device__ Assigner(const SinkhornAssign& params) : p_(params), pairs_(params.scores) {
    const int unit = int(blockIdx.x) / p_.scores.cluster;
    problem_ = unit / p_.scores.parts, part_ = unit % p_.scores.parts;
    factor_ = kBitsPerNat * *p_.inverse_epsilon;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum_[c] = 0, top_[c] = -INFINITY;
  }

  __device__ void run() {
    const int begin = pairs_.first_row(part_, int(p_.scores.rows)), end = pairs_.first_row(part_ + 1, int(p_.scores.rows));
    if constexpr (kPass == Pass::kColumnLse) {  // without a barrier: warps wait for their rows only
#pragma unroll 1
      for (int i = begin; i < end; i += kRows) {
        load(i, end, e_);
        form_exponents(e_);
        add_columns();
      }
    } else {
      RowPairs::Tile ahead;
      load(begin, end, ahead);
#pragma unroll 1
      for (int i = begin; i < end; i += kRows) {
        form_exponents(ahead);
        load(i + kRows, end, ahead);
        add_rows(i, end);
      }
    }
    if constexpr (kPass != Pass::kCodes) store_parts();
  }

 private:
  static constexpr int kRows = RowPairs::kRows, kWidth = RowPairs::kWidth;

  const SinkhornAssign& p_;
  RowPairs pairs_;
  int problem_, part_;
  float factor_;
  float sum_[kWidth], top_[kWidth];
  RowPairs::Tile e_;

  __device__ bool there(int c) const { return pairs_.column(c) < p_.scores.columns; }

  __device__ void load(int i, int end, RowPairs::Tile& out) const { pairs_.load(problem_, i, end, int(p_.scores.columns), -INFINITY, out); }

  // v is read again for every pair, from cache: kept, it would be the registers that the pair ahead is in.
  __device__ void form_exponents(const RowPairs::Tile& scores) {
    const int columns = int(p_.scores.columns);
#pragma unroll
    for (int c = 0; c < kWidth; c += 4) {
      float v[4] = {};
      if constexpr (kPass != Pass::kColumnLse) pairs_.load_columns(p_.v, int64_t(problem_) * columns, columns, c, v);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) e_[r][c + i] = fmaf(factor_, scores[r][c + i], kBitsPerNat * v[i]);
    }
  }

  __device__ void add_columns() {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      float most = top_[c];
#pragma unroll
      for (int r = 0; r < kRows; ++r) most = fmaxf(most, e_[r][c]);
      const float shift = shift_of(most);
      sum_[c] *= device::exp2_fast(top_[c] - shift);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum_[c] += device::exp2_fast(e_[r][c] - shift);
      top_[c] = most;
    }
  }

  __device__ void add_rows(int i, int end) {
    float most[kRows];
    pairs_.weigh(e_, most);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float scale = i + r < end ? device::divide(device::exp2_fast(most[r] - pairs_.level(r)), pairs_.total(r)) : 0.0f;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) e_[r][c] *= scale, sum_[c] += e_[r][c];
      if constexpr (kPass == Pass::kCodes) store_row(i + r, end, e_[r]);
    }
  }

  __device__ void store_row(int i, int end, const float (&row)[kWidth]) const {
    const int columns = int(p_.scores.columns);
    float* const to = p_.out + (device::known_here(problem_) * p_.scores.rows + i) * columns;
#pragma unroll
    for (int c = 0; c < kWidth; c += 4) device::store_four(to + pairs_.column(c), columns % 4 == 0, i < end ? columns - pairs_.column(c) : 0, &row[c]);
  }

  __device__ void store_parts() const {
    const int64_t to = (int64_t(problem_) * p_.scores.parts + part_) * p_.scores.columns;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      if (!there(c)) continue;
      p_.sums[to + pairs_.column(c)] = sum_[c];
      if constexpr (kPass == Pass::kColumnLse) p_.tops[to + pairs_.column(c)] = top_[c];
    }
  }
};

template <Pass kPass>
__global__ void __launch_bounds__(RowPairs::kThreads, 1) assign_kernel(const SinkhornAssign params) {
  Assigner<kPass>(params).run();
}

// A column's parts, a thread each.
__global__ void __launch_bounds__(256) merge_kernel(const SinkhornAssign p) {
  const int64_t columns = p.scores.columns, at = int64_t(blockIdx.x) * 256 + threadIdx.x, from = at / columns * (p.scores.parts - 1) * columns + at;
  if (at >= p.batch * columns) return;
  float sum = 0, most = -INFINITY;
  for (int64_t part = 0; p.v == nullptr && part < p.scores.parts; ++part) most = fmaxf(most, p.tops[from + part * columns]);
  for (int64_t part = 0; part < p.scores.parts; ++part) {
    const int64_t i = from + part * columns;
    sum += p.v == nullptr ? p.sums[i] * device::exp2_fast(p.tops[i] - shift_of(most)) : p.sums[i];
  }
  p.out[at] = p.v == nullptr ? kNatsPerBit * (shift_of(most) + log2f(sum)) : sum;
}

}  // namespace

bool sinkhorn_assign_plan(SinkhornAssign& params) {
  const auto kernel = params.codes ? assign_kernel<Pass::kCodes> : params.v == nullptr ? assign_kernel<Pass::kColumnLse> : assign_kernel<Pass::kColumnSums>;
  SinkhornRows& rows = params.scores;
  if (!share_columns(rows)) return false;
  // As many ranges of rows as are at work at a time, each to its end: more would be more sums to join, and a last round that is mostly idle.
  const int64_t most = resident(kernel, Launch{rows.cluster, rows.threads, RowPairs::kSharedBytes, rows.cluster, nullptr}) / params.batch;
  const int64_t pairs = pairs_of(rows.rows), parts = most < pairs ? most : pairs;
  rows.parts = int(parts < 1 ? 1 : parts);
  return true;
}

const char* sinkhorn_assign(const SinkhornAssign& params, void* stream) {
  const SinkhornRows& rows = params.scores;
  const Launch how{params.batch * rows.parts * rows.cluster, rows.threads, RowPairs::kSharedBytes, rows.cluster, stream};
  if (params.codes) return launch(assign_kernel<Pass::kCodes>, how, params);
  const char* const error = params.v == nullptr ? launch(assign_kernel<Pass::kColumnLse>, how, params) : launch(assign_kernel<Pass::kColumnSums>, how, params);
  return error != nullptr ? error : launch(merge_kernel, Launch{(params.batch * rows.columns + 255) / 256, 256, 0, 1, stream}, params);
}

}  // namespace kdfast
