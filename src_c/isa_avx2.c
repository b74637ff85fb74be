#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
/* For the size of the library, 70 kB less: no clones of functions for constant arguments, no padding of jumps, no order of instructions
 * but that of the source, which keeps the prefetches of two tensors in turn. Functions begin a cache line. */
#pragma GCC optimize("no-ipa-cp-clone,align-jumps=1,align-labels=1,no-schedule-insns2,align-functions=64")
#endif
#define FBN_AVX2
#define FBN_ISA avx2
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
