#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
/* For the size of the library, 70 kB less: no clones of functions for constant arguments, no padding of jumps, no order of instructions
 * but that of the source, which keeps the prefetches of two tensors in turn. Functions and loops begin a cache line: where the shortest
 * loop of sums lay decided a quarter of its time. */
#pragma GCC optimize("no-ipa-cp-clone,align-jumps=1,align-labels=1,no-schedule-insns2,align-functions=64,align-loops=64")
#endif
#define FBN_AVX512
#define FBN_ISA avx512
#define FBN_SHARED_LOOP
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
