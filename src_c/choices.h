/* Which of several ways of running a job is the fastest on this machine. Private to src_c. */
#ifndef FASTBN_CHOICES_H
#define FASTBN_CHOICES_H

#include "fastbn.h"

/* What no result depends on. */
typedef struct {
    int threads, stream;
} fbn_way;

/* A way of a job that is tried or kept: chosen before a call, told the time that the call took. */
fbn_choice fbn_choose_way(uint64_t job, const fbn_way *ways, int count);
void fbn_tell_time(const fbn_choice *choice, int64_t nanoseconds);

/* The way that is kept at present, -1 before the first call, and the time of each in nanoseconds, 0 where none was measured. */
int fbn_kept_way(uint64_t job, int count, int64_t *nanoseconds);

#endif
