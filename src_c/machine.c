/* Cache sizes, read once from the running system, CPUs and the clock. */
#if defined(__linux__)
#define _GNU_SOURCE
#include <sched.h>
#endif
#include "machine.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static pthread_once_t once = PTHREAD_ONCE_INIT;
/* Until they are read, and where the system does not tell. docs/numerics.md: caches. */
static int64_t first_cache = 32 << 10, core_cache = 512 << 10, last_cache = 8 << 20;

static int read_line(const char *path, char *line, int size) {
    FILE *file = fopen(path, "r");
    if (file == NULL)
        return 0;
    const int has_line = fgets(line, size, file) != NULL;
    fclose(file);
    return has_line;
}

/* From the description of the Linux kernel, not from sysconf: in a virtual machine sysconf adds up the last caches of the whole host. Index
 * numbers rise with the level; instruction caches are left out. */
static void read_caches(void) {
    for (int index = 0; index < 8; index++) {
        char path[80], line[32];
        int level = 0;
        long long size = 0;
        char unit = 0;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/type", index);
        if (!read_line(path, line, sizeof line) || line[0] == 'I')
            continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/level", index);
        if (!read_line(path, line, sizeof line) || sscanf(line, "%d", &level) != 1)
            continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
        if (!read_line(path, line, sizeof line) || sscanf(line, "%lld%c", &size, &unit) < 1)
            continue;
        size *= unit == 'M' ? 1 << 20 : unit == 'K' ? 1 << 10 : 1;
        if (size > 0 && level == 1)
            first_cache = size;
        if (size > 0 && level == 2)
            core_cache = size;
        if (size > 0 && level >= 2)
            last_cache = size;
    }
}

int64_t fbn_first_cache(void) {
    pthread_once(&once, read_caches);
    return first_cache;
}

int64_t fbn_core_cache(void) {
    pthread_once(&once, read_caches);
    return core_cache;
}

int64_t fbn_last_cache(void) {
    pthread_once(&once, read_caches);
    return last_cache;
}

/* CPUs that a cgroup's quota amounts to, rounded up; 0 where there is none. */
static int quota(void) {
    char line[64];
    long long limit = 0, period = 0;
    if (read_line("/sys/fs/cgroup/cpu.max", line, sizeof line)) {
        if (sscanf(line, "%lld %lld", &limit, &period) != 2)
            return 0;
    } else {
        if (!read_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", line, sizeof line) || sscanf(line, "%lld", &limit) != 1)
            return 0;
        if (!read_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us", line, sizeof line) || sscanf(line, "%lld", &period) != 1)
            return 0;
    }
    return limit > 0 && period > 0 ? (int)((limit + period - 1) / period) : 0;
}

int fbn_cpus(void) {
    int cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        cpus = CPU_COUNT(&set);
#endif
    const int allowed = quota();
    if (allowed > 0 && allowed < cpus)
        cpus = allowed;
    return cpus > 1 ? cpus : 1;
}

int64_t fbn_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}
