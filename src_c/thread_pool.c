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

/* SPINS: how often a thread looks for work before it sleeps. docs/numerics.md: threads. */
enum { SPINS = 1000, MOST_THREADS = 256 };

static struct {
    pthread_mutex_t owner; /* held by the caller whose tasks run */
    pthread_mutex_t lock;  /* guards what follows, except the atomics that are read without it */
    pthread_cond_t wake, idle;
    int workers;            /* threads that were started */
    int asleep;             /* of them, those that wait for `wake` */
    int joined, limit;      /* workers that take part in the present call, and the most that may */
    int open;               /* whether a worker may still join the present call */
    atomic_uint generation; /* the number of the present call: a worker joins each at most once */
    atomic_int running;     /* workers that have joined and not finished */
    fbn_task *task;         /* the present call: */
    void *context;
    int64_t tasks;
    atomic_llong next; /* the next task that nobody has taken */
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .idle = PTHREAD_COND_INITIALIZER};

static atomic_int num_threads;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Takes tasks of the present call until none is left. */
static void run_tasks(int slot) {
    for (;;) {
        const int64_t index = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
        if (index >= pool.tasks)
            return;
        pool.task(pool.context, index, slot);
    }
}

/* A worker: waits for a call that it has not seen, joins it where there is room, and waits again. */
static void *work(void *seen_at_start) {
    unsigned seen = (unsigned)(uintptr_t)seen_at_start;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load_explicit(&pool.generation, memory_order_relaxed) == seen; spin++)
            pause_briefly();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load_explicit(&pool.generation, memory_order_relaxed) == seen) {
            pool.asleep++;
            pthread_cond_wait(&pool.wake, &pool.lock);
            pool.asleep--;
        }
        seen = atomic_load_explicit(&pool.generation, memory_order_relaxed);
        const int slot = pool.open && pool.joined < pool.limit ? ++pool.joined : 0;
        if (slot)
            atomic_fetch_add_explicit(&pool.running, 1, memory_order_relaxed);
        pthread_mutex_unlock(&pool.lock);
        if (slot == 0)
            continue;
        run_tasks(slot);
        if (atomic_fetch_sub_explicit(&pool.running, 1, memory_order_release) == 1) {
            pthread_mutex_lock(&pool.lock);
            pthread_cond_signal(&pool.idle);
            pthread_mutex_unlock(&pool.lock);
        }
    }
    return NULL;
}

/* Called with the lock held. Workers block every signal: those belong to the program's own threads. */
static void start_workers(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.workers < wanted) {
        pthread_t thread;
        const unsigned seen = atomic_load_explicit(&pool.generation, memory_order_relaxed);
        if (pthread_create(&thread, NULL, work, (void *)(uintptr_t)seen) != 0)
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
    pthread_cond_init(&pool.idle, NULL);
    pool.workers = pool.asleep = pool.joined = pool.open = 0;
    atomic_store(&pool.running, 0);
}

static void set_num_threads(int threads) {
    atomic_store(&num_threads, threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads);
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

static void run_alone(fbn_task *task, void *context, int64_t tasks) {
    for (int64_t index = 0; index < tasks; index++)
        task(context, index, 0);
}

void fbn_parallel(fbn_task *task, void *context, int64_t tasks, int threads) {
    FBN_ASSERT(task != NULL && tasks >= 0 && threads >= 1 && threads <= MOST_THREADS);
    if (threads > tasks)
        threads = (int)tasks;
    if (threads <= 1 || pthread_mutex_trylock(&pool.owner) != 0) {
        run_alone(task, context, tasks);
        return;
    }
    pthread_once(&once, initialize);
    pthread_mutex_lock(&pool.lock);
    start_workers(threads - 1);
    pool.task = task;
    pool.context = context;
    pool.tasks = tasks;
    pool.limit = threads - 1;
    pool.joined = 0;
    pool.open = 1;
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    atomic_fetch_add_explicit(&pool.generation, 1, memory_order_relaxed);
    if (pool.asleep)
        pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);

    run_tasks(0);

    pthread_mutex_lock(&pool.lock);
    pool.open = 0;
    pthread_mutex_unlock(&pool.lock);
    for (int spin = 0; spin < SPINS && atomic_load_explicit(&pool.running, memory_order_acquire) != 0; spin++)
        pause_briefly();
    pthread_mutex_lock(&pool.lock);
    while (atomic_load_explicit(&pool.running, memory_order_acquire) != 0)
        pthread_cond_wait(&pool.idle, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.owner);
}
