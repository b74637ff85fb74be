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
    LOOKS = 32, /* between two looks at the clock, and before a thread that waits takes tasks of others */
    LINE = 128  /* bytes of which no two threads write their own: two cache lines, which are fetched together */
};

/* What belongs to one thread of a call, by its slot: the caller has 0. */
typedef struct {
    /* Of its share of each phase, the tasks that are taken, below the number of the call that took the last of them. */
    _Alignas(LINE) atomic_ullong taken[FBN_MOST_PHASES];
    _Alignas(LINE) atomic_int busy; /* a worker that may look at the present call */
    atomic_int asleep;              /* a worker that waits for `wake` */
    uint32_t seen;                  /* a worker's last call */
    pthread_mutex_t lock;
    pthread_cond_t wake;
} member;

static struct {
    /* Read by all: the present call, written by its owner but for `stage`. */
    _Alignas(LINE) atomic_ullong open; /* its number and the last slot that takes part; 0 while none may join */
    atomic_ullong stage;               /* its number and the phase whose tasks may be taken */
    const fbn_phase *phases;
    void *context;
    int count, threads;
    _Alignas(LINE) pthread_mutex_t owner; /* held by the caller whose phases run */
    uint32_t calls;                       /* the number of the last call */
    int workers;                          /* threads that were started */
    _Alignas(LINE) atomic_llong done;     /* tasks of the present phase that are done */
    member members[MOST_THREADS];
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER};

static atomic_int num_threads, spin_microseconds;

/* The team of another library that runs the calls, and the number of a member. */
static _Atomic(fbn_team *) team;
static _Atomic(fbn_member_number *) member_number;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t microseconds(void) {
    return fbn_nanoseconds() / 1000;
}

/* A call or a stage of it in one word: the number of the call above the slot or the phase. */
static inline uint64_t word(uint32_t call, int value) {
    return (uint64_t)call << 32 | (uint32_t)value;
}

/* The first task of a share. The first shares have one more where they do not come out even. */
static int64_t first_task(int64_t tasks, int owner, int threads) {
    const int64_t more = tasks % threads;
    return tasks / threads * owner + (owner < more ? owner : more);
}

/* Takes a task of `tasks` in a share; returns which, or -1 where none is left. */
static int64_t take(atomic_ullong *taken, uint32_t call, int64_t tasks) {
    unsigned long long seen = atomic_load_explicit(taken, memory_order_relaxed);
    for (;;) {
        const int64_t next = seen >> 32 == call ? (int64_t)(uint32_t)seen : 0;
        if (next >= tasks)
            return -1;
        if (atomic_compare_exchange_weak_explicit(taken, &seen, word(call, (int)next + 1), memory_order_relaxed, memory_order_relaxed))
            return next;
    }
}

/* Runs the phases from `number` on that have one task, which nobody else waits for, and opens the one behind them. */
static void open_stage(uint32_t call, int number, int slot) {
    for (; number < pool.count && pool.phases[number].tasks == 1; number++)
        pool.phases[number].task(pool.context, 0, slot);
    atomic_store_explicit(&pool.stage, word(call, number), memory_order_release);
}

/* Counts tasks that are done. Who counts the last of a phase opens the next, with the counter at zero again. */
static void count_done(uint32_t call, int number, int64_t done, int slot) {
    if (atomic_fetch_add_explicit(&pool.done, done, memory_order_acq_rel) + done != pool.phases[number].tasks)
        return;
    atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
    open_stage(call, number + 1, slot);
}

/* Takes the tasks of one share of a phase until none is left; returns how many. */
static int64_t run_share(uint32_t call, int number, int owner, int slot) {
    const fbn_phase *phase = &pool.phases[number];
    const int64_t first = first_task(phase->tasks, owner, pool.threads), tasks = first_task(phase->tasks, owner + 1, pool.threads) - first;
    int64_t done = 0;
    for (int64_t next; (next = take(&pool.members[owner].taken[number], call, tasks)) >= 0; done++)
        phase->task(pool.context, first + (phase->backwards ? tasks - 1 - next : next), slot);
    if (done)
        count_done(call, number, done, slot);
    return done;
}

