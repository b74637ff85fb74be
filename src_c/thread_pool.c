/* The thread pool: started by the first large call, started anew in the child of a fork, owned by one caller at a time. */
#define _POSIX_C_SOURCE 200809L
#include "thread_pool.h"
#include "debug.h"
#include "fastbn.h"
#include "machine.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

/* docs/numerics.md: threads. */
enum {
    MOST_THREADS = 256,
    SPIN_MICROSECONDS = 100, /* how long a worker looks for the next call before it sleeps, */
    MOST_MICROSECONDS = 1000000,
    WAIT_MICROSECONDS = 50, /* and a thread for the tasks of others before it rests */
    REST_NANOSECONDS = 20000,
    LOOKS = 32 /* between two looks at the clock */
};

/* How many tasks of a thread's share of each phase are taken, and how many of a phase are done; in cache lines of their own. */
typedef struct {
    _Alignas(64) atomic_llong taken[FBN_MOST_PHASES];
} share;
typedef struct {
    _Alignas(64) atomic_llong done;
} progress;

static struct {
    pthread_mutex_t owner; /* held by the caller whose phases run */
    pthread_mutex_t lock;  /* held to sleep, to wake, and to start workers */
    pthread_cond_t wake;
    int workers;        /* threads that were started */
    atomic_int asleep;  /* of them, those that wait for `wake` */
    atomic_uint open;   /* the number of the present call, which a worker joins at most once; 0 while none may be joined */
    unsigned calls;     /* the number of the last call */
    atomic_int running; /* workers that may look at what follows */
    atomic_int joined;  /* tickets of workers that want to take part in the present call: as many as `limit` do */
    int limit, count;
    const fbn_phase *phases;
    void *context;
    progress progress[FBN_MOST_PHASES];
    share shares[MOST_THREADS];
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static atomic_int num_threads, spin_microseconds;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t microseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* Returns when `tasks` tasks of a phase are done. */
static void wait_for_tasks(const progress *phase, int64_t tasks) {
    const int64_t start = microseconds();
    for (int look = 1; atomic_load_explicit(&phase->done, memory_order_acquire) != tasks; look++) {
        pause_briefly();
        if (look % LOOKS == 0 && microseconds() - start > WAIT_MICROSECONDS)
            nanosleep(&(struct timespec){0, REST_NANOSECONDS}, NULL);
    }
}

/* Takes the tasks of one share of a phase until none is left; returns how many. */
static int64_t run_share(int number, int owner, int threads, int slot) {
    const fbn_phase *phase = &pool.phases[number];
    const int64_t first = phase->tasks * owner / threads, tasks = phase->tasks * (owner + 1) / threads - first;
    atomic_llong *taken = &pool.shares[owner].taken[number];
    int64_t done = 0;
    while (atomic_load_explicit(taken, memory_order_relaxed) < tasks) {
        const int64_t next = atomic_fetch_add_explicit(taken, 1, memory_order_relaxed);
        if (next >= tasks)
            break;
        phase->task(pool.context, first + (phase->backwards ? tasks - 1 - next : next), slot);
        done++;
    }
    return done;
}

/* Runs tasks of one phase after the other, those of the own share first. */
static void run_phases(int slot) {
    const int threads = pool.limit + 1;
    for (int number = 0; number < pool.count; number++) {
        progress *reached = &pool.progress[number];
        int64_t done = 0;
        for (int i = 0; i < threads; i++)
            done += run_share(number, (slot + i) % threads, threads, slot);
        if (done)
            atomic_fetch_add_explicit(&reached->done, done, memory_order_release);
        wait_for_tasks(reached, pool.phases[number].tasks);
    }
}

/* Waits for a call after `seen` and returns its number. */
static unsigned wait_for_call(unsigned seen) {
    const int64_t start = microseconds();
    unsigned number;
    for (int look = 1;; look++) {
        number = atomic_load(&pool.open);
        if (number != 0 && number != seen)
            return number;
        pause_briefly();
        if (look % LOOKS == 0 && microseconds() - start >= atomic_load_explicit(&spin_microseconds, memory_order_relaxed))
            break;
    }
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.asleep, 1);
    while ((number = atomic_load(&pool.open)) == 0 || number == seen)
        pthread_cond_wait(&pool.wake, &pool.lock);
    atomic_fetch_sub(&pool.asleep, 1);
    pthread_mutex_unlock(&pool.lock);
    return number;
}

