// A CUDA device on one CPU thread: every thread of a block, of a cluster of blocks or of a cooperative grid is a fiber that runs until it waits
// for others.
//
// What it finds that a GPU may hide: a barrier that not all reach, lanes that meet in different shuffles, writes beyond shared memory, reads
// of shared memory that nobody wrote or whose block has left (NaN). And most missing barriers: the first warp that can run does, so that one
// is as far ahead of the others as barriers allow. KDFAST_EMULATE_BACKWARD=warps in the environment prefers the last, =lanes its last lane too.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

constexpr size_t kStack = 64 << 10, kGuard = 256;
constexpr int kWarp = 32;  // threads

enum class Meeting { kBarrier, kShuffle, kVote, kCluster };

// Threads that wait for one another; twice the slots, since the quickest may be one meeting ahead of the slowest.
struct Group {
  unsigned size = 0, arrived = 0, generation = 0;
  Meeting meeting = Meeting::kBarrier;
  uint32_t slots[2][kWarp] = {};
  int any[2] = {};
};

struct Block {
  unsigned index, rank;  // in the grid, in its cluster
  std::vector<char> shared;
  Group all;
  std::map<std::pair<unsigned, unsigned>, Group> lanes;  // of a warp and mask
  unsigned running = 0;                                  // threads that have not finished
};

struct Index {
  unsigned x, y = 0, z = 0;
};

struct Thread {
  jmp_buf state;
  Block* block;
  unsigned index;
  void* stack;
  bool started = false, finished = false;
  Group* waits = nullptr;
  unsigned generation = 0;
  const unsigned* count = nullptr;  // of signals, while there are fewer than are waited for
  unsigned signals = 0;

  bool able() const {
    return !finished && !(waits != nullptr && waits->generation == generation) && !(count != nullptr && int(*count - signals) < 0);
  }
};

// In shared memory; it counts bytes as well.
struct PhaseBarrier {
  Group phase;  // its generation is the number of phases that have ended
  unsigned count = 0, pending = 0;
  int64_t bytes = 0;  // announced and not there yet
};

struct Device {
  std::vector<std::unique_ptr<Block>> blocks;  // resident: those of a cluster, or of a cooperative grid
  std::vector<Thread> threads;
  std::vector<void*> stacks;
  std::vector<Group> clusters;
  std::map<const void*, PhaseBarrier> barriers;
  Thread* running = nullptr;
  jmp_buf scheduler;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  bool last_warp_first = false, last_lane_first = false;
  int64_t meetings = 0;  // of threads of any group, so far
  std::deque<std::function<void()>> on_the_way;  // what engines beside the threads have been told to do
};

inline Device& device() {
  static Device d;
  return d;
}

[[noreturn]] inline void fail(const char* what) {
  const Thread* t = device().running;
  fprintf(stderr, "emulated kernel: %s (block %u, thread %u)\n", what, t ? t->block->index : 0, t ? t->index : 0);
  abort();
}

inline void give_way() {
  if (_setjmp(device().running->state) == 0) _longjmp(device().scheduler, 1);
}

// Until the group's next generation.
inline void pause(Group& group) {
  Thread& t = *device().running;
  t.waits = &group, t.generation = group.generation;
  give_way();
}

// Whether all are there.
inline bool arrive(Group& group, Meeting meeting) {
  if (group.arrived == 0) group.meeting = meeting;
  if (group.meeting != meeting) fail("threads meet in different operations");
  if (++group.arrived < group.size) return false;
  group.arrived = 0, ++group.generation, ++device().meetings;
  return true;
}

inline void wait(Group& group, Meeting meeting) {
  if (!arrive(group, meeting)) pause(group);
}

inline PhaseBarrier& barrier_at(const void* barrier) {
  PhaseBarrier& b = device().barriers[barrier];
  if (b.count == 0) fail("a barrier that was not made");
  return b;
}

