// Closes what an instruction set's header opened.
#if defined(__clang__) && KDFAST_LANES > 4
#pragma clang attribute pop
#endif
