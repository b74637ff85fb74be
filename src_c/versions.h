/* One function, compiled for each width of vectors, for arithmetic that is no kernel. Private to src_c. */
#ifndef FASTBN_VERSIONS_H
#define FASTBN_VERSIONS_H

#include "kernels.h"

/* A function that is inlined into its callers, and so compiled for what they may use. */
#define FBN_BODY static inline __attribute__((always_inline, unused))

/* Defines void name(parameters) as name_body(arguments), a FBN_BODY, in the version for the ISA in use. The bits are the same: compilers
 * neither fuse nor reorder. What x86 has beside AVX is a fallback, compiled for size.
 * docs/numerics.md: versions of the arithmetic of channels. */
#if defined(__x86_64__)
#define FBN_VERSION(name, suffix, attribute, parameters, arguments)                                                                        \
    __attribute__((attribute)) static void name##_##suffix parameters {                                                                    \
        name##_body arguments;                                                                                                             \
    }
#define FBN_VERSIONS(name, parameters, arguments)                                                                                          \
    FBN_VERSION(name, 64, target("avx512f,avx512bw,avx512vl,avx512dq"), parameters, arguments)                                             \
    FBN_VERSION(name, 32, target("avx2"), parameters, arguments)                                                                           \
    FBN_VERSION(name, 16, cold, parameters, arguments)                                                                                     \
    static void name parameters {                                                                                                          \
        switch (fbn_table()->vector_bytes) {                                                                                               \
        case 64:                                                                                                                           \
            name##_64 arguments;                                                                                                           \
            break;                                                                                                                         \
        case 32:                                                                                                                           \
            name##_32 arguments;                                                                                                           \
            break;                                                                                                                         \
        default:                                                                                                                           \
            name##_16 arguments;                                                                                                           \
        }                                                                                                                                  \
    }
#else
#define FBN_VERSIONS(name, parameters, arguments)                                                                                          \
    static void name parameters {                                                                                                          \
        name##_body arguments;                                                                                                             \
    }
#endif

#endif
