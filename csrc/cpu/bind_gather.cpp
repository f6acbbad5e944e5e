// kdfast::gather_similarity and gather_weighted_sum on the CPU: checks, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include "bind_gather.h"

namespace {

using kdfast::BlockSample;
using kdfast::GatherBlocks;

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

// kernel(p, begin, end) over 0 .. items. How they are cut changes no bit of the result.
void run_rows(const GatherParams& p, int64_t items, bool (*kernel)(const GatherParams&, int64_t, int64_t)) {
  const int64_t workers = workers_for(double(p.rows) * double(p.samples) * (kSampleWork + 4 * double(p.width)), items);
  std::atomic<bool> inside{true};
  for_each_task(workers, workers, [&](int64_t, int64_t t) {
    if (!kernel(p, t * items / workers, (t + 1) * items / workers)) inside = false;
  });
  check_inside(p, inside);
}

// ---- by blocks of the bank --------------------------------------------------------------------------------------------

constexpr int64_t kBlockFloats = int64_t(1) << 17;      // of a packed block: half a megabyte stays in a core's L2
constexpr int64_t kOrderedSamples = int64_t(1) << 21;   // ordered at a time: 16 MB, no more than their index
constexpr int64_t kOrderedRows = 1024;                  // their queries and sums are held, and packing is small beside their products

int64_t log2_block(const GatherParams& p) {
  int64_t log2 = 6;
  while (log2 < 11 && (int64_t(2) << log2) * p.width <= kBlockFloats && (int64_t(1) << log2) < p.columns) ++log2;
  return log2;
}

// One row's samples by block: where each block's begin, from `first` on. False: an index is outside the bank.
bool count_row(const GatherParams& p, const int64_t* index, int64_t log2, int64_t blocks, int64_t first, int64_t* begin) {
  std::fill_n(begin, blocks + 1, 0);
  for (int64_t k = 0; k < p.samples; ++k) {
    if (uint64_t(index[k]) >= uint64_t(p.columns)) return false;
    ++begin[(index[k] >> log2) + 1];
  }
  begin[0] = first;
  for (int64_t block = 0; block < blocks; ++block) begin[block + 1] += begin[block];
  return true;
}

// f(k, place) for every sample of one row, place running through each block's range in the order of k.
template <class F>
void each_place(const GatherParams& p, const int64_t* index, int64_t log2, int64_t blocks, const int64_t* begin, int64_t* next, const F& f) {
  std::copy_n(begin, blocks, next);
  for (int64_t k = 0; k < p.samples; ++k) f(k, next[index[k] >> log2]++);
}

// Rows are ordered, then blocks cut among threads, so that each bank row is packed once; sums are then added over the
// threads, in their order.
void run_blocks(const GatherParams& p) {
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t log2 = log2_block(p), blocks = ((p.columns - 1) >> log2) + 1, mask = (int64_t(1) << log2) - 1;
  const int64_t chunks = (p.rows * p.samples + kOrderedSamples - 1) / kOrderedSamples;
  const int64_t chunk = std::min(kOrderedRows, (p.rows + chunks - 1) / chunks);
  const int64_t workers = workers_for(double(chunk) * (double(p.samples) * kSampleWork + double(p.columns) * double(p.width)), blocks);
  const int64_t partial = p.weight != nullptr && workers > 1 ? chunk * p.width : 0;
  GatherBlocks b{0, chunk, mask + 1, blocks, nullptr, nullptr};
  const int64_t space = kernels.gather_blocks_workspace(p, b);

  const Tensor samples = scratch(chunk * p.samples, ScalarType::Long);  // 8 bytes, as a BlockSample
  const Tensor places = scratch(chunk * (blocks + 1) + workers * blocks, ScalarType::Long);
  const Tensor floats = scratch(workers * (space + partial), ScalarType::Float);
  b.samples = static_cast<BlockSample*>(samples.mutable_data_ptr());
  int64_t* const begin = static_cast<int64_t*>(places.mutable_data_ptr());
  int64_t* const next = begin + chunk * (blocks + 1);
  float* const work = static_cast<float*>(floats.mutable_data_ptr());
  float* const sums = work + workers * space;
  b.begin = begin;

  for (b.row_begin = 0; b.row_begin < p.rows; b.row_begin += chunk) {
    b.row_end = std::min(p.rows, b.row_begin + chunk);
    const int64_t rows = b.row_end - b.row_begin;
    const int64_t* const index = p.index + b.row_begin * p.samples;
    std::atomic<bool> inside{true};
    for_each_task(workers, rows, [&](int64_t worker, int64_t i) {
      const int64_t* const row = index + i * p.samples;
      const float* const weight = p.weight == nullptr ? nullptr : p.weight + (b.row_begin + i) * p.samples;
      int64_t* const from = begin + i * (blocks + 1);
      if (!count_row(p, row, log2, blocks, i * p.samples, from)) {
        inside = false;
        return;
      }
      each_place(p, row, log2, blocks, from, next + worker * blocks, [&](int64_t k, int64_t place) {
        b.samples[place] = {int32_t(row[k] & mask), weight == nullptr ? 0.0f : weight[k]};
      });
    });
    check_inside(p, inside);

    float* const out = p.out + b.row_begin * (p.weight == nullptr ? p.samples : p.width);
    for_each_task(workers, workers, [&](int64_t, int64_t t) {
      kernels.gather_blocks(p, b, t * blocks / workers, (t + 1) * blocks / workers, work + t * space, partial > 0 ? sums + t * partial : out);
    });
    if (p.weight == nullptr) {
      for_each_task(workers, rows, [&](int64_t worker, int64_t i) {
        each_place(p, index + i * p.samples, log2, blocks, begin + i * (blocks + 1), next + worker * blocks,
                   [&](int64_t k, int64_t place) { out[i * p.samples + k] = b.samples[place].value; });
      });
    }
    for (int64_t i = 0; partial > 0 && i < rows * p.width; ++i) {
      out[i] = sums[i];
      for (int64_t t = 1; t < workers; ++t) out[i] += sums[t * partial + i];
    }
  }
}

// ---- the ops ----------------------------------------------------------------------------------------------------------

Tensor gather_similarity(const Tensor& query, const Tensor& bank, const Tensor& index) {
  GatherParams p = gather_params("gather_similarity", bank, index);
  p.query = float_rows("query", query, p.rows, p.width);
  Tensor out = torch::stable::new_empty(query, {p.rows, p.samples});
  p.out = static_cast<float*>(out.mutable_data_ptr());
  if (p.rows * p.samples == 0) return out;
  if (p.width == 0) return torch::stable::zero_(out);
  if (kdfast::cpu_kernels().gather_by_blocks(p)) {
    run_blocks(p);
  } else {
    run_rows(p, p.rows * p.samples, kdfast::cpu_kernels().gather_similarity);
  }
  return out;
}

Tensor gather_weighted_sum(const Tensor& weight, const Tensor& bank, const Tensor& index) {
  GatherParams p = gather_params("gather_weighted_sum", bank, index);
  p.weight = float_rows("weight", weight, p.rows, p.samples);
  Tensor out = torch::stable::new_empty(weight, {p.rows, p.width});
  p.out = static_cast<float*>(out.mutable_data_ptr());
  if (p.rows * p.width == 0) return out;
  if (p.samples == 0) return torch::stable::zero_(out);
  if (kdfast::cpu_kernels().gather_by_blocks(p)) {
    run_blocks(p);
  } else {
    run_rows(p, p.rows, kdfast::cpu_kernels().gather_weighted_sum);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("gather_similarity", TORCH_BOX(&gather_similarity));
  m.impl("gather_weighted_sum", TORCH_BOX(&gather_weighted_sum));
}
