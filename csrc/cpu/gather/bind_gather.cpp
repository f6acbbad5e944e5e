// kdfast::gather_similarity, gather_weighted_sum and gather_statistic on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gather/bind_gather.h"

namespace {

using kdfast::GatherBlocks;
using kdfast::RowStatistic;

GatherParams gather_params(const char* op, const Tensor& bank, const Tensor& index) {
  STD_TORCH_CHECK(bank.dim() == 2 && index.dim() == 2, "bank and index must have 2 dimensions, got ", bank.dim(), " and ", index.dim());
  GatherParams p{};
  p.type = element_type(op, bank.scalar_type());
  p.rows = index.size(0), p.samples = index.size(1), p.columns = bank.size(0), p.width = bank.size(1);
  p.bank_stride = bank.stride(0);
  check("bank", bank, bank.scalar_type(), {p.columns, p.width});
  STD_TORCH_CHECK(bank.stride(1) == 1 || p.width <= 1, "rows of the bank must be contiguous");
  p.bank = data<void>(bank);
  p.index = index_data(p, index);
  return p;
}

// ---- one sampled row after another ------------------------------------------------------------------------------------

int64_t workers_of_rows(const GatherParams& p, int64_t items) {
  return workers_for(double(p.rows) * double(p.samples) * (kSampleWork + 4 * double(p.width)), items);
}

// kernel(worker, begin, end) over 0 .. items. How they are cut changes no bit of the result.
template <class Kernel>
void run_rows(const GatherParams& p, int64_t items, const Kernel& kernel) {
  const int64_t workers = workers_of_rows(p, items);
  std::atomic<bool> inside{true};
  for_each_task(workers, workers, [&](int64_t, int64_t t) {
    if (!kernel(t, t * items / workers, (t + 1) * items / workers)) inside = false;
  });
  check_inside(p, inside);
}

// ---- by blocks of the bank --------------------------------------------------------------------------------------------

constexpr int64_t kOrderedSamples = int64_t(1) << 21;  // ordered at a time: 12 MB, no more than their index
constexpr int64_t kOrderedRows = 1024;                 // their queries and sums are held, and packing is small beside their products

// Some rows of a call at a time are ordered, then blocks cut among threads, so that each bank row is packed once for them.
class OrderedRows {
 public:
  OrderedRows(const GatherParams& params, int64_t block) : p(params), kernels(kdfast::cpu_kernels()), log2(__builtin_ctzll(uint64_t(block))) {
    const int64_t chunks = (p.rows * p.samples + kOrderedSamples - 1) / kOrderedSamples;
    chunk = std::min(kOrderedRows, (p.rows + chunks - 1) / chunks);
    b.block = block, b.blocks = ((p.columns - 1) >> log2) + 1, b.row_end = chunk;
    workers = workers_for(double(chunk) * (double(p.samples) * kSampleWork + double(p.columns) * double(p.width)), b.blocks);
    space = kernels.gather_blocks_workspace(p, b);
    partial = workers > 1 ? chunk * p.width : 0;
    columns = scratch(chunk * p.samples, ScalarType::Short);
    places = scratch(chunk * (b.blocks + 1) + workers * b.blocks, ScalarType::Long);
    values = scratch(chunk * p.samples);
    floats = scratch(workers * (space + partial));
    b.column = static_cast<uint16_t*>(columns.mutable_data_ptr());
    b.value = static_cast<float*>(values.mutable_data_ptr());
    begin = static_cast<int64_t*>(places.mutable_data_ptr());
    next = begin + chunk * (b.blocks + 1);
    work = static_cast<float*>(floats.mutable_data_ptr());
    b.begin = begin;
  }

  // f() for each chunk of rows, ordered, their samples' values taken from `from` [N, K] (null: 0).
  template <class F>
  void each_chunk(const float* from, const F& f) {
    for (b.row_begin = 0; b.row_begin < p.rows; b.row_begin += chunk) {
      b.row_end = std::min(p.rows, b.row_begin + chunk);
      std::atomic<bool> inside{true};
      for_each_task(workers, b.row_end - b.row_begin, [&](int64_t worker, int64_t i) {
        if (!order(worker, i, from)) inside = false;
      });
      check_inside(p, inside);
      f();
    }
  }

