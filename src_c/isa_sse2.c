#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("sse2"))), apply_to = function)
#else
#pragma GCC target("sse2")
#pragma GCC optimize("Os")
#endif
#define FBN_SSE2
#define FBN_ISA sse2
#define FBN_COMPACT
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
