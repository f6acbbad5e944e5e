// kdfast::gather_scatter on the CPU: checks, the order of the samples, division among threads, registration.

#include <torch/csrc/stable/library.h>

#include <utility>
#include <vector>

#include "gather/bind_gather.h"

namespace {

using kdfast::ScatterEntry;
using kdfast::ScatterParams;

constexpr int64_t kScatterBlocks = 512;  // blocks at most, where M allows: streams that the ordering writes
constexpr int64_t kLeastBlock = 512, kMostBlock = 1 << 20;

// Every sample by block of bank rows; in a block they stay in the order of (n, k). Each worker orders its own rows' samples.
struct ScatterOrder {
  int64_t log2, blocks;
  std::vector<int64_t> begin;  // [blocks + 1]
  Tensor entries;

  ScatterOrder(const GatherParams& p, int64_t workers) {
    for (log2 = 0; (int64_t(1) << log2) < kMostBlock && ((int64_t(1) << log2) < kLeastBlock || p.columns >> log2 > kScatterBlocks);) ++log2;
    blocks = ((p.columns - 1) >> log2) + 1;
    const int64_t mask = (int64_t(1) << log2) - 1;
    std::vector<int64_t> place(workers * blocks);  // how many of a block's samples each worker has, then where it puts the next
    std::atomic<bool> inside{true};
    const auto each_sample = [&](int64_t worker, const auto& f) {
      for (int64_t n = worker * p.rows / workers; n < (worker + 1) * p.rows / workers; ++n)
        for (int64_t at = n * p.samples; at < (n + 1) * p.samples; ++at) f(n, at);
    };
    for_each_task(workers, workers, [&](int64_t, int64_t worker) {
      int64_t* const count = place.data() + worker * blocks;
      bool all = true;
      each_sample(worker, [&](int64_t, int64_t at) {
        const bool there = uint64_t(p.index[at]) < uint64_t(p.columns);
        all &= there;
        ++count[there ? p.index[at] >> log2 : 0];
      });
      if (!all) inside = false;
    });
    check_inside(p, inside);
    int64_t next = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      begin.push_back(next);
      for (int64_t worker = 0; worker < workers; ++worker) next += std::exchange(place[worker * blocks + block], next);
    }
    begin.push_back(next);
    entries = scratch(next * int64_t(sizeof(ScatterEntry)), ScalarType::Byte);
    auto* const to = static_cast<ScatterEntry*>(entries.mutable_data_ptr());
    for_each_task(workers, workers, [&](int64_t, int64_t worker) {
      int64_t* const put = place.data() + worker * blocks;
      each_sample(worker, [&](int64_t n, int64_t at) {
        to[put[p.index[at] >> log2]++] = {int32_t(n), int32_t(p.index[at] & mask), p.weight[at]};
      });
    });
  }
};

Tensor gather_scatter(const Tensor& weight, const Tensor& query, const Tensor& index, int64_t size, ScalarType dtype) {
  STD_TORCH_CHECK(query.dim() == 2 && index.dim() == 2, "query and index must have 2 dimensions, got ", query.dim(), " and ", index.dim());
  STD_TORCH_CHECK(size >= 0, "size must be >= 0, got ", size);
  GatherParams p{};
  p.rows = index.size(0), p.samples = index.size(1), p.columns = size, p.width = query.size(1);
  p.index = index_data(p, index);
  p.weight = packed<float>("weight", weight, {p.rows, p.samples});
  ScatterParams s{};
  s.type = element_type("gather_scatter", dtype);
  s.rows = p.rows, s.columns = p.columns, s.width = p.width;
  s.query = packed<float>("query", query, {p.rows, p.width});
  Tensor out = torch::stable::new_empty(query, {size, p.width}, dtype);
  if (p.rows * p.samples == 0) return torch::stable::zero_(out);
  STD_TORCH_CHECK(p.rows < int64_t(1) << 31, "query must have fewer than 2^31 rows, got ", p.rows);
  if (out.numel() == 0) return out;

  const double samples = double(p.rows) * double(p.samples);
  const int64_t workers = workers_for(samples * (kSampleWork + double(p.width)) + double(size) * double(p.width), p.columns);
  const ScatterOrder order(p, workers);
  s.block = int64_t(1) << order.log2, s.blocks = order.blocks, s.begin = order.begin.data();
  s.entries = static_cast<const ScatterEntry*>(order.entries.const_data_ptr());
  for (int64_t block = 0; block < s.blocks; ++block) s.largest = std::max(s.largest, s.begin[block + 1] - s.begin[block]);
  s.out = out.mutable_data_ptr();
  const kdfast::CpuKernels& kernels = kdfast::cpu_kernels();
  const int64_t space = kernels.gather_scatter_workspace(s);
  const Tensor floats = scratch(workers * space);
  float* const work = static_cast<float*>(floats.mutable_data_ptr());
  for_each_task(workers, workers, [&](int64_t, int64_t t) {
    kernels.gather_scatter(s, t * s.blocks / workers, (t + 1) * s.blocks / workers, work + t * space);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("gather_scatter", TORCH_BOX(&gather_scatter)); }
