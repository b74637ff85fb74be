# cython: boundscheck=False, wraparound=False, freethreading_compatible=True
"""The only Cython: arrays and addresses in, GIL released, no policy. Callers have checked shapes, types, strides and overlap."""

cimport numpy as cnp
from cpython.exc cimport PyErr_Clear
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cnp.import_array()


cdef extern from "fastbn.h" nogil:
    ctypedef enum fbn_dtype:
        pass

    ctypedef enum fbn_activation:
        pass

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

    ctypedef struct fbn_job:
        int64_t N, C, S
        fbn_dtype dtype
        fbn_activation activation
        int frozen, threads
        double eps
        fbn_tensor out, dresidual, dy, x, residual
        fbn_vector dweight, dbias, weight, bias, mean, var
        double *batch_mean
        double *batch_m2
        int64_t count
        double *sums

    void fbn_scale_weight(void *out, fbn_scale_report *report, const void *weight, const double *scale, int64_t G, int64_t M, int64_t C,
                          int64_t S, fbn_dtype dtype)
    int64_t fbn_first_without_root(const fbn_vector *var, int64_t C, double eps)
    int64_t fbn_work_bytes(const fbn_job *job)
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


def scale_weight(uintptr_t out, uintptr_t weight, uintptr_t scale, int64_t G, int64_t M, int64_t C, int64_t S, int dtype):
    """Write round(weight * scale) over the view (G, M, C, S), or only look when out is 0; return (nonfinite, flushed)."""
    cdef fbn_scale_report report
    check_address(<void *>weight, G * M * C * S, "weight")
    check_address(<void *>scale, G * C, "scale")
    with nogil:
        fbn_scale_weight(<void *>out, &report, <const void *>weight, <const double *>scale, G, M, C, S, <fbn_dtype>dtype)
    return report.nonfinite, report.flushed


cdef int check_address(const void *address, int64_t elements, str where) except -1:
    """Raise where elements have no memory, as those of a tensor that only stands for others: 0 means None to the kernels."""
    if address is NULL and elements:
        raise RuntimeError(f"Expected memory, got address 0 for {elements} elements - at `{where}`")
    return 0


cdef fbn_job new_job(tuple view, int dtype, int activation, double eps, int threads):
    """`threads`, where not 0, are the most that the caller wants beside the most that the process may use."""
    cdef fbn_job job
    cdef int most = fbn_num_threads()
    memset(&job, 0, sizeof(job))
    job.N, job.C, job.S = view[0], view[1], view[2]
    job.dtype = <fbn_dtype>dtype
    job.activation = <fbn_activation>activation
    job.eps = eps
    job.threads = threads if 0 < threads < most else most
    return job


cdef int set_tensor(fbn_tensor *tensor, object array, tuple view, int *index, str where) except -1:
    """The strides of the arrays that are there, or of those whose address is given, follow the sizes in view, in the order of the calls; a
    view of sizes alone is of C-contiguous arrays."""
    if array is None:
        return 0
    tensor.data = <char *><uintptr_t>array if isinstance(array, int) else <char *>cnp.PyArray_DATA(array)
    check_address(tensor.data, <int64_t>view[0] * <int64_t>view[1] * <int64_t>view[2], where)
    if len(view) == 3:
        tensor.n, tensor.c, tensor.s = <int64_t>view[1] * <int64_t>view[2], view[2], 1
        return 0
    tensor.n, tensor.c, tensor.s = view[index[0]], view[index[0] + 1], view[index[0] + 2]
    index[0] += 3
    return 0


cdef int set_vector(fbn_vector *vector, object array, int64_t length, str where) except -1:
    """From an array, or from a tuple (address, stride in elements, whether it is float64, ...)."""
    if array is None:
        return 0
    if isinstance(array, tuple):
        vector.data = <char *><uintptr_t>array[0]
        vector.stride = array[1]
        vector.is_f64 = array[2]
    else:
        vector.data = <char *>cnp.PyArray_DATA(array)
        vector.is_f64 = cnp.PyArray_ITEMSIZE(array) == 8
        vector.stride = cnp.PyArray_STRIDE(array, 0) // cnp.PyArray_ITEMSIZE(array)
    return check_address(vector.data, length, where)


cdef int set_moments(fbn_job *job, object batch_mean, object batch_m2) except -1:
    job.batch_mean = <double *>cnp.PyArray_DATA(batch_mean)
    job.batch_m2 = <double *>cnp.PyArray_DATA(batch_m2)
    check_address(job.batch_mean, job.C, "batch_mean")
    return check_address(job.batch_m2, job.C, "batch_m2")


cdef void *new_work(const fbn_job *job) except NULL:
    cdef void *work = malloc(<size_t>fbn_work_bytes(job) + 1)
    if work is NULL:
        raise MemoryError
    return work