  void add_scores() {
    for_each_task(workers, workers, [&](int64_t, int64_t t) {
      kernels.gather_blocks_scores(p, b, t * b.blocks / workers, (t + 1) * b.blocks / workers, work + t * space);
    });
  }

  void apply(const RowStatistic& statistic) {
    for_each_task(workers, b.row_end - b.row_begin, [&](int64_t, int64_t i) {
      const int64_t positive = begin[i * (b.blocks + 1) + (p.index[(b.row_begin + i) * p.samples] >> log2)];  // the first of its block
      kernels.gather_row_statistic(p, statistic, b.row_begin + i, b.value + i * p.samples, positive - i * p.samples);
    });
  }

  // Values in the order of k, to `out` [N, K].
  void write_values(float* out) {
    for_each_task(workers, b.row_end - b.row_begin, [&](int64_t worker, int64_t i) {
      const int64_t row = (b.row_begin + i) * p.samples;
      each_place(worker, i, [&](int64_t k, int64_t place) { out[row + k] = b.value[place]; });
    });
  }

  // Sums to `out` [N, D]: each thread's own, added up in the order of the threads.
  void write_sums(float* out) {
    float* const sums = work + workers * space;
    out += b.row_begin * p.width;
    for_each_task(workers, workers, [&](int64_t, int64_t t) {
      kernels.gather_blocks_sums(p, b, t * b.blocks / workers, (t + 1) * b.blocks / workers, work + t * space,
                                 partial > 0 ? sums + t * partial : out);
    });
    for (int64_t i = 0; partial > 0 && i < (b.row_end - b.row_begin) * p.width; ++i) {
      out[i] = sums[i];
      for (int64_t t = 1; t < workers; ++t) out[i] += sums[t * partial + i];
    }
  }

 private:
  // False: an index is outside the bank.
  bool order(int64_t worker, int64_t i, const float* from) {
    const int64_t row = (b.row_begin + i) * p.samples, mask = b.block - 1;
    int64_t* const at = begin + i * (b.blocks + 1);
    std::fill_n(at, b.blocks + 1, 0);
    for (int64_t k = 0; k < p.samples; ++k) {
      if (uint64_t(p.index[row + k]) >= uint64_t(p.columns)) return false;
      ++at[(p.index[row + k] >> log2) + 1];
    }
    at[0] = i * p.samples;
    for (int64_t block = 0; block < b.blocks; ++block) at[block + 1] += at[block];
    each_place(worker, i, [&](int64_t k, int64_t place) {
      b.column[place] = uint16_t(p.index[row + k] & mask);
      b.value[place] = from == nullptr ? 0 : from[row + k];
    });
    return true;
  }

  // f(k, place) for every sample of row i, place running through each block's range in the order of k.
  template <class F>
  void each_place(int64_t worker, int64_t i, const F& f) {
    int64_t* const to = next + worker * b.blocks;
    std::copy_n(begin + i * (b.blocks + 1), b.blocks, to);
    const int64_t* const index = p.index + (b.row_begin + i) * p.samples;
    for (int64_t k = 0; k < p.samples; ++k) f(k, to[index[k] >> log2]++);
  }

