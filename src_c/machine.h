/* Caches, CPUs and the clock of the machine that runs this. Private to src_c. */
#ifndef FASTBN_MACHINE_H
#define FASTBN_MACHINE_H

#include <stdint.h>

/* Bytes of the two caches of one core, levels 1 and 2, and of the last cache before memory. */
int64_t fbn_first_cache(void);
int64_t fbn_core_cache(void);
int64_t fbn_last_cache(void);
/* CPUs this process may use: affinity mask and cgroup quota. */
int fbn_cpus(void);
/* Nanoseconds since some moment in the past. */
int64_t fbn_nanoseconds(void);

#endif