inline void end_phase(PhaseBarrier& b) {
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.count, ++b.phase.generation, ++device().meetings;
}

// What engines do: when all threads wait for something, or at once where KDFAST_EMULATE_BACKWARD=warps.
inline void deliver(const std::function<void()>& arrive) {
  Device& d = device();
  if (d.last_warp_first && !d.last_lane_first) {
    arrive();
  } else {
    d.on_the_way.push_back(arrive);
  }
}

inline Group& lanes(unsigned mask) {
  Thread& t = *device().running;
  if (!(mask >> t.index % kWarp & 1)) fail("a lane is not in its own mask");
  Group& group = t.block->lanes[{t.index / kWarp, mask}];
  group.size = unsigned(__builtin_popcount(mask));
  return group;
}

// What lane `from` brought to this meeting of the lanes in `mask`.
inline float exchange(unsigned mask, float value, unsigned from) {
  Group& group = lanes(mask);
  if (!(mask >> from & 1)) fail("a shuffle reads a lane that is not in its mask");
  uint32_t* const slots = group.slots[group.generation % 2];
  memcpy(&slots[device().running->index % kWarp], &value, 4);
  wait(group, Meeting::kShuffle);
  memcpy(&value, &slots[from], 4);
  return value;
}

inline int any(Group& group, Meeting meeting, int predicate) {
  const unsigned turn = group.generation % 2;
  if (group.arrived == 0) group.any[turn] = 0;
  group.any[turn] |= predicate != 0;
  wait(group, meeting);
  return group.any[turn];
}

// A block's memory is gone with its last thread.
inline void close(Block& block) {
  for (size_t i = block.shared.size() - kGuard; i < block.shared.size(); ++i)
    if (block.shared[i] != char(0xff)) fail("a write beyond shared memory");
  memset(block.shared.data(), 0xff, block.shared.size());
}

inline void enter() {
  device().body(device().argument);
  device().running->finished = true;
  _longjmp(device().scheduler, 1);
}

inline void resume(Thread& t) {
  Device& d = device();
  d.running = &t;
  t.waits = nullptr, t.count = nullptr;
  if (_setjmp(d.scheduler) == 0) {
    if (t.started) _longjmp(t.state, 1);
    t.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = t.stack, context.uc_stack.ss_size = kStack, context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
  }
}

// Runs a warp's threads until all of them wait or have finished; whether any ran. (A block's threads are whole warps.)
inline bool run_warp(size_t warp) {
  Device& d = device();
  bool any = false;
  for (bool progress = true; progress;) {
    progress = false;
    for (int i = 0; i < kWarp; ++i) {
      Thread& t = d.threads[warp * kWarp + size_t(d.last_lane_first ? kWarp - 1 - i : i)];
      if (!t.able()) continue;
      resume(t);
      any = progress = true;
      if (t.finished && --t.block->running == 0) close(*t.block);
    }
  }
  return any;
}

// Runs blocks, whole clusters of them, to their end.
inline void run_resident(unsigned first, int blocks, int cluster, int threads, size_t shared) {
  Device& d = device();
  d.blocks.clear(), d.threads.clear();
  d.clusters.assign(size_t(blocks / cluster), Group{unsigned(cluster * threads)});
  for (int i = 0; i < blocks; ++i) {
    d.blocks.push_back(std::make_unique<Block>(Block{first + unsigned(i), unsigned(i % cluster), std::vector<char>(shared + kGuard, char(0xff)), Group{unsigned(threads)}, {}, unsigned(threads)}));
    for (int thread = 0; thread < threads; ++thread) {
      const size_t slot = d.threads.size();
      if (slot == d.stacks.size()) d.stacks.push_back(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      Thread t{};
      t.block = d.blocks.back().get(), t.index = unsigned(thread), t.stack = d.stacks[slot];
      d.threads.push_back(t);
    }
  }
  const size_t warps = (d.threads.size() + kWarp - 1) / kWarp;
  for (;;) {
    for (size_t w = 0; w < warps;) w = run_warp(d.last_warp_first ? warps - 1 - w : w) ? 0 : w + 1;
    if (d.on_the_way.empty()) break;
    const std::function<void()> arriving = std::move(d.on_the_way.front());  // as late as can be: all wait for something
    d.on_the_way.pop_front();
    arriving();
  }
  for (Thread& t : d.threads) {
    d.running = &t;
    if (!t.finished) fail(t.count != nullptr ? "fewer signals than are waited for" : "not all threads reach a barrier");
  }
  d.running = nullptr;
}

}  // namespace emulator

