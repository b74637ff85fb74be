/* Which of several ways of running a job is the fastest here, found by the time of its calls: no formula knows every machine, nor what else
 * runs on it. docs/numerics.md: choices. */
#define _POSIX_C_SOURCE 200809L
#include "choices.h"
#include "debug.h"

#include <stdatomic.h>
#include <time.h>

/* docs/numerics.md: choices. */
enum {
    JOBS = 1024,     /* that are known at a time */
    CALLS = 8,       /* in which a way is tried, one after the other: the first find the caches and threads as another way left them */
    LEAST_ROUND = 4, /* after so many rounds of calls, and twice as many, ..., another way is tried again */
    GAIN = 16,       /* a later way has to be faster by a part of so many */
    FORGET = 8       /* a longer time counts by a part of so many */
};

typedef struct {
    atomic_uint job; /* by its hash; 0 while free */
    atomic_uint calls;
    atomic_uint nanoseconds[FBN_MOST_WAYS]; /* about the least of late, 0 before the first call */
} record;

static record records[JOBS];

int64_t fbn_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static unsigned name_of(uint64_t job) {
    return (unsigned)(job >> 32) | 1;
}

static record *record_of(uint64_t job) {
    return &records[job % JOBS];
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
    const int best = fastest(known, count);
    if (round < LEAST_ROUND || (round & (round - 1)) != 0)
        return best;
    return (best + 1 + __builtin_ctz(round) % (count - 1)) % count;
}

fbn_choice fbn_choose_way(uint64_t job, const fbn_way *ways, int count) {
    FBN_ASSERT(count >= 1 && count <= FBN_MOST_WAYS);
    fbn_choice choice = {.threads = ways[0].threads, .stream = ways[0].stream};
    if (count == 1)
        return choice;
    record *known = record_of(job);
    if (atomic_load_explicit(&known->job, memory_order_relaxed) != name_of(job)) {
        atomic_store_explicit(&known->calls, 0, memory_order_relaxed);
        for (int i = 0; i < FBN_MOST_WAYS; i++)
            atomic_store_explicit(&known->nanoseconds[i], 0, memory_order_relaxed);
        atomic_store_explicit(&known->job, name_of(job), memory_order_relaxed);
    }
    const unsigned call = atomic_fetch_add_explicit(&known->calls, 1, memory_order_relaxed);
    choice.way = way_of_call(known, call, count);
    choice.threads = ways[choice.way].threads;
    choice.stream = ways[choice.way].stream;
    choice.job = job;
    return choice;
}

void fbn_tell_time(const fbn_choice *choice, int64_t nanoseconds) {
    record *known = record_of(choice->job);
    if (choice->job == 0 || atomic_load_explicit(&known->job, memory_order_relaxed) != name_of(choice->job))
        return;
    const unsigned new = nanoseconds < 1 ? 1 : nanoseconds > UINT32_MAX / 2 ? UINT32_MAX / 2 : (unsigned)nanoseconds;
    atomic_uint *time = &known->nanoseconds[choice->way];
    const unsigned old = atomic_load_explicit(time, memory_order_relaxed);
    atomic_store_explicit(time, old == 0 || new < old ? new : old + (new - old) / FORGET, memory_order_relaxed);
}

int fbn_kept_way(uint64_t job, int count, int64_t *nanoseconds) {
    const record *known = record_of(job);
    const int is_known = atomic_load_explicit(&known->job, memory_order_relaxed) == name_of(job);
    for (int i = 0; i < count; i++)
        nanoseconds[i] = is_known ? atomic_load_explicit(&known->nanoseconds[i], memory_order_relaxed) : 0;
    return is_known ? fastest(known, count) : -1;
}
