// Which instruction sets this compiler can write for this system.
#pragma once

#if defined(__x86_64__)
#define KDFAST_HAS_X86 1
#else
#define KDFAST_HAS_X86 0
#endif

// Compilers that know AMX, and the system that lends its registers.
#if defined(__x86_64__) && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define KDFAST_HAS_AMX 1
#else
#define KDFAST_HAS_AMX 0
#endif