// For tests, by ctypes: barriers, shuffles and votes since the library was loaded.
extern "C" __attribute__((used, visibility("default"))) inline int64_t emulated_meetings() { return emulator::device().meetings; }

// ---- CUDA's words ---------------------------------------------------------------------------------------------------------

#define threadIdx (emulator::Index{emulator::device().running->index})
#define blockIdx (emulator::Index{emulator::device().running->block->index})

using std::min;

inline void __syncthreads() { emulator::wait(emulator::device().running->block->all, emulator::Meeting::kBarrier); }
inline int __syncthreads_or(int predicate) { return emulator::any(emulator::device().running->block->all, emulator::Meeting::kVote, predicate); }
inline int __any_sync(unsigned mask, int predicate) { return emulator::any(emulator::lanes(mask), emulator::Meeting::kVote, predicate); }
inline float __shfl_xor_sync(unsigned mask, float x, int offset) {
  return emulator::exchange(mask, x, emulator::device().running->index % emulator::kWarp ^ unsigned(offset));
}
inline float __shfl_sync(unsigned mask, float x, int lane) { return emulator::exchange(mask, x, unsigned(lane) % emulator::kWarp); }

namespace kdfast {
namespace device {

inline float exp2_fast(float x) {
  const float out = std::exp2(x);
  return out < 0x1p-126f ? 0.0f : out;  // NaN stays
}

inline float reciprocal(float x) {
  const float out = std::fabs(x) < 0x1p-126f ? std::copysign(INFINITY, x) : 1 / x;
  return std::fabs(out) < 0x1p-126f ? std::copysign(0.0f, out) : out;  // NaN stays
}

inline float float_of_half(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return float(half);
}

template <class T>
const T* known_here(const T* pointer) {
  return pointer;
}
inline int known_here(int x) { return x; }
inline float known_here(float x) { return x; }

constexpr bool kClusters = true;
inline unsigned cluster_rank() { return emulator::device().running->block->rank; }
// Where the clusters of all resident blocks are, the first block of this one's.
inline size_t first_of_cluster() {
  emulator::Device& d = emulator::device();
  const emulator::Block& block = *d.running->block;
  return size_t(block.index - d.blocks[0]->index - block.rank);
}
inline void cluster_barrier() {
  emulator::Device& d = emulator::device();
  emulator::wait(d.clusters[first_of_cluster() / (d.blocks.size() / d.clusters.size())], emulator::Meeting::kCluster);
}

inline float* shared_memory() { return reinterpret_cast<float*>(emulator::device().running->block->shared.data()); }

inline const float* of_block(const float* shared, unsigned rank) {
  return reinterpret_cast<const float*>(emulator::device().blocks[first_of_cluster() + rank]->shared.data()) + (shared - shared_memory());
}

using Barrier = uint64_t;

inline void barrier_init(Barrier* barrier, int count) {
  emulator::PhaseBarrier& b = emulator::device().barriers[barrier] = {};
  b.count = b.pending = unsigned(count);
}
inline void barriers_made_for_cluster() {}

inline void barrier_expect(Barrier* barrier, int bytes) {
  emulator::PhaseBarrier& b = emulator::barrier_at(barrier);
  if (b.pending == 0) emulator::fail("more threads arrive at a barrier than it was made for");
  b.bytes += bytes, --b.pending;
  emulator::end_phase(b);
}
inline void barrier_arrive(Barrier* barrier) { barrier_expect(barrier, 0); }

inline void barrier_wait(Barrier* barrier, unsigned parity) {
  emulator::PhaseBarrier& b = emulator::barrier_at(barrier);
  while (b.phase.generation % 2 == parity) emulator::pause(b.phase);
}

inline void send_four(float* to, Barrier* barrier, unsigned rank, float x0, float x1, float x2, float x3) {
  emulator::Block* const block = emulator::device().blocks[first_of_cluster() + rank].get();
  const auto there = [&](const void* shared) { return block->shared.data() + (static_cast<const char*>(shared) - emulator::device().running->block->shared.data()); };
  if ((static_cast<char*>(static_cast<void*>(to)) - emulator::device().running->block->shared.data()) % 16 != 0) emulator::fail("four numbers to no multiple of 16 bytes");
  emulator::deliver([=, place = there(to), bell = there(barrier)] {
    if (block->running == 0) emulator::fail("numbers arrive after their block has left");
    const float x[4] = {x0, x1, x2, x3};
    memcpy(place, x, sizeof(x));
    emulator::PhaseBarrier& b = emulator::barrier_at(bell);
    b.bytes -= int64_t(sizeof(x));
    emulator::end_phase(b);
  });
}

inline void signal(unsigned* count) { ++*count, ++emulator::device().meetings; }
inline void await(const unsigned* count, unsigned signals) {
  emulator::Thread& t = *emulator::device().running;
  t.count = count, t.signals = signals;
  if (!t.able()) emulator::give_way();
  t.count = nullptr;
}

}  // namespace device

inline int processors() {
  const char* const given = getenv("KDFAST_EMULATE_PROCESSORS");
  return given ? atoi(given) : 1;
}
inline bool has_clusters() { return true; }
inline bool has_cooperative_launches() { return true; }

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster;
  void* stream;
  bool cooperative = false;
};

