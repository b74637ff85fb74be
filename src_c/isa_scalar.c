#define FBN_SCALAR
#define FBN_ISA scalar
#include "kernels.inc"
