#if defined(__aarch64__)
#define FBN_NEON
#define FBN_ISA neon
#include "kernels.inc"
#endif
