/* What the schedule knows about the machine. Private to src_c. */
#ifndef FASTBN_MACHINE_H
#define FASTBN_MACHINE_H

#include <stdint.h>

/* Bytes of the cache of one core (level 2) and of the last cache before memory. */
int64_t fbn_core_cache(void);
int64_t fbn_last_cache(void);
/* CPUs this process may use: affinity mask and cgroup quota. */
int fbn_cpus(void);

/* task(context, index, slot) for every index below tasks; slot is below fbn_num_threads() and no two run at once in one slot.
 * At most `threads` run; a call from inside a task, or while another thread has the pool, runs everything on the caller. */
typedef void fbn_task(void *context, int64_t index, int slot);
void fbn_parallel(fbn_task *task, void *context, int64_t tasks, int threads);

#endif
