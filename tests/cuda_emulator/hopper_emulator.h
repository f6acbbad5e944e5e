// The words of csrc/cuda/hopper.cuh on the emulator: barriers that count bytes, copies that arrive late, products of a warpgroup.
//
// A copy arrives when all threads wait for something, so a tile is not there before it was waited for; where KDFAST_EMULATE_BACKWARD=warps
// is set, at once, so a tile that is still read is overwritten. Products are made when they are waited for, and all others wait: not from what
// their registers and tiles held before. Descriptors are taken apart, and shared memory is swizzled, as the PTX ISA has it.
#pragma once

#include <array>

namespace emulator {

struct Product {
  int columns;
  bool add, bfloat;
  uint64_t a, b;
  const uint32_t* registers;  // in place of a
  float* sums;
};

struct Warpgroup {
  static constexpr unsigned kThreads = 128;
  Group made{kThreads};  // its generation counts waits that have ended
  unsigned waiting = 0;
  std::array<std::vector<Product>, kThreads> open;
  std::array<std::deque<std::vector<Product>>, kThreads> groups;
  std::array<bool, kThreads> fenced{};
};

// What blocks have beside emulator.h.
struct Engines {
  std::map<std::pair<const Block*, int>, Group> named;
  std::map<std::pair<const Block*, unsigned>, Warpgroup> warpgroups;
};

inline Engines& engines() {
  static Engines e;
  return e;
}

inline Block& here() { return *device().running->block; }

// Blocks' memory begins at an address that is no multiple of a pattern.
constexpr uint32_t kFirstAddress = 16;

inline uint32_t address_of(const void* shared) { return uint32_t(static_cast<const char*>(shared) - here().shared.data()) + kFirstAddress; }

inline char* at_address(Block& block, uint32_t address) {
  if (address < kFirstAddress || address - kFirstAddress >= block.shared.size() - kGuard) fail("an address beyond shared memory");
  return block.shared.data() + (address - kFirstAddress);
}

// Of every 1024 bytes, row r of 128 has its 16-byte units in the order u ^ r.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline float widen(uint16_t bits, bool bfloat) {
  if (bfloat) {
    const uint32_t wide = uint32_t(bits) << 16;
    float out;
    memcpy(&out, &wide, 4);
    return out;
  }
  _Float16 half;
  memcpy(&half, &bits, 2);
  return float(half);
}

inline uint16_t narrow(float x, bool bfloat) {
  uint16_t out;
  if (bfloat) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    out = uint16_t(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff);
  } else {
    const _Float16 half = _Float16(x);
    memcpy(&out, &half, 2);
  }
  return out;
}

struct Descriptor {
  uint32_t start, leading, stride;
  explicit Descriptor(uint64_t bits) : start(uint32_t(bits & 0x3fff) << 4), leading(uint32_t(bits >> 16 & 0x3fff) << 4), stride(uint32_t(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) fail("a matrix without the 128-byte swizzle");
    if (bits >> 49 & 7) fail("a pattern that does not begin at a multiple of 1024 bytes");
  }
};

inline float number_at(Block& block, uint32_t address, bool bfloat) {
  uint16_t bits;
  memcpy(&bits, at_address(block, swizzled(address)), 2);
  return widen(bits, bfloat);
}

// One product, of all threads of a warpgroup, for each of which `part` has the place of its numbers.
inline void make(Block& block, const std::array<Product, Warpgroup::kThreads>& part) {
  const Product& p = part[0];
  float a[64][16], b[16][128];
  for (const Product& other : part)
    if (other.columns != p.columns || other.a != p.a || other.b != p.b || other.add != p.add || !other.registers != !p.registers)
      fail("threads of a warpgroup give different products");
  const Descriptor right(p.b);
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < p.columns; ++n) {
      const uint32_t offset = p.registers ? uint32_t(n / 64) * right.leading + uint32_t(k / 8) * right.stride + uint32_t(k % 8 * 128 + n % 64 * 2)
                                          : uint32_t(n / 8) * right.stride + uint32_t(n % 8 * 128 + k * 2);
      b[k][n] = number_at(block, right.start + offset, p.bfloat);
    }
  if (p.registers) {
    for (int t = 0; t < int(Warpgroup::kThreads); ++t)
      for (int i = 0; i < 8; ++i) {
        const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, k = t % 4 * 2 + i % 2 + i / 4 * 8;
        a[row][k] = widen(uint16_t(part[size_t(t)].registers[i / 2] >> (i % 2 * 16)), p.bfloat);
      }
  } else {
    const Descriptor left(p.a);
    for (int r = 0; r < 64; ++r)
      for (int k = 0; k < 16; ++k) a[r][k] = number_at(block, left.start + uint32_t(r / 8) * left.stride + uint32_t(r % 8 * 128 + k * 2), p.bfloat);
  }
  for (int t = 0; t < int(Warpgroup::kThreads); ++t)
    for (int i = 0; i < p.columns / 2; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + t % 4 * 2 + i % 2;
      float& to = part[size_t(t)].sums[i];
      float sum = p.add ? to : 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][n];
      to = sum;
    }
}

inline Warpgroup& warpgroup() { return engines().warpgroups[{&here(), device().running->index / Warpgroup::kThreads}]; }
inline unsigned place() { return device().running->index % Warpgroup::kThreads; }