def infer(x, out, residual, mean, var, weight, bias, tuple view, int dtype, int activation, double eps, int threads=0):
    """y into out; view holds the sizes and the strides of x, out and residual."""
    cdef fbn_job job = new_job(view, dtype, activation, eps, threads)
    cdef int index = 3
    set_tensor(&job.x, x, view, &index, "x")
    set_tensor(&job.out, out, view, &index, "out")
    set_tensor(&job.residual, residual, view, &index, "residual")
    set_vector(&job.mean, mean, job.C, "mean")
    set_vector(&job.var, var, job.C, "var")
    set_vector(&job.weight, weight, job.C, "weight")
    set_vector(&job.bias, bias, job.C, "bias")
    cdef void *work = new_work(&job)
    with nogil:
        fbn_infer(&job, work)
        free(work)


def train(x, out, residual, running_mean, running_var, weight, bias, batch_mean, batch_m2, tuple view, int dtype, int activation, double eps,
          double momentum, bint unbiased, int threads=0):
    """y into out, statistics into batch_mean and batch_m2, running statistics moved; view as in infer."""
    cdef fbn_job job = new_job(view, dtype, activation, eps, threads)
    cdef int index = 3
    set_tensor(&job.x, x, view, &index, "x")
    set_tensor(&job.out, out, view, &index, "out")
    set_tensor(&job.residual, residual, view, &index, "residual")
    set_vector(&job.mean, running_mean, job.C, "running_mean")
    set_vector(&job.var, running_var, job.C, "running_var")
    set_vector(&job.weight, weight, job.C, "weight")
    set_vector(&job.bias, bias, job.C, "bias")
    set_moments(&job, batch_mean, batch_m2)
    cdef void *work = new_work(&job)
    with nogil:
        fbn_train(&job, momentum, unbiased, work)
        free(work)


def stats(x, batch_mean, batch_m2, tuple view, int dtype, int threads=0):
    """Statistics into batch_mean and batch_m2; view holds the sizes and the strides of x."""
    cdef fbn_job job = new_job(view, dtype, 0, 0, threads)
    cdef int index = 3
    set_tensor(&job.x, x, view, &index, "x")
    set_moments(&job, batch_mean, batch_m2)
    cdef void *work = new_work(&job)
    with nogil:
        fbn_stats(&job, work)
        free(work)


def backward(x, dx, dy, residual, dresidual, dweight, dbias, weight, bias, batch_mean, batch_m2, int64_t count, tuple view, int dtype,
             int activation, double eps, bint frozen, int threads=0):
    """Gradients into dx, dresidual, dweight and dbias; view holds the sizes and the strides of x, dx, dy, residual and dresidual."""
    cdef fbn_job job = new_job(view, dtype, activation, eps, threads)
    cdef int index = 3
    set_tensor(&job.x, x, view, &index, "x")
    set_tensor(&job.out, dx, view, &index, "dx")
    set_tensor(&job.dy, dy, view, &index, "dy")
    set_tensor(&job.residual, residual, view, &index, "residual")
    set_tensor(&job.dresidual, dresidual, view, &index, "dresidual")
    set_vector(&job.dweight, dweight, job.C, "dweight")
    set_vector(&job.dbias, dbias, job.C, "dbias")
    set_vector(&job.weight, weight, job.C, "weight")
    set_vector(&job.bias, bias, job.C, "bias")
    set_moments(&job, batch_mean, batch_m2)
    job.count = count
    job.frozen = frozen
    cdef void *work = new_work(&job)
    with nogil:
        fbn_backward(&job, work)
        free(work)


def backward_sums(x, dy, dweight, dbias, weight, bias, batch_mean, batch_m2, int64_t count, sums, tuple view, int dtype, int activation,
                  double eps, int threads=0):
    """Sums of shape (2, C), dweight and dbias of these values; view holds the sizes and the strides of x and dy."""
    cdef fbn_job job = new_job(view, dtype, activation, eps, threads)
    cdef int index = 3
    set_tensor(&job.x, x, view, &index, "x")
    set_tensor(&job.dy, dy, view, &index, "dy")
    set_vector(&job.dweight, dweight, job.C, "dweight")
    set_vector(&job.dbias, dbias, job.C, "dbias")
    set_halves(&job, weight, bias, batch_mean, batch_m2, count, sums)
    cdef void *work = new_work(&job)
    with nogil:
        fbn_backward_sums(&job, work)
        free(work)


def backward_input(x, dx, dy, weight, bias, batch_mean, batch_m2, int64_t count, sums, tuple view, int dtype, int activation, double eps,
                   int threads=0):
    """dx of sums over `count` values per channel; view holds the sizes and the strides of x, dx and dy."""
    cdef fbn_job job = new_job(view, dtype, activation, eps, threads)
    cdef int index = 3
    set_tensor(&job.x, x, view, &index, "x")
    set_tensor(&job.out, dx, view, &index, "dx")
    set_tensor(&job.dy, dy, view, &index, "dy")
    set_halves(&job, weight, bias, batch_mean, batch_m2, count, sums)
    cdef void *work = new_work(&job)
    with nogil:
        fbn_backward_input(&job, work)
        free(work)