/* A worker. It counts as running before it looks whether the call is still open, and the caller closes the call before it looks whether a
 * worker is running: one of the two sees the other. */
static void *work(void *seen_at_start) {
    unsigned seen = (unsigned)(uintptr_t)seen_at_start;
    for (;;) {
        wait_for_call(seen);
        atomic_fetch_add(&pool.running, 1);
        const unsigned number = atomic_load(&pool.open);
        if (number != 0 && number != seen) {
            seen = number;
            const int ticket = atomic_fetch_add(&pool.joined, 1) + 1;
            if (ticket <= pool.limit)
                run_phases(ticket);
        }
        atomic_fetch_sub(&pool.running, 1);
    }
    return NULL;
}

/* Called by the owner. Workers block every signal: those belong to the program's own threads. */
static void start_workers(int wanted) {
    if (pool.workers >= wanted)
        return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.workers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(uintptr_t)pool.calls) != 0)
            break;
        pthread_detach(thread);
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* The child of a fork has the forking thread only: its pool is as at the start. */
static void reset_in_child(void) {
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.workers = 0;
    atomic_store(&pool.asleep, 0);
    atomic_store(&pool.open, 0);
    atomic_store(&pool.running, 0);
}

/* Workers that outnumber the CPUs do not look for work: they would take the time of those that have it. */
static void set_num_threads(int threads) {
    threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
    const char *wish = getenv("FASTBN_SPIN_MICROSECONDS");
    const int wanted = wish ? atoi(wish) : SPIN_MICROSECONDS;
    atomic_store(&spin_microseconds, threads > fbn_cpus() || wanted < 0 ? 0 : wanted > MOST_MICROSECONDS ? MOST_MICROSECONDS : wanted);
    atomic_store(&num_threads, threads);
}

static void initialize(void) {
    pthread_atfork(NULL, NULL, reset_in_child);
    const char *wish = getenv("FASTBN_NUM_THREADS");
    const int threads = wish ? atoi(wish) : 0;
    set_num_threads(threads > 0 ? threads : fbn_cpus());
}

void fbn_set_num_threads(int threads) {
    pthread_once(&once, initialize);
    set_num_threads(threads);
}

int fbn_num_threads(void) {
    pthread_once(&once, initialize);
    return atomic_load(&num_threads);
}

int fbn_spin_microseconds(void) {
    pthread_once(&once, initialize);
    return atomic_load(&spin_microseconds);
}

static void run_alone(const fbn_phase *phases, int count, void *context) {
    for (int i = 0; i < count; i++)
        for (int64_t index = 0; index < phases[i].tasks; index++)
            phases[i].task(context, phases[i].backwards ? phases[i].tasks - 1 - index : index, 0);
}

void fbn_parallel(const fbn_phase *phases, int count, void *context, int threads) {
    FBN_ASSERT(count >= 0 && count <= FBN_MOST_PHASES && threads >= 1 && threads <= MOST_THREADS);
    int64_t most = 1;
    for (int i = 0; i < count; i++)
        most = phases[i].tasks > most ? phases[i].tasks : most;
    if (threads > most)
        threads = (int)most;
    if (threads <= 1 || pthread_mutex_trylock(&pool.owner) != 0) {
        run_alone(phases, count, context);
        return;
    }
    pthread_once(&once, initialize);
    start_workers(threads - 1);
    pool.phases = phases;
    pool.count = count;
    pool.context = context;
    pool.limit = threads - 1;
    atomic_store(&pool.joined, 0);
    for (int i = 0; i < count; i++) {
        atomic_store_explicit(&pool.progress[i].done, 0, memory_order_relaxed);
        for (int slot = 0; slot < threads; slot++)
            atomic_store_explicit(&pool.shares[slot].taken[i], 0, memory_order_relaxed);
    }
    pool.calls = pool.calls + 1 ? pool.calls + 1 : 1;
    atomic_store(&pool.open, pool.calls);
    if (atomic_load(&pool.asleep)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    run_phases(0);
    atomic_store(&pool.open, 0);
    for (int look = 1; atomic_load(&pool.running) != 0; look++) {
        pause_briefly();
        if (look % (LOOKS * LOOKS) == 0)
            nanosleep(&(struct timespec){0, REST_NANOSECONDS}, NULL);
    }
    pthread_mutex_unlock(&pool.owner);
}