inline void give(const Product& product) {
  Warpgroup& w = warpgroup();
  if (!w.fenced[place()]) fail("a product without a fence before it");
  w.open[place()].push_back(product);
}

inline void make_all_but(size_t pending, Block& block, Warpgroup& w) {
  while (w.groups[0].size() > pending) {
    for (size_t i = 0; i < w.groups[0].front().size(); ++i) {
      std::array<Product, Warpgroup::kThreads> part;
      for (size_t t = 0; t < part.size(); ++t) {
        if (w.groups[t].size() != w.groups[0].size() || w.groups[t].front().size() <= i) fail("threads of a warpgroup give different numbers of products");
        part[t] = w.groups[t].front()[i];
      }
      make(block, part);
    }
    for (auto& groups : w.groups) groups.pop_front();
  }
}

// The products are made when nobody else can go on either, and before copies that are on their way arrive.
inline void wait_for_products(size_t pending) {
  Warpgroup& w = warpgroup();
  w.fenced[place()] = false;
  if (++w.waiting == Warpgroup::kThreads)
    device().on_the_way.push_front([&w, &block = here(), pending] {
      make_all_but(pending, block, w);
      w.waiting = 0, ++w.made.generation, ++device().meetings;
    });
  pause(w.made);
}

}  // namespace emulator

namespace kdfast {
namespace device {

constexpr bool kHopper = true;
inline void stop() { emulator::fail("a kernel that was not compiled for this device"); }
using Barrier = uint64_t;

struct alignas(64) TensorMap {
  const uint16_t* data;
  int64_t entries, rows, width, entry_stride;
  int box_rows;
};

inline uint32_t shared_address(const void* shared) { return emulator::address_of(shared); }

inline void barriers_made() {}
inline void shared_written() {}

inline emulator::Group& named_barrier(int id, int threads) {
  emulator::Group& group = emulator::engines().named[{&emulator::here(), id}];
  group.size = unsigned(threads);
  return group;
}
inline void named_barrier_wait(int id, int threads) { emulator::wait(named_barrier(id, threads), emulator::Meeting::kBarrier); }
inline void named_barrier_arrive(int id, int threads) { emulator::arrive(named_barrier(id, threads), emulator::Meeting::kBarrier); }

inline void prefetch_map(const TensorMap*) {}

inline void copy_box(void* to, const TensorMap* map, int column, int row, int entry, Barrier* barrier) {
  emulator::Block* const block = &emulator::here();
  const uint32_t first = shared_address(to);
  if (first % 128 != 0) emulator::fail("a copy to an address that is no multiple of 128 bytes");
  const auto arrive = [=, map = *map] {
    if (block->running == 0) emulator::fail("a copy arrives after its block has left");
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < 64; ++c) {
        const bool inside = row + r < map.rows && column + c < map.width;
        const uint16_t bits = inside ? map.data[entry * map.entry_stride + (row + r) * map.width + column + c] : uint16_t(0);
        memcpy(emulator::at_address(*block, emulator::swizzled(first + uint32_t(r * 128 + c * 2))), &bits, 2);
      }
    emulator::PhaseBarrier& b = emulator::barrier_at(barrier);
    b.bytes -= map.box_rows * 128;
    emulator::end_phase(b);
  };
  emulator::deliver(arrive);
}

inline void products_begin() { emulator::warpgroup().fenced[emulator::place()] = true; }

inline void products_commit() {
  emulator::Warpgroup& w = emulator::warpgroup();
  w.groups[emulator::place()].push_back(std::move(w.open[emulator::place()]));
  w.open[emulator::place()].clear();
}

template <int kPending, int kCount>
void products_wait(float (&)[kCount]) {
  emulator::wait_for_products(kPending);
}

template <Element kType, bool kAdd, int kCount>
void multiply(float (&d)[kCount], uint64_t a, uint64_t b) {
  emulator::give({2 * kCount, kAdd, kType == Element::kBFloat16, a, b, nullptr, d});
}

template <Element kType, int kCount>
void multiply(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
  emulator::give({2 * kCount, true, kType == Element::kBFloat16, 0, b, a, d});
}

template <Element kType>
uint32_t pair_of(float low, float high) {
  constexpr bool kBFloat = kType == Element::kBFloat16;
  return uint32_t(emulator::narrow(low, kBFloat)) | uint32_t(emulator::narrow(high, kBFloat)) << 16;
}

template <int kCount>
void give_registers() {}
template <int kCount>
void take_registers() {}

}  // namespace device

inline const char* encode_map(device::TensorMap& map, const void* data, Element, int64_t entries, int64_t rows, int64_t width, int64_t entry_stride,
                              int box_rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || width % 8 != 0 || entry_stride % 8 != 0) return "rows must begin at multiples of 16 bytes";
  if (data == nullptr || entries < 1 || rows < 1 || width < 1 || rows > int64_t(1) << 32) return "a tensor without numbers, or of too many";
  if (2 * width >= int64_t(1) << 40 || 2 * entry_stride >= int64_t(1) << 40) return "a stride of 2^40 bytes or more";
  if (box_rows > 256) return "a box has at most 256 rows";
  map = {static_cast<const uint16_t*>(data), entries, rows, width, entry_stride, box_rows};
  return nullptr;
}

}  // namespace kdfast
