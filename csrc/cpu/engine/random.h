// Counter-based random numbers: those of kdfast/_core/random.py, to the bit.
#pragma once

#include <stdint.h>

namespace {

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// 64 random bits for each slot of a row, keyed by (seed, row, slot).
struct RowBits {
  uint64_t key;
  RowBits(int64_t seed, int64_t row) : key(mix_bits(mix_bits(uint64_t(seed) + 0x9E3779B97F4A7C15u) + uint64_t(row))) {}
  uint64_t at(int64_t slot) const { return mix_bits(key + uint64_t(slot)); }
};

// Uniform in (0, 1), keyed by (seed, row, slot).
inline double uniform(int64_t seed, int64_t row, int64_t slot) { return (double(RowBits(seed, row).at(slot) >> 12) + 0.5) * 0x1p-52; }

}  // namespace
