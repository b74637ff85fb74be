# Arrays of NumPy, checked and computed in one call: the checks of `fastbn._check` one by one, in Python, cost a small batch more than its
# arithmetic. What is not plain, and every error, is left to the caller.
#
# An input is plain when it is an ndarray of float32, float64 or float16, C-contiguous, aligned and in native byte order, with elements and
# more than one channel; the other tensors of a call have its sizes, type and order. Values per channel are plain when they are float32 or
# float64, aligned and in native byte order, of shape (C,); eps and momentum when they are floats in their range, an axis when it is an int,
# a condition when it is a bool, statistics when they are float64. No code of another type runs between the checks and the call.

cdef dict ACTIVATIONS = {None: <int>FBN_NO_ACTIVATION, "relu": <int>FBN_RELU, "leaky_relu": <int>FBN_LEAKY_RELU, "relu6": <int>FBN_RELU6}


def activation_codes():
    """The activations by name, with their numbers in fbn_activation."""
    return dict(ACTIVATIONS)


cpdef int numpy_code(array):
    """The number in fbn_dtype of an ndarray of a NumPy type, aligned and in native byte order, or -1."""
    cdef int number
    if not cnp.PyArray_CheckExact(array) or not cnp.PyArray_ISBEHAVED_RO(array):
        return -1
    number = cnp.PyArray_TYPE(array)
    if number == cnp.NPY_FLOAT32:
        return <int>FBN_FLOAT32
    if number == cnp.NPY_FLOAT64:
        return <int>FBN_FLOAT64
    return <int>FBN_FLOAT16 if number == cnp.NPY_FLOAT16 else -1


cpdef bint is_vector(array, int64_t length):
    """Whether array is an ndarray of float32 or float64, aligned, in native byte order, of shape (length,)."""
    return (
        cnp.PyArray_CheckExact(array)
        and (cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32 or cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64)
        and cnp.PyArray_ISBEHAVED_RO(array)
        and cnp.PyArray_NDIM(array) == 1
        and cnp.PyArray_DIM(array, 0) == length
    )


cdef bint looks_like(object array, object other):
    """Whether an object is an ndarray of other's type, shape and strides, aligned, without gaps."""
    cdef int i
    if not (
        cnp.PyArray_CheckExact(array)
        and <void *>cnp.PyArray_DESCR(array) == <void *>cnp.PyArray_DESCR(other)
        and cnp.PyArray_ISBEHAVED_RO(array)
        and cnp.PyArray_ISONESEGMENT(array)
        and cnp.PyArray_NDIM(array) == cnp.PyArray_NDIM(other)
    ):
        return False
    for i in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_DIM(array, i) != cnp.PyArray_DIM(other, i) or cnp.PyArray_STRIDE(array, i) != cnp.PyArray_STRIDE(other, i):
            return False
    return True


cpdef bint is_like(array, other):
    """Whether array is an ndarray of other's dtype, shape and strides, aligned and writable, without gaps."""
    return looks_like(array, other) and cnp.PyArray_ISWRITEABLE(array)


cpdef bint may_overlap(a, b) noexcept:
    """Whether the address ranges of two arrays meet."""
    cdef uintptr_t a_low = 0, a_high = 0, b_low = 0, b_high = 0
    address_range(a, &a_low, &a_high)
    address_range(b, &b_low, &b_high)
    return a_low < b_high and b_low < a_high


cdef void address_range(object array, uintptr_t *low, uintptr_t *high) noexcept:
    """Set the first address of an array's elements, and the first behind them."""
    cdef int i
    cdef int64_t span
    low[0] = high[0] = <uintptr_t>cnp.PyArray_DATA(array)
    if cnp.PyArray_SIZE(array) == 0:
        return
    high[0] += <uintptr_t>cnp.PyArray_ITEMSIZE(array)
    for i in range(cnp.PyArray_NDIM(array)):
        span = (cnp.PyArray_DIM(array, i) - 1) * cnp.PyArray_STRIDE(array, i)
        if span < 0:
            low[0] -= <uintptr_t>-span
        else:
            high[0] += <uintptr_t>span


cdef bint is_apart(object array, object other):
    """Whether another tensor, or None, is array itself or lies elsewhere."""
    return other is None or other is array or not may_overlap(array, other)


cdef bint set_dense_sizes(Job job, object x, int axis):
    """Set the sizes of a job over C-contiguous tensors; whether there are elements and more than one channel."""
    cdef int i
    cdef int64_t before = 1, behind = 1
    for i in range(axis):
        before *= cnp.PyArray_DIM(x, i)
    for i in range(axis + 1, cnp.PyArray_NDIM(x)):
        behind *= cnp.PyArray_DIM(x, i)
    job.c.N, job.c.C, job.c.S = before, cnp.PyArray_DIM(x, axis), behind
    return before * behind != 0 and job.c.C > 1