inline const char* fill_with_zeros(void* data, int64_t bytes, void*) {
  memset(data, 0, size_t(bytes));
  return nullptr;
}

// Of a multiprocessor's 2048 threads: it has registers for all.
template <class Params>
int resident(void (*)(Params), const Launch& how) {
  if (const char* const given = getenv("KDFAST_EMULATE_RESIDENT")) return atoi(given);
  const int count = 2048 / how.threads * processors() / how.cluster;
  return count > 0 ? count : 1;
}

template <class Params>
const char* launch(void (*kernel)(Params), const Launch& how, const Params& params) {
  if (how.blocks < 1 || how.blocks > INT32_MAX || how.threads < 1) return "invalid configuration argument";  // as the CUDA runtime has it
  if (how.blocks % how.cluster != 0) return "blocks must be a multiple of the cluster";
  if (how.threads % emulator::kWarp != 0 || how.threads > 1024 || how.cluster > 8 || how.shared_bytes > (227 << 10)) return "beyond the limits of a device";
  if (how.cooperative && how.blocks > int64_t(how.cluster) * resident(kernel, how)) return "too many blocks in cooperative launch";
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  } call{kernel, params};
  emulator::Device& d = emulator::device();
  d.body = [](void* self) { static_cast<Call*>(self)->kernel(static_cast<Call*>(self)->params); };
  d.argument = &call;
  const char* const backward = getenv("KDFAST_EMULATE_BACKWARD");
  d.last_warp_first = backward != nullptr, d.last_lane_first = backward != nullptr && strcmp(backward, "lanes") == 0;
  const int64_t together = how.cooperative ? how.blocks : how.cluster;
  for (int64_t first = 0; first < how.blocks; first += together)
    emulator::run_resident(unsigned(first), int(together), how.cluster, how.threads, size_t(how.shared_bytes));
  return nullptr;
}

}  // namespace kdfast
