/* The kernels under load without Python, for `make races` and its like: callers compute the hashes of bits.h side by side, while the number
 * of threads and the ISA change and children are forked, on the pool's threads and on those of another library, and in each way of running
 * a job. It fails where a hash is not the one that a single thread gives. */
#define _POSIX_C_SOURCE 200809L
#include "bits.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_CALLERS = 64, DTYPES = 4, CASES = SHAPES * DTYPES * 2 };

static uint64_t want[CASES];
static atomic_int finished, wrong;
static int rounds;

/* A case by its number: training and both backward passes with an activation, or the other jobs on hard data. */
static uint64_t result(int number, int threads) {
    const shape it = shapes[number % SHAPES];
    const fbn_dtype dtype = (fbn_dtype)(number / SHAPES % DTYPES);
    if (number >= SHAPES * DTYPES)
        return hard_results(it, dtype, threads);
    return results(it, dtype, (fbn_activation)(number % (FBN_RELU6 + 1)), threads);
}

/* Another library's threads: a team of new ones for each call, where it is given so many. */
enum { MOST_MEMBERS = 8 };
static _Thread_local int number_of_member;

typedef struct {
    void (*member)(void *);
    void *argument;
    int number;
} membership;

static int member_number(void) {
    return number_of_member;
}

static void *be_member(void *context) {
    const membership *of = context;
    number_of_member = of->number;
    of->member(of->argument);
    return NULL;
}

static void run_team(void (*member)(void *), void *argument, unsigned count, unsigned flags) {
    membership members[MOST_MEMBERS];
    pthread_t others[MOST_MEMBERS];
    int started = 0;
    (void)flags;
    for (int i = 1; i < MOST_MEMBERS && i < (count ? (int)count : 3); i++) {
        members[started] = (membership){member, argument, started + 1};
        started += pthread_create(&others[started], NULL, be_member, &members[started]) == 0;
    }
    number_of_member = 0;
    member(argument);
    for (int i = 0; i < started; i++)
        pthread_join(others[i], NULL);
}

static void *call(void *first) {
    for (int round = 0; round < rounds; round++)
        for (int i = 0; i < CASES; i++) {
            const int number = (i * 7 + (int)(intptr_t)first * 5 + round) % CASES;
            way = (run)((i + round) % RUNS);
            on_team = i % 4 == 0;
            if (result(number, 1 + i % fbn_num_threads()) != want[number])
                atomic_fetch_add(&wrong, 1);
        }
    atomic_fetch_add(&finished, 1);
    return NULL;
}

/* A child has a pool of its own. Its status is 0 where the case comes out right. */
static int right_in_child(int number) {
    const pid_t child = fork();
    if (child == 0)
        _exit(result(number, 3) != want[number]);
    int status = 1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

int main(int count, char **arguments) {
    const int callers = count > 1 ? atoi(arguments[1]) : 8, forks = count > 3 ? atoi(arguments[3]) : 0;
    pthread_t threads[MOST_CALLERS];
    rounds = count > 2 ? atoi(arguments[2]) : 1;
    if (callers < 1 || callers > MOST_CALLERS)
        return 2;
    fbn_set_num_threads(4);
    fbn_use_isa("scalar");
    fbn_use_team(run_team, member_number);
    for (int i = 0; i < CASES; i++)
        want[i] = result(i, 1);
    for (int i = 0; i < callers; i++)
        if (pthread_create(&threads[i], NULL, call, (void *)(intptr_t)i) != 0)
            return 2;
    int isas = 0, changes = 0, bad_children = 0;
    while (fbn_isa_name(isas) != NULL)
        isas++;
    for (; atomic_load(&finished) < callers; changes++) {
        fbn_use_isa(fbn_isa_name(changes % isas));
        fbn_set_num_threads(1 + changes % 8);
        if (changes < forks)
            bad_children += !right_in_child(changes % CASES);
        nanosleep(&(struct timespec){0, 2000000}, NULL);
    }
    for (int i = 0; i < callers; i++)
        pthread_join(threads[i], NULL);
    printf("%d callers, %d calls, %d wrong; %d changes; %d children, %d wrong\n", callers, callers * rounds * CASES, wrong, changes,
           changes < forks ? changes : forks, bad_children);
    return wrong != 0 || bad_children != 0;
}