cdef int set_halves(fbn_job *job, object weight, object bias, object batch_mean, object batch_m2, int64_t count, object sums) except -1:
    set_vector(&job.weight, weight, job.C, "weight")
    set_vector(&job.bias, bias, job.C, "bias")
    set_moments(job, batch_mean, batch_m2)
    job.count = count
    job.sums = <double *>cnp.PyArray_DATA(sums)
    return check_address(job.sums, job.C, "sums")


include "_exchange.pxi"


def first_without_root(var, double eps):
    """The first index where var + eps is not positive, or -1."""
    cdef fbn_vector vector
    set_vector(&vector, var, cnp.PyArray_DIM(var, 0), "var")
    return fbn_first_without_root(&vector, cnp.PyArray_DIM(var, 0), eps)


def dense_view(int axis, tuple arrays):
    """(N, C, S) where all arrays that are there are C-contiguous, with elements and more than one channel; else None."""
    cdef int i
    cdef int64_t before = 1, behind = 1
    x = arrays[0]
    for array in arrays:
        if array is not None and not cnp.PyArray_IS_C_CONTIGUOUS(array):
            return None
    for i in range(cnp.PyArray_NDIM(x)):
        if i < axis:
            before *= cnp.PyArray_DIM(x, i)
        elif i > axis:
            behind *= cnp.PyArray_DIM(x, i)
    if before * behind == 0 or cnp.PyArray_DIM(x, axis) < 2:
        return None
    return before, cnp.PyArray_DIM(x, axis), behind


def new_moments(int64_t channels):
    """Two new float64 arrays of shape (channels,)."""
    cdef cnp.npy_intp size = channels
    return cnp.PyArray_EMPTY(1, &size, cnp.NPY_FLOAT64, 0), cnp.PyArray_EMPTY(1, &size, cnp.NPY_FLOAT64, 0)


def numpy_code(array):
    """The number in fbn_dtype of an ndarray of a NumPy type, aligned and in native byte order, or -1."""
    cdef int number
    if not cnp.PyArray_CheckExact(array) or not cnp.PyArray_ISBEHAVED_RO(array):
        return -1
    number = cnp.PyArray_TYPE(array)
    return 0 if number == cnp.NPY_FLOAT32 else 1 if number == cnp.NPY_FLOAT64 else 2 if number == cnp.NPY_FLOAT16 else -1


def is_vector(array, int64_t length):
    """Whether array is an ndarray of float32 or float64, aligned, in native byte order, of shape (length,)."""
    return (
        cnp.PyArray_CheckExact(array)
        and (cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32 or cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64)
        and cnp.PyArray_ISBEHAVED_RO(array)
        and cnp.PyArray_NDIM(array) == 1
        and cnp.PyArray_DIM(array, 0) == length
    )


def is_like(array, other):
    """Whether array is an ndarray of other's dtype, shape and strides, aligned and writable, without gaps."""
    cdef int i
    if not (
        cnp.PyArray_CheckExact(array)
        and <void *>cnp.PyArray_DESCR(array) == <void *>cnp.PyArray_DESCR(other)
        and cnp.PyArray_ISBEHAVED(array)
        and cnp.PyArray_ISONESEGMENT(array)
        and cnp.PyArray_NDIM(array) == cnp.PyArray_NDIM(other)
    ):
        return False
    for i in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_DIM(array, i) != cnp.PyArray_DIM(other, i) or cnp.PyArray_STRIDE(array, i) != cnp.PyArray_STRIDE(other, i):
            return False
    return True


def is_aligned(array):
    """Whether every element lies at a multiple of its size, and every stride is one."""
    return cnp.PyArray_ISALIGNED(array)


def may_overlap(a, b):
    """Whether the address ranges of two arrays meet."""
    cdef uintptr_t a_low, a_high, b_low, b_high
    address_range(a, &a_low, &a_high)
    address_range(b, &b_low, &b_high)
    return a_low < b_high and b_low < a_high


def is_apart(array, *others):
    """Whether each of the others that is there is array itself or has an address range of its own."""
    for other in others:
        if other is not None and other is not array and may_overlap(array, other):
            return False
    return True


cdef void address_range(object array, uintptr_t *low, uintptr_t *high):
    cdef int i
    cdef int64_t reach
    low[0] = high[0] = <uintptr_t>cnp.PyArray_DATA(array)
    if cnp.PyArray_SIZE(array) == 0:
        return
    high[0] += <uintptr_t>cnp.PyArray_ITEMSIZE(array)
    for i in range(cnp.PyArray_NDIM(array)):
        reach = (cnp.PyArray_DIM(array, i) - 1) * cnp.PyArray_STRIDE(array, i)
        if reach < 0:
            low[0] -= <uintptr_t>-reach
        else:
            high[0] += <uintptr_t>reach


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


def num_threads():
    """The most threads that a call uses."""
    return fbn_num_threads()


def set_num_threads(int threads):
    """Set the most threads that a call uses."""
    fbn_set_num_threads(threads)
