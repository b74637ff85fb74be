/* Which of several ways of running a job is the fastest here, found by the time of its calls: no formula knows every machine, nor what else
 * runs on it. docs/numerics.md: choices. */
#include "choices.h"
#include "debug.h"

#include <stdatomic.h>
#include <stddef.h>

/* docs/numerics.md: choices. */
enum {
    SETS = 128,      /* of jobs that are known at a time, by their hash, */
    SET_JOBS = 8,    /* and so many in each: in a single place, two jobs in turn would drive each other out before a second call */
    CALLS = 16,      /* in which a way is tried, one after the other: the first find the caches and threads as another way left them */
    LEAST_ROUND = 4, /* after so many rounds of calls, and twice as many, ..., a way is tried again, each in turn */
    GAIN = 16,       /* a later way has to be faster by a part of so many */
    FORGET = 8,      /* a longer time counts by a part of so many, */
    SLOW = 4         /* and is taken for no longer than a part of so many more: something else ran */
};

typedef struct {
    atomic_uint job; /* by its hash; 0 while free */
    atomic_uint calls;
    atomic_uint nanoseconds[FBN_MOST_WAYS]; /* about the least of late, 0 before the first call */
} record;

static record records[SETS][SET_JOBS];
static atomic_uint driven_out; /* jobs that others took the place of */

static unsigned name_of(uint64_t job) {
    return (unsigned)(job >> 32) | 1;
}

/* What is known of a job, or NULL. */
static record *find_record(uint64_t job) {
    record *set = records[job / 2 % SETS];
    for (int i = 0; i < SET_JOBS; i++)
        if (atomic_load_explicit(&set[i].job, memory_order_relaxed) == name_of(job))
            return &set[i];
    return NULL;
}

/* A record without calls for a job that has none: a free one, or that of another job, each in its turn. */
static record *new_record(uint64_t job) {
    record *set = records[job / 2 % SETS];
    int place = 0;
    while (place < SET_JOBS && atomic_load_explicit(&set[place].job, memory_order_relaxed) != 0)
        place++;
    if (place == SET_JOBS)
        place = (int)(atomic_fetch_add_explicit(&driven_out, 1, memory_order_relaxed) % SET_JOBS);
    record *known = &set[place];
    atomic_store_explicit(&known->calls, 0, memory_order_relaxed);
    for (int i = 0; i < FBN_MOST_WAYS; i++)
        atomic_store_explicit(&known->nanoseconds[i], 0, memory_order_relaxed);
    atomic_store_explicit(&known->job, name_of(job), memory_order_relaxed);
    return known;
}

/* The fastest way; the first ones, which take less of the machine, win where there is little between them. */
static int fastest(const record *known, int count) {
    int best = 0;
    uint64_t least = atomic_load_explicit(&known->nanoseconds[0], memory_order_relaxed);
    for (int i = 1; i < count; i++) {
        const uint64_t time = atomic_load_explicit(&known->nanoseconds[i], memory_order_relaxed);
        if (time != 0 && time * (GAIN + 1) < least * GAIN) {
            best = i;
            least = time;
        }
    }
    return best;
}

/* The way of a call by its number. Threads that call at the same time may spoil each other's numbers and times, and no more. */
static int way_of_call(const record *known, unsigned call, int count) {
    const unsigned round = call / CALLS;
    if (round < (unsigned)count)
        return (int)round;
    if (round < LEAST_ROUND || (round & (round - 1)) != 0)
        return fastest(known, count);
    return __builtin_ctz(round) % count; /* by the number of the round alone: what is fastest may change within it */
}

fbn_choice fbn_choose_way(uint64_t job, const fbn_way *ways, int count) {
    FBN_ASSERT(count >= 1 && count <= FBN_MOST_WAYS);
    fbn_choice choice = {.threads = ways[0].threads, .stream = ways[0].stream};
    if (count == 1)
        return choice;
    record *known = find_record(job);
    if (known == NULL)
        known = new_record(job);
    const unsigned call = atomic_fetch_add_explicit(&known->calls, 1, memory_order_relaxed);
    choice.way = way_of_call(known, call, count);
    choice.threads = ways[choice.way].threads;
    choice.stream = ways[choice.way].stream;
    choice.job = job;
    return choice;
}

void fbn_tell_time(const fbn_choice *choice, int64_t nanoseconds) {
    record *known = choice->job == 0 ? NULL : find_record(choice->job);
    if (known == NULL)
        return;
    const unsigned new = nanoseconds < 1 ? 1 : nanoseconds > UINT32_MAX / 2 ? UINT32_MAX / 2 : (unsigned)nanoseconds;
    atomic_uint *time = &known->nanoseconds[choice->way];
    const unsigned old = atomic_load_explicit(time, memory_order_relaxed);
    const unsigned most = old + old / SLOW;
    atomic_store_explicit(time, old == 0 || new < old ? new : old + ((new < most ? new : most) - old) / FORGET, memory_order_relaxed);
}

int fbn_kept_way(uint64_t job, int count, int64_t *nanoseconds) {
    const record *known = find_record(job);
    for (int i = 0; i < count; i++)
        nanoseconds[i] = known ? atomic_load_explicit(&known->nanoseconds[i], memory_order_relaxed) : 0;
    return known ? fastest(known, count) : -1;
}