cdef Job plain_job(object x, object weight, object bias, object eps, object axis, object activation):
    """A job over an input with what every call has, or None where something is not plain."""
    cdef Job job
    cdef int code = numpy_code(x)
    cdef int ndim
    cdef long index
    if code < 0 or not cnp.PyArray_IS_C_CONTIGUOUS(x) or type(axis) is not int or type(eps) is not float or not 0 <= <double>eps < INFINITY:
        return None
    if activation is not None and (type(activation) is not str or activation not in ACTIVATIONS):
        return None
    ndim = cnp.PyArray_NDIM(x)
    if not -ndim <= axis < ndim:
        return None
    index = axis
    job = Job.__new__(Job)
    job.c.dtype = <fbn_dtype>code
    job.c.activation = <fbn_activation><int>ACTIVATIONS[activation]
    job.set_settings(eps, 0)
    if not set_dense_sizes(job, x, index + ndim if index < 0 else index):
        return None
    if not (weight is None or is_vector(weight, job.c.C)) or not (bias is None or is_vector(bias, job.c.C)):
        return None
    job.set_dense(&job.c.x, <char *>cnp.PyArray_DATA(x))
    job.set_values(&job.c.weight, weight, "weight")
    job.set_values(&job.c.bias, bias, "bias")
    return job


cdef object plain_output(Job job, object x, object other, object out):
    """The array that a job writes, a new one or out; None where out is not plain, or overlaps x or the other input."""
    if out is None:
        out = PyArray_NewLikeArray(<cnp.ndarray>x, cnp.NPY_KEEPORDER, NULL, 0)
    elif not (is_like(out, x) and is_apart(out, x) and is_apart(out, other)):
        return None
    job.set_dense(&job.c.out, <char *>cnp.PyArray_DATA(out))
    return out


cdef bint set_plain_input(Job job, fbn_tensor *slot, object x, object tensor):
    """Set a further input, or none for None; whether it is plain."""
    if tensor is None:
        return True
    if not looks_like(tensor, x):
        return False
    job.set_dense(slot, <char *>cnp.PyArray_DATA(tensor))
    return True


cdef bint is_running(object values, object x, object y, int64_t channels):
    """Whether running statistics, or None, are plain, writable without gaps (`is_like`), and apart from x and y."""
    return values is None or (
        is_vector(values, channels) and is_like(values, values) and not may_overlap(values, x) and not may_overlap(values, y)
    )


cdef bint is_moment(object values, int64_t channels):
    """Whether an object is a contiguous array of float64, one value per channel."""
    return is_vector(values, channels) and cnp.PyArray_TYPE(values) == cnp.NPY_FLOAT64 and cnp.PyArray_IS_C_CONTIGUOUS(values)


def are_moments(mean, m2):
    """Whether two objects are contiguous arrays of float64 of one shape (C,)."""
    if not cnp.PyArray_CheckExact(mean) or cnp.PyArray_NDIM(mean) != 1:
        return False
    return is_moment(mean, cnp.PyArray_DIM(mean, 0)) and is_moment(m2, cnp.PyArray_DIM(mean, 0))


def infer_arrays(x, mean, var, weight, bias, eps, axis, activation, residual, out):
    """y of the inference form, or None where an argument is not plain, and nothing done."""
    cdef Job job = plain_job(x, weight, bias, eps, axis, activation)
    if job is None or not is_vector(mean, job.c.C) or not is_vector(var, job.c.C):
        return None
    if not set_plain_input(job, &job.c.residual, x, residual):
        return None
    job.set_values(&job.c.mean, mean, "mean")
    job.set_values(&job.c.var, var, "var")
    if fbn_first_without_root(&job.c.var, job.c.C, job.c.eps) >= 0:
        return None
    y = plain_output(job, x, residual, out)
    if y is not None:
        job.run_infer()
    return y


def train_arrays(x, weight, bias, running_mean, running_var, momentum, unbiased, eps, axis, activation, residual, out):
    """(y, count, batch_mean, batch_m2) of the training form, or None where an argument is not plain, and nothing done."""
    cdef Job job = plain_job(x, weight, bias, eps, axis, activation)
    if job is None or type(unbiased) is not bool or type(momentum) is not float or not 0 <= <double>momentum <= 1:
        return None
    if not set_plain_input(job, &job.c.residual, x, residual):
        return None
    y = plain_output(job, x, residual, out)
    if y is None or not is_running(running_mean, x, y, job.c.C) or not is_running(running_var, x, y, job.c.C):
        return None
    if running_mean is not None and running_var is not None and may_overlap(running_mean, running_var):
        return None
    job.set_running(running_mean, running_var, momentum, unbiased)
    moments = new_moments(job.c.C)
    job.set_statistics(moments[0], moments[1], 0)
    job.run_train()
    return y, job.c.N * job.c.S, moments[0], moments[1]


def backward_arrays(dy, x, batch_mean, batch_m2, count, weight, bias, eps, axis, training, activation, out):
    """(dx, dweight, dbias) of a backward pass without a residual, from float64 statistics of `count` values per channel, or None where an
    argument is not plain, and nothing done."""
    cdef Job job = plain_job(x, weight, bias, eps, axis, activation)
    if job is None or dy is None or not set_plain_input(job, &job.c.dy, x, dy) or type(training) is not bool or type(count) is not int:
        return None
    if count != job.c.N * job.c.S if training else not 0 < count <= INT64_MAX:
        return None
    if not is_moment(batch_mean, job.c.C) or not is_moment(batch_m2, job.c.C):
        return None
    dx = plain_output(job, x, dy, out)
    if dx is None:
        return None
    dweight, dbias = None if weight is None else new_like(weight), None if bias is None else new_like(bias)
    job.set_values(&job.c.dweight, dweight, "dweight")
    job.set_values(&job.c.dbias, dbias, "dbias")
    job.set_statistics(batch_mean, batch_m2, count)
    job.run_backward(not training)
    return dx, dweight, dbias
