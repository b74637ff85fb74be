/* The thread pool. Not called threads.h: that name is C11's own, and src_c is searched first. Private to src_c. */
#ifndef FASTBN_THREAD_POOL_H
#define FASTBN_THREAD_POOL_H

#include <stdint.h>

/* Task `index` of a phase. `slot` numbers the thread that runs it: below the `threads` of the call, and no two tasks that run at the same
 * time have the same, so that it selects scratch memory. */
typedef void fbn_task(void *context, int64_t index, int slot);

/* A phase runs task(context, index, slot) for every index below tasks, at least 1. Each thread begins with its own share of neighboring
 * tasks, the same in every call and in every phase, so that it meets what its core's cache has; after a short wait it takes those of
 * others. */
typedef struct {
    fbn_task *task;
    int64_t tasks;
    int backwards; /* each share from its end on: from what a phase before has left in the cache */
} fbn_phase;

enum { FBN_MOST_PHASES = 6 };

/* Runs phases one after the other, each when all tasks of the one before are done, on at most `threads` threads, and returns when all are
 * done. The threads are woken once, by this pool or, `on_team`, by the team of fbn_use_team. A call from inside a task, or while another
 * thread has the pool, runs everything on the caller. */
void fbn_parallel(const fbn_phase *phases, int count, void *context, int threads, int on_team);

#endif
