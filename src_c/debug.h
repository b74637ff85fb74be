/* Preconditions. They are checked with -DFASTBN_DEBUG alone, as in `make sanitize` and `make neon`, and cost nothing otherwise. Private to
 * src_c. */
#ifndef FASTBN_DEBUG_H
#define FASTBN_DEBUG_H

#if defined(FASTBN_DEBUG)
#include <stdio.h>
#include <stdlib.h>
#define FBN_ASSERT(condition)                                                                                                              \
    ((condition) ? (void)0 : (fprintf(stderr, "Expected %s - at `%s:%d`\n", #condition, __FILE__, __LINE__), abort()))
#else
/* Compiled, so that it cannot go stale, and never evaluated. */
#define FBN_ASSERT(condition) ((void)(0 && (condition)))
#endif

#endif
