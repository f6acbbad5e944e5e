// The multiply-add rate of one instruction set: 12 independent chains on registers, no memory.
#pragma once

#include "engine/panel.h"
#ifdef KDFAST_TILE_INSTRUCTIONS
#include "engine/amx.h"
#endif

namespace {

constexpr int kChains = 12;  // two a cycle at a latency of 4 need 8; 12 fit the 16 registers of AVX2

// Runs `steps` rounds of the chains; returns the floating-point operations done.
template <class Product>
double probe(Product, int64_t steps) {
  Vec acc[kChains] = {};
  // Numbers of all signs and mantissas: zeros draw less power, and the processor then clocks higher than any product can.
  Vec a, b;
  for (int lane = 0; lane < kLanes; ++lane) {
    a[lane] = 0.37123f * float(lane) - 2.91717f;
    b[lane] = 1.61803f - 0.20761f * float(lane);
  }
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      a = opaque(a);
      acc[c] = Product::multiply_add(a, b, acc[c]);
      acc[c] = opaque(acc[c]);
    }
  }
  Vec sum = {};
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) sum += acc[c];
  volatile float sink = sum[0];
  (void)sink;
  return double(steps) * kChains * kLanes * Product::kPack * 2;
}

double fma_probe(bool bfloat16, int64_t steps) {
#ifdef KDFAST_BF16_INSTRUCTIONS
  if (bfloat16) return probe(BFloat16Product{}, steps);
#endif
  (void)bfloat16;  // without bf16 instructions bf16 is widened, and runs at the float rate
  return probe(Float32Product{}, steps);
}

}  // namespace
