/* Prints a hash of every result of the kernels on made-up data, for `make neon`: two machines agree when their lines do. Within one machine
 * all ISAs, 1 to 3 threads and all ways of running a job have to agree, or it fails. */
#include "bits.h"
#include "choices.h"

/* The choice between two ways with given times: each is tried for 16 calls, the faster one is kept, one slow call does not matter, and they
 * are tried again by turns. */
static int choices_are_right(void) {
    static const fbn_way ways[] = {{1, 0}, {2, 0}};
    const uint64_t job = 0x123456789abcdef1u;
    int64_t kept[2], turns[2] = {0};
    for (int call = 0; call < 32 * 16; call++) {
        const fbn_choice choice = fbn_choose_way(job, ways, 2);
        const int round = call / 16;
        if (round < 2 ? choice.way != round : round < 4 && choice.way != 1)
            return 0;
        turns[choice.way]++;
        fbn_tell_time(&choice, call == 40 ? 5000000 : choice.way == 1 ? 90000 : 100000);
        if (call >= 16 && fbn_kept_way(job, 2, kept) != 1)
            return 0;
    }
    return turns[0] == 3 * 16; /* the rounds 0, 4 and 16 */
}

int main(void) {
    if (!choices_are_right()) {
        fprintf(stderr, "choices: the faster way is not kept, or the other not tried by turns\n");
        return 1;
    }
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
