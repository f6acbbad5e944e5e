// Sums of exponentials relative to a base-2 level, and their logarithm with more digits than a float's.
#pragma once

#include "device.h"

namespace kdfast {
namespace {

constexpr float kBitsPerNatLow = 1.9259629911266175e-08f, kNatsPerBitLow = -1.904654299957768e-09f;  // what a float of them lacks

// A level that exponents can be taken from: inf - inf would be NaN.
__device__ __forceinline__ float shift_of(float level) { return fabsf(level) == INFINITY ? 0.0f : level; }

struct LogSum {
  float nats, low;  // their sum is the logarithm
};

__device__ __forceinline__ LogSum log_sum(float top, float total) {
  const float shift = shift_of(top), rest = log2f(total), level = shift + rest;
  const float of_rest = level - shift;
  float low = (shift - (level - of_rest)) + (rest - of_rest);  // Knuth's two-sum
  if (!(fabsf(level) < INFINITY)) low = 0;
  const float nats = level * kNatsPerBit;
  float error = fmaf(level, kNatsPerBit, -nats) + (low * kNatsPerBit + level * kNatsPerBitLow);
  if (!(fabsf(nats) < INFINITY)) error = 0;
  const float sum = nats + error;
  return {sum, fabsf(sum) < INFINITY ? error - (sum - nats) : 0.0f};
}

}  // namespace
}  // namespace kdfast