/* What the other shares of a phase have left; returns how many tasks. */
static int64_t run_others(uint32_t call, int number, int slot) {
    int64_t done = 0;
    for (int i = 1; i < pool.threads; i++)
        done += run_share(call, number, (slot + i) % pool.threads, slot);
    return done;
}

/* Runs tasks of one phase after the other until the call has no more: those of the own share first and, where the others take longer, what
 * they have left. Looking for it disturbs them, so that it is done ever more seldom. */
static void run_phases(uint32_t call, int slot) {
    int64_t start = 0; /* of the wait, once it takes long */
    for (int number = -1, look = 0, patience = LOOKS;;) {
        const uint64_t stage = atomic_load_explicit(&pool.stage, memory_order_acquire);
        if (stage >= word(call, number + 1)) {
            number = (int)(uint32_t)stage;
            if (number == pool.count)
                return;
            run_share(call, number, slot, slot);
            look = 0;
            patience = LOOKS;
            start = 0;
            continue;
        }
        pause_briefly();
        if (++look < patience)
            continue;
        look = 0;
        if (number >= 0 && run_others(call, number, slot) > 0)
            continue;
        patience = patience < LOOKS * LOOKS ? 2 * patience : patience;
        if (start == 0)
            start = microseconds();
        else if (microseconds() - start > WAIT_MICROSECONDS)
            nanosleep(&(struct timespec){0, REST_NANOSECONDS}, NULL);
    }
}

/* Wakes the two workers behind a slot, if they take part and are asleep: each that is woken wakes two more. */
static void wake_two(int slot, int last) {
    for (int i = 2 * slot + 1; i <= 2 * slot + 2 && i <= last; i++) {
        member *worker = &pool.members[i];
        if (!atomic_load(&worker->asleep))
            continue;
        pthread_mutex_lock(&worker->lock);
        pthread_cond_signal(&worker->wake);
        pthread_mutex_unlock(&worker->lock);
    }
}

/* Whether a worker takes part in a call that it has not seen. */
static int is_for(const member *worker, uint64_t open) {
    return open >> 32 != 0 && open >> 32 != worker->seen && (int)(uint32_t)open >= (int)(worker - pool.members);
}

/* Returns when there is a call for a worker. */
static void wait_for_call(member *worker) {
    const int64_t start = microseconds();
    for (int look = 1;; look++) {
        if (is_for(worker, atomic_load_explicit(&pool.open, memory_order_relaxed)))
            return;
        pause_briefly();
        if (look % LOOKS == 0 && microseconds() - start >= atomic_load_explicit(&spin_microseconds, memory_order_relaxed))
            break;
    }
    pthread_mutex_lock(&worker->lock);
    atomic_store(&worker->asleep, 1);
    while (!is_for(worker, atomic_load(&pool.open)))
        pthread_cond_wait(&worker->wake, &worker->lock);
    atomic_store(&worker->asleep, 0);
    pthread_mutex_unlock(&worker->lock);
}

/* A worker. It is busy before it looks whether the call is still open, and the caller closes the call before it looks whether a worker is
 * busy: one of the two sees the other. */
