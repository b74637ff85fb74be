# cython: boundscheck=False, wraparound=False, freethreading_compatible=True
"""The only Cython: arrays and addresses in, GIL released, no policy. Callers of `Job` have checked shapes, types, strides and overlap.

`_job.pxi` is the one way into a kernel; `_arrays.pxi` and `_dlpack.pxi` check and read for it what is plain: arrays, and tensors of a
framework."""

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_Clear
from libc.math cimport INFINITY
from libc.stdint cimport INT64_MAX, int64_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

cnp.import_array()


cdef extern from "numpy/arrayobject.h":  # not in Cython's own declarations
    object PyArray_NewLikeArray(cnp.ndarray prototype, cnp.NPY_ORDER order, void *dtype, int subok)


cdef extern from "fastbn.h" nogil:
    ctypedef enum fbn_dtype:
        FBN_FLOAT32
        FBN_FLOAT64
        FBN_FLOAT16
        FBN_BFLOAT16

    ctypedef enum fbn_activation:
        FBN_NO_ACTIVATION
        FBN_RELU
        FBN_LEAKY_RELU
        FBN_RELU6

    ctypedef struct fbn_scale_report:
        int64_t nonfinite
        int64_t flushed

    ctypedef struct fbn_tensor:
        char *data
        int64_t n, c, s

    ctypedef struct fbn_vector:
        char *data
        int64_t stride
        int is_f64

    ctypedef struct fbn_choice:
        int threads, stream, way
        uint64_t job

    ctypedef struct fbn_job:
        int64_t N, C, S
        fbn_dtype dtype
        fbn_activation activation
        int frozen, threads, on_team
        double eps
        fbn_tensor out, dresidual, dy, x, residual
        fbn_vector dweight, dbias, weight, bias, mean, var
        double *batch_mean
        double *batch_m2
        int64_t count
        double *sums
        fbn_choice choice

    void fbn_scale_weight(void *out, fbn_scale_report *report, const void *weight, const double *scale, int64_t G, int64_t M, int64_t C,
                          int64_t S, fbn_dtype dtype)
    int64_t fbn_first_without_root(const fbn_vector *var, int64_t C, double eps)
    void fbn_choose(fbn_job *job)
    int64_t fbn_work_bytes(const fbn_job *job)
    ctypedef struct fbn_description:
        int threads, streams, ways
        int[3] way_threads
        int[3] way_streams
        int64_t[3] way_nanoseconds
        int reduces_by_columns, maps_by_columns, fused
        int64_t bytes, most_bytes, core_cache, last_cache

    void fbn_describe(fbn_description *description, const fbn_job *job)
    void fbn_infer(const fbn_job *job, void *work)
    void fbn_train(const fbn_job *job, double momentum, int unbiased, void *work)
    void fbn_stats(const fbn_job *job, void *work)
    void fbn_backward(const fbn_job *job, void *work)
    void fbn_backward_sums(const fbn_job *job, void *work)
    void fbn_backward_input(const fbn_job *job, void *work)
    const char *fbn_isa_name(int index)
    int fbn_use_isa(const char *name)
    const char *fbn_isa()
    int fbn_kernel_name(int index, char *name, int size)
    int fbn_num_threads()
    void fbn_set_num_threads(int threads)
    int fbn_spin_microseconds()
    ctypedef void fbn_team(void (*member)(void *) noexcept nogil, void *argument, unsigned threads, unsigned flags) noexcept nogil
    ctypedef int fbn_member_number() noexcept nogil
    void fbn_use_team(fbn_team *team, fbn_member_number *number)


def scale_weight(uintptr_t out, uintptr_t weight, uintptr_t scale, int64_t G, int64_t M, int64_t C, int64_t S, int dtype):
    """Write round(weight * scale) of shape (G, M, C, S), or only look when out is 0; return (nonfinite, flushed)."""
    cdef fbn_scale_report report
    check_address(<void *>weight, G * M * C * S, "weight")
    check_address(<void *>scale, G * C, "scale")
    with nogil:
        fbn_scale_weight(<void *>out, &report, <const void *>weight, <const double *>scale, G, M, C, S, <fbn_dtype>dtype)
    return report.nonfinite, report.flushed


include "_job.pxi"
include "_arrays.pxi"
include "_dlpack.pxi"


def first_without_root(var, double eps):
    """The first index where var + eps is not positive, or -1."""
    cdef fbn_vector vector
    set_vector(&vector, var, cnp.PyArray_DIM(var, 0), "var")
    return fbn_first_without_root(&vector, cnp.PyArray_DIM(var, 0), eps)


def dense_layout(int axis, tuple arrays):
    """(N, C, S) where all arrays but None are C-contiguous, with elements and more than one channel; else None."""
    cdef Job job = Job.__new__(Job)
    for array in arrays:
        if array is not None and not cnp.PyArray_IS_C_CONTIGUOUS(array):
            return None
    return (job.c.N, job.c.C, job.c.S) if set_dense_sizes(job, arrays[0], axis) else None


def new_moments(int64_t channels):
    """Two new float64 arrays of shape (channels,)."""
    cdef cnp.npy_intp size = channels
    return cnp.PyArray_EMPTY(1, &size, cnp.NPY_FLOAT64, 0), cnp.PyArray_EMPTY(1, &size, cnp.NPY_FLOAT64, 0)


def dtype_codes():
    """The storage types by name, with their numbers in fbn_dtype."""
    return {"float32": <int>FBN_FLOAT32, "float64": <int>FBN_FLOAT64, "float16": <int>FBN_FLOAT16, "bfloat16": <int>FBN_BFLOAT16}


def new_like(array):
    """A new array of array's dtype, shape and memory order, as np.empty_like makes it."""
    return PyArray_NewLikeArray(<cnp.ndarray>array, cnp.NPY_KEEPORDER, NULL, 0)


def is_aligned(array):
    """Whether every element lies at a multiple of its size, and every stride is one."""
    return cnp.PyArray_ISALIGNED(array)


def is_separate(array, *others):
    """Whether each of the others but None is array itself or has an address range of its own."""
    for other in others:
        if not is_apart(array, other):
            return False
    return True


def is_disjoint(array, *others):
    """Whether each of the others but None has an address range of its own."""
    for other in others:
        if other is not None and may_overlap(array, other):
            return False
    return True


def isas():
    """The names of the ISAs that this build and this CPU have, the best first."""
    names = []
    while fbn_isa_name(len(names)) is not NULL:
        names.append(fbn_isa_name(len(names)).decode())
    return names


def isa():
    """The name of the ISA in use."""
    return fbn_isa().decode()


def use_isa(str name):
    """Select an ISA for every call that follows."""
    fbn_use_isa(name.encode())


def kernel_names():
    """The names of the kernels in use."""
    cdef char name[64]
    names = []
    while fbn_kernel_name(len(names), name, sizeof(name)):
        names.append((<bytes>name).decode())
    return names


def use_team(uintptr_t team, uintptr_t number):
    """Have calls of PyTorch's tensors run on the threads of an OpenMP library: the addresses of its GOMP_parallel and omp_get_thread_num;
    0, 0 for threads of our own."""
    fbn_use_team(<fbn_team *>team, <fbn_member_number *>number)


def num_threads():
    """The most threads that a call uses."""
    return fbn_num_threads()


def spin_microseconds():
    """How long threads look for the next call before they sleep."""
    return fbn_spin_microseconds()


def set_num_threads(int threads):
    """Set the most threads that a call uses."""
    fbn_set_num_threads(threads)
