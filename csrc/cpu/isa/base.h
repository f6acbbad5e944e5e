// Any processor the compiler targets: SSE2 on x86-64, NEON on arm64.

#define KDFAST_UNIT(unit) unit##_kernels_base
#define KDFAST_LANES 4
#define KDFAST_VECS 2