static void *work(void *argument) {
    member *worker = argument;
    const int slot = (int)(worker - pool.members);
    for (;;) {
        wait_for_call(worker);
        atomic_store(&worker->busy, 1);
        const uint64_t open = atomic_load(&pool.open);
        if (is_for(worker, open)) {
            worker->seen = (uint32_t)(open >> 32);
            wake_two(slot, (int)(uint32_t)open);
            run_phases(worker->seen, slot);
        }
        atomic_store_explicit(&worker->busy, 0, memory_order_release);
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
        member *worker = &pool.members[pool.workers + 1];
        pthread_mutex_init(&worker->lock, NULL);
        pthread_cond_init(&worker->wake, NULL);
        worker->seen = pool.calls;
        if (pthread_create(&thread, NULL, work, worker) != 0)
            break;
        pthread_detach(thread);
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Numbers the next call. Numbers come again after 2^32 calls, when no share may have an old one. */
static uint32_t next_call(void) {
    if (++pool.calls == 0) {
        for (int i = 0; i < MOST_THREADS; i++)
            for (int j = 0; j < FBN_MOST_PHASES; j++)
                atomic_store(&pool.members[i].taken[j], 0);
        pool.calls = 1;
    }
    return pool.calls;
}

/* The child of a fork has the forking thread only: its pool is as at the start. */
static void reset_in_child(void) {
    pthread_mutex_init(&pool.owner, NULL);
    pool.workers = 0;
    atomic_store(&team, NULL);
    atomic_store(&pool.open, 0);
    atomic_store(&pool.done, 0);
    for (int i = 0; i < MOST_THREADS; i++) {
        atomic_store(&pool.members[i].busy, 0);
        atomic_store(&pool.members[i].asleep, 0);
    }
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

void fbn_use_team(fbn_team *wanted, fbn_member_number *number) {
    pthread_once(&once, initialize);
    if (wanted != NULL) /* a call that has just read the last team needs its numbers */
        atomic_store(&member_number, number);
    atomic_store(&team, wanted);
}

/* A member of another library's team, all of which are woken. Where that has fewer members than the call has shares, they take those of the
 * missing ones. */
static void join(void *number) {
    const int slot = (*(fbn_member_number **)number)();
    if (slot < pool.threads)
        run_phases(pool.calls, slot);
}

static void run_alone(const fbn_phase *phases, int count, void *context) {
    for (int i = 0; i < count; i++)
        for (int64_t index = 0; index < phases[i].tasks; index++)
            phases[i].task(context, phases[i].backwards ? phases[i].tasks - 1 - index : index, 0);
}

static void run_with_team(fbn_team *lent, uint32_t call) {
    fbn_member_number *number = atomic_load(&member_number);
    open_stage(call, 0, 0);
    lent(join, &number, 0, 0);
}

static void run_with_workers(uint32_t call) {
    const int last = pool.threads - 1, is_ready = pool.phases[0].tasks != 1;
    atomic_store_explicit(&pool.stage, is_ready ? word(call, 0) : 0, memory_order_relaxed);
    atomic_store(&pool.open, word(call, last));
    wake_two(0, last);
    if (!is_ready)
        open_stage(call, 0, 0);
    run_phases(call, 0);
    atomic_store(&pool.open, 0);
    for (int i = 1, look = 1; i <= last; i++)
        for (; atomic_load(&pool.members[i].busy); look++) {
            pause_briefly();
            if (look % (LOOKS * LOOKS) == 0)
                nanosleep(&(struct timespec){0, REST_NANOSECONDS}, NULL);
        }
}

void fbn_parallel(const fbn_phase *phases, int count, void *context, int threads, int on_team) {
    FBN_ASSERT(count >= 0 && count <= FBN_MOST_PHASES && threads >= 1 && threads <= MOST_THREADS);
    int64_t most = 1;
    for (int i = 0; i < count; i++) {
        FBN_ASSERT(phases[i].tasks >= 1);
        most = phases[i].tasks > most ? phases[i].tasks : most;
    }
    if (threads > most)
        threads = (int)most;
    if (threads <= 1 || pthread_mutex_trylock(&pool.owner) != 0) {
        run_alone(phases, count, context);
        return;
    }
    pthread_once(&once, initialize);
    fbn_team *const lent = on_team ? atomic_load(&team) : NULL;
    if (lent == NULL)
        start_workers(threads - 1);
    if (lent == NULL && threads > pool.workers)
        threads = pool.workers + 1;
    const uint32_t call = next_call();
    pool.phases = phases;
    pool.count = count;
    pool.context = context;
    pool.threads = threads;
    if (lent)
        run_with_team(lent, call);
    else
        run_with_workers(call);
    pthread_mutex_unlock(&pool.owner);
}
