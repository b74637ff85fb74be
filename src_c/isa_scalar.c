#if !defined(__clang__)
#pragma GCC optimize("Os")
#endif
#define FBN_SCALAR
#define FBN_ISA scalar
#define FBN_COMPACT
#include "kernels.inc"
