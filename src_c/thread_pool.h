/* The thread pool. Not called threads.h: that name is C11's own, and src_c is searched first. Private to src_c. */
#ifndef FASTBN_THREAD_POOL_H
#define FASTBN_THREAD_POOL_H

#include <stdint.h>

/* Task `index` of a call. `slot` numbers the thread that runs it: below the `threads` of the call, and no two tasks that run at the same
 * time have the same, so that it selects scratch memory. */
typedef void fbn_task(void *context, int64_t index, int slot);

/* Runs task(context, index, slot) for every index below tasks, on at most `threads` threads, and returns when all are done. A call from
 * inside a task, or while another thread has the pool, runs everything on the caller. */
void fbn_parallel(fbn_task *task, void *context, int64_t tasks, int threads);

#endif