  const GatherParams& p;
  const kdfast::CpuKernels& kernels;
  const int64_t log2;
  int64_t chunk, workers, space, partial;
  GatherBlocks b{};
  Tensor columns, places, values, floats;
  int64_t *begin, *next;
  float* work;
};

// ---- the ops ----------------------------------------------------------------------------------------------------------

Tensor gather_similarity(const Tensor& query, const Tensor& bank, const Tensor& index) {
  GatherParams p = gather_params("gather_similarity", bank, index);
  p.query = packed<float>("query", query, {p.rows, p.width});
  Tensor out = torch::stable::new_empty(query, {p.rows, p.samples});
  p.out = static_cast<float*>(out.mutable_data_ptr());
  if (p.rows * p.samples == 0) return out;
  if (p.width == 0) return torch::stable::zero_(out);
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t block = kernels.gather_block(p);
  if (block == 0) {
    run_rows(p, p.rows * p.samples, [&](int64_t, int64_t begin, int64_t end) { return kernels.gather_similarity(p, begin, end); });
    return out;
  }
  OrderedRows ordered(p, block);
  ordered.each_chunk(nullptr, [&] {
    ordered.add_scores();
    ordered.write_values(p.out);
  });
  return out;
}

Tensor gather_weighted_sum(const Tensor& weight, const Tensor& bank, const Tensor& index) {
  GatherParams p = gather_params("gather_weighted_sum", bank, index);
  p.weight = packed<float>("weight", weight, {p.rows, p.samples});
  Tensor out = torch::stable::new_empty(weight, {p.rows, p.width});
  p.out = static_cast<float*>(out.mutable_data_ptr());
  if (p.rows * p.width == 0) return out;
  if (p.samples == 0) return torch::stable::zero_(out);
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t block = kernels.gather_block(p);
  if (block == 0) {
    run_rows(p, p.rows, [&](int64_t, int64_t begin, int64_t end) { return kernels.gather_weighted_sum(p, begin, end); });
    return out;
  }
  OrderedRows ordered(p, block);
  ordered.each_chunk(p.weight, [&] { ordered.write_sums(p.out); });
  return out;
}

// Values [N] of the rows' scores; with `pooled` also the sums [N, D] weighted by their derivatives, else [0].
std::tuple<Tensor, Tensor> gather_statistic(const Tensor& query, const Tensor& bank, const Tensor& index, const std::optional<Tensor>& offset,
                                            const std::optional<Tensor>& shift, bool pooled) {
  GatherParams p = gather_params("gather_statistic", bank, index);
  p.query = packed<float>("query", query, {p.rows, p.width});
  STD_TORCH_CHECK(p.samples > 0 && p.width > 0, "index and bank must have at least 1 column");
  RowStatistic s{};
  if (offset.has_value()) s.offset = packed<float>("offset", *offset, {p.rows, p.samples});
  if (shift.has_value()) {
    s.shift_stride = shift->dim() == 1 && shift->size(0) == p.rows && p.rows > 1 ? 1 : 0;
    check("shift", *shift, ScalarType::Float, {s.shift_stride == 1 ? p.rows : 1});
    STD_TORCH_CHECK(shift->is_contiguous(), "shift must be contiguous");
    s.shift = data<float>(*shift);
  }
  Tensor value = torch::stable::new_empty(query, {p.rows}), sums = torch::stable::new_empty(query, {pooled ? p.rows : 0, p.width});
  s.value = static_cast<float*>(value.mutable_data_ptr());
  p.out = pooled ? static_cast<float*>(sums.mutable_data_ptr()) : nullptr;
  if (p.rows == 0) return {value, sums};
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t block = kernels.gather_block(p);
  if (block == 0) {
    const Tensor scores = scratch(workers_of_rows(p, p.rows) * p.samples);
    float* const base = static_cast<float*>(scores.mutable_data_ptr());
    run_rows(p, p.rows, [&](int64_t worker, int64_t begin, int64_t end) {
      return kernels.gather_statistic(p, s, begin, end, base + worker * p.samples);
    });
    return {value, sums};
  }
  OrderedRows ordered(p, block);
  ordered.each_chunk(s.offset, [&] {
    ordered.add_scores();
    ordered.apply(s);
    if (pooled) ordered.write_sums(p.out);
  });
  return {value, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("gather_similarity", TORCH_BOX(&gather_similarity));
  m.impl("gather_weighted_sum", TORCH_BOX(&gather_weighted_sum));
  m.impl("gather_statistic", TORCH_BOX(&gather_statistic));
}
