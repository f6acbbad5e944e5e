// The choice of an instruction set at run time.
#pragma once

#include <string>
#include <vector>

#include "distillation/distillation.h"
#include "engine/probe.h"
#include "gather/gather.h"
#include "info_nce/info_nce.h"
#include "knn/knn.h"
#include "matching/matching.h"
#include "matching/tabled.h"
#include "relations/angles.h"
#include "relations/pair_sums.h"
#include "similarity/packed_bank.h"
#include "similarity/pairs.h"
#include "similarity/pooled.h"
#include "similarity/pooled_second.h"
#include "similarity/similarity.h"
#include "similarity/tangent.h"
#include "similarity/unit_length.h"
#include "sinkhorn/sinkhorn.h"
#include "triplet/chosen.h"
#include "triplet/every_triplet.h"
#include "triplet/mining.h"

namespace kdfast {

// All kernels, as one instruction set has them.
struct CpuKernels : SimilarityKernels,
                    DistillationKernels,
                    PairsKernels,
                    TabledKernels,
                    TangentKernels,
                    PooledKernels,
                    PooledSecondKernels,
                    InfoNceKernels,
                    MatchingKernels,
                    PackedBankKernels,
                    UnitLengthKernels,
                    GatherKernels,
                    SinkhornKernels,
                    SinkhornGradientKernels,
                    SinkhornLayersKernels,
                    AnglesKernels,
                    PairSumsKernels,
                    KnnKernels,
                    MiningKernels,
                    ChosenKernels,
                    DenseKernels,
                    EveryTripletKernels,
                    ProbeKernels {
  const char* isa;
};

// The kernels in force: those forced, else the best this machine can run.
const CpuKernels& cpu_kernels();

std::vector<std::string> isas_in_binary();  // best first
std::vector<std::string> isas_available();  // of those, what this machine can run
std::string isa_found();                    // the best of these

// nullptr: back to the best. Throws std::runtime_error for a name that is unknown, or that this machine cannot run.
void force_isa(const char* name);

}  // namespace kdfast
