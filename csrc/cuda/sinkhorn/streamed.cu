// Sinkhorn's iterations on costs too large for a chip: how a GPU's blocks are divided among problems, and the launch (streamer.cuh).
#include "sinkhorn/streamer.cuh"

namespace kdfast {
namespace {

constexpr int kWaiting = 3;  // what blocks need to wait for one another twice and join the columns, in the time of a pair of rows (computed)

int up(int x, int y) { return (x + y - 1) / y; }

__global__ void __launch_bounds__(RowPairs::kThreads, 1) streamed_kernel(const StreamerParams params) { Streamer(params).run(); }

Launch launch_of(const SinkhornRows& cost, int64_t ranges, void* stream) {
  return {ranges * cost.cluster, cost.threads, Streamer::shared_bytes(cost.threads), cost.cluster, stream};
}

struct Placed {
  StreamerParams params;
  int64_t floats;
};

Placed place(const SinkhornStreamed& problems, float* scratch) {
  const SinkhornRows& cost = problems.cost;
  const int64_t slots = problems.slots, parts = slots * cost.parts, group = ColumnJoin::kGroup, groups = (cost.columns + group - 1) / group;
  StreamerParams all{problems, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, int(groups * group), cost.cluster * (cost.threads / 32)};
  int64_t floats = 0;
  const auto take = [&](int64_t count) {
    float* const begin = scratch == nullptr ? nullptr : scratch + floats;
    floats += count;
    return begin;
  };
  all.counts = reinterpret_cast<unsigned*>(take(slots * GridBarrier::kApart));  // these three begin at multiples of 128 bytes
  all.v = take(slots * all.width), all.sums = take(parts * all.width);
  all.spent = take(parts * all.warps), all.errors = take(2 * parts);
  if (problems.schedule.tol >= 0) all.other_f = take(problems.batch * cost.rows);
  return {all, floats};
}

}  // namespace

bool sinkhorn_streams() { return has_cooperative_launches(); }

bool sinkhorn_streamed_plan(SinkhornStreamed& params) {
  SinkhornRows& cost = params.cost;
  if (!share_columns(cost)) return false;
  const int most = resident(streamed_kernel, launch_of(cost, 1, nullptr)), pairs = int(pairs_of(cost.rows) > 0 ? pairs_of(cost.rows) : 1);
  int64_t least = INT64_MAX;
  for (int share = most; share > 0; share = most / (most / share + 1)) {  // of blocks, or clusters, for a problem: each that leaves room for more
    const int each = up(pairs, share < pairs ? share : pairs), slots = int(most / share < params.batch ? most / share : params.batch);
    const int64_t rounds = (params.batch + slots - 1) / slots, time = rounds * (each + (each < pairs || cost.cluster > 1 ? kWaiting : 0));
    if (time <= least) least = time, cost.parts = up(pairs, each), params.slots = slots;
    if (rounds == 1) break;
  }
  return true;
}

int64_t sinkhorn_streamed_scratch(const SinkhornStreamed& params) { return place(params, nullptr).floats; }

const char* sinkhorn_streamed(const SinkhornStreamed& params, float* scratch, void* stream) {
  Launch how = launch_of(params.cost, int64_t(params.slots) * params.cost.parts, stream);
  how.cooperative = true;
  const StreamerParams all = place(params, scratch).params;
  const char* const error = fill_with_zeros(all.counts, int64_t(params.slots) * GridBarrier::kApart * int64_t(sizeof(unsigned)), stream);
  return error != nullptr ? error : launch(streamed_kernel, how, all);
}

}  // namespace kdfast
