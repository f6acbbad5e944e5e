#include "dispatch.h"

#include "isa/support.h"

#include <atomic>
#include <stdexcept>

#if KDFAST_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kdfast {

// Each unit compiled once for every instruction set, in the order of CpuKernels' bases.
#define KDFAST_UNITS(X, isa)                      \
  X(SimilarityKernels, similarity, isa)           \
  X(DistillationKernels, distillation, isa)       \
  X(PairsKernels, pairs, isa)                     \
  X(TabledKernels, tabled, isa)                   \
  X(TangentKernels, tangent, isa)                 \
  X(PooledKernels, pooled, isa)                   \
  X(PooledSecondKernels, pooled_second, isa)      \
  X(InfoNceKernels, info_nce, isa)                \
  X(MatchingKernels, matching, isa)               \
  X(PackedBankKernels, packed_bank, isa)          \
  X(UnitLengthKernels, unit_length, isa)          \
  X(GatherKernels, gather, isa)                   \
  X(SinkhornKernels, sinkhorn, isa)               \
  X(SinkhornGradientKernels, sinkhorn_gradient, isa) \
  X(SinkhornLayersKernels, sinkhorn_layers, isa)  \
  X(AnglesKernels, angles, isa)                   \
  X(PairSumsKernels, pair_sums, isa)              \
  X(KnnKernels, knn, isa)                         \
  X(MiningKernels, mining, isa)                   \
  X(ChosenKernels, chosen, isa)                   \
  X(DenseKernels, dense, isa)                     \
  X(EveryTripletKernels, every_triplet, isa)      \
  X(ProbeKernels, probe, isa)
#define KDFAST_DECLARE(Kernels, unit, isa) extern const Kernels unit##_kernels_##isa;
#define KDFAST_ENTRY(Kernels, unit, isa) unit##_kernels_##isa,
#define KDFAST_TABLE(isa)                                                \
  KDFAST_UNITS(KDFAST_DECLARE, isa)                                      \
  static const CpuKernels& isa##_kernels() {                             \
    static const CpuKernels table{KDFAST_UNITS(KDFAST_ENTRY, isa) #isa}; \
    return table;                                                        \
  }

KDFAST_TABLE(base)
#if KDFAST_HAS_X86
KDFAST_TABLE(avx2)
KDFAST_TABLE(avx512)
KDFAST_TABLE(avx512_bf16)
#endif
#if KDFAST_HAS_AMX
KDFAST_TABLE(avx512_amx)
#endif

namespace {

struct Candidate {
  const CpuKernels* kernels;
  bool available;
};

#if KDFAST_HAS_AMX
// The processor multiplies tiles of bf16, and the system lends this process the registers, 8 KB that it saves only for who asked.
bool amx_granted() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTiles) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// Best first. Filled once; __builtin_cpu_supports also asks whether the system saves the registers.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> table = [] {
    std::vector<Candidate> t;
#if KDFAST_HAS_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const Candidate bf16{&avx512_bf16_kernels(), avx512 && __builtin_cpu_supports("avx512bf16")}, plain{&avx512_kernels(), avx512};
#if KDFAST_HAS_AMX
    t.push_back({&avx512_amx_kernels(), bf16.available && amx_granted()});
#endif
    // Intel's vdpbf16ps runs at half the rate of two vfmadd or less: there widening bf16 to float is faster, and more exact.
    const bool widen = __builtin_cpu_is("intel");
    t.push_back(widen ? plain : bf16);
    t.push_back(widen ? bf16 : plain);
    t.push_back({&avx2_kernels(), avx2});
#endif
    t.push_back({&base_kernels(), true});
    return t;
  }();
  return table;
}

const CpuKernels* best() {
  for (const Candidate& c : candidates())
    if (c.available) return c.kernels;
  return &base_kernels();
}

std::atomic<const CpuKernels*> forced{nullptr};

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels* const found = best();
  const CpuKernels* const chosen = forced.load(std::memory_order_relaxed);
  return chosen != nullptr ? *chosen : *found;
}

std::vector<std::string> isas_in_binary() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) names.push_back(c.kernels->isa);
  return names;
}

std::vector<std::string> isas_available() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates())
    if (c.available) names.push_back(c.kernels->isa);
  return names;
}

std::string isa_found() { return best()->isa; }

void force_isa(const char* name) {
  if (name == nullptr) {
    forced = nullptr;
    return;
  }
  for (const Candidate& c : candidates()) {
    if (std::string(name) != c.kernels->isa) continue;
    if (!c.available)
      throw std::runtime_error("instruction set '" + std::string(name) + "' is not on this machine; it has " + joined(isas_available()));
    forced = c.kernels;
    return;
  }
  throw std::runtime_error("unknown instruction set '" + std::string(name) + "'; known: " + joined(isas_in_binary()));
}

}  // namespace kdfast
