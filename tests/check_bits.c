/* Prints a hash of every result of the kernels on made-up data, for `make neon`: two machines agree when their lines do. Within one machine
 * all ISAs, 1 to 3 threads and all ways of running a job have to agree, or it fails. */
#include "bits.h"

int main(void) {
    for (int i = 0; i < SHAPES; i++)
        for (int dtype = FBN_FLOAT32; dtype <= FBN_BFLOAT16; dtype++)
            for (int activation = FBN_NO_ACTIVATION; activation <= FBN_RELU6; activation++) {
                uint64_t want = 0;
                for (int isa = 0; fbn_isa_name(isa) != NULL; isa++)
                    for (int threads = 1; threads <= 3; threads++) {
                        fbn_use_isa(fbn_isa_name(isa));
                        way = (run)((isa + threads) % RUNS);
                        const uint64_t got = results(shapes[i], dtype, activation, threads);
                        want = isa == 0 && threads == 1 ? got : want;
                        if (got != want) {
                            fprintf(stderr, "shape %d dtype %d activation %d: %s differs\n", i, dtype, activation, fbn_isa());
                            return 1;
                        }
                    }
                printf("%d %d %d %016llx\n", i, dtype, activation, (unsigned long long)want);
            }
    for (int i = 0; i < SHAPES; i++)
        for (int dtype = FBN_FLOAT32; dtype <= FBN_BFLOAT16; dtype++) {
            uint64_t want = 0;
            for (int isa = 0; fbn_isa_name(isa) != NULL; isa++)
                for (int threads = 1; threads <= 3; threads++) {
                    fbn_use_isa(fbn_isa_name(isa));
                    way = (run)((isa + threads) % RUNS);
                    const uint64_t got = hard_results(shapes[i], dtype, threads);
                    want = isa == 0 && threads == 1 ? got : want;
                    if (got != want) {
                        fprintf(stderr, "hard data, shape %d dtype %d: %s differs\n", i, dtype, fbn_isa());
                        return 1;
                    }
                }
            printf("hard %d %d %016llx %016llx\n", i, dtype, (unsigned long long)want, (unsigned long long)scaled_weight(shapes[i], dtype));
        }
    return 0;
}
