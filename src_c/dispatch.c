/* Which ISA runs: the best that this CPU has, or the one that FASTBN_ISA or fbn_use_isa names. */
#include "debug.h"
#include "kernels.h"

#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The ISAs that this CPU has, the best first. */
static const fbn_kernels *available(int index) {
    const fbn_kernels *rows[4];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); /* every CPU with both has F16C */
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        rows[count++] = &fbn_kernels_avx512;
    if (avx2)
        rows[count++] = &fbn_kernels_avx2;
    rows[count++] = &fbn_kernels_sse2;
#elif defined(__aarch64__)
    rows[count++] = &fbn_kernels_neon;
#endif
    rows[count++] = &fbn_kernels_scalar;
    return index >= 0 && index < count ? rows[index] : NULL;
}

static const fbn_kernels *named(const char *name) {
    for (int index = 0;; index++) {
        const fbn_kernels *row = available(index);
        if (row == NULL || strcmp(row->isa, name) == 0)
            return row;
    }
}

/* NULL until the first question. */
static _Atomic(const fbn_kernels *) in_use;

const fbn_kernels *fbn_table(void) {
    const fbn_kernels *row = atomic_load_explicit(&in_use, memory_order_relaxed);
    if (row == NULL) {
        const char *wish = getenv("FASTBN_ISA");
        row = wish ? named(wish) : NULL;
        row = row ? row : available(0);
        atomic_store_explicit(&in_use, row, memory_order_relaxed);
    }
    return row;
}

const fbn_kernels *fbn_table_of_short_rows(void) {
    const fbn_kernels *row = fbn_table();
#if defined(__x86_64__)
    if (row == &fbn_kernels_avx512)
        row = &fbn_kernels_avx2;
#endif
    return row;
}

const char *fbn_isa_name(int index) {
    const fbn_kernels *row = available(index);
    return row ? row->isa : NULL;
}

const char *fbn_isa(void) {
    return fbn_table()->isa;
}

int fbn_use_isa(const char *name) {
    const fbn_kernels *row = named(name);
    if (row)
        atomic_store_explicit(&in_use, row, memory_order_relaxed);
    return row != NULL;
}

#define OP_NAME(OP, op, layouts, activations) [FBN_##OP] = #op,
#define DTYPE_NAME(DTYPE, name, type) [FBN_##DTYPE] = #name,
static const char *const op_names[FBN_OPS] = {FBN_EACH_OP(OP_NAME)};
static const char *const layout_names[FBN_LAYOUTS] = {[FBN_NCS] = "ncs", [FBN_NSC] = "nsc"};
static const char *const dtype_names[FBN_DTYPES] = {FBN_EACH_DTYPE(DTYPE_NAME)};

int fbn_kernel_name(int index, char *name, int size) {
    FBN_ASSERT(index >= 0 && name != NULL && size > 0);
    const fbn_kernels *const row = fbn_table();
    for (int op = 0; op < FBN_OPS; op++)
        for (int layout = 0; layout < FBN_LAYOUTS; layout++)
            for (int dtype = 0; dtype < FBN_DTYPES; dtype++)
                if (row->kernel[op][layout][dtype] != NULL && index-- == 0) {
                    snprintf(name, (size_t)size, "fbn_%s_%s_%s_%s", op_names[op], layout_names[layout], dtype_names[dtype], row->isa);
                    return 1;
                }
    return 0;
}
