# One call of the kernels. NumPy arrays, addresses of tensors and tensors read through DLPack all reach `fbn_job` by the setters of `Job`.


cdef int check_address(const void *address, int64_t elements, str where) except -1:
    """Raise where there are elements at address 0, as in a tensor without memory of its own: to the kernels 0 means None."""
    if address is NULL and elements:
        raise RuntimeError(f"Expected memory, got address 0 for {elements} elements - at `{where}`")
    return 0


@cython.final
@cython.freelist(8)
cdef class Job:
    """One call of the kernels: made of a layout and settings, then run by one of its methods, which take tensors by name.

    A tensor is an array, or (address, strides in elements, owner); values per channel are an array, or (address, stride in elements, whether
    they are float64, owner); None where there is none. `layout` is that of `fastbn.geometry`. `threads`, where not 0, are the most that the
    caller wants beside the most that the process may use, on a team of threads that it has lent (`use_team`)."""

    cdef fbn_job c
    # The axes whose strides the tensors have along N, C and S; -1 for the stride of C-contiguous memory, or of 1 along the channels.
    cdef int n_axis, c_axis, s_axis
    cdef bint channels_last
    cdef double momentum
    cdef bint unbiased

    # The layout is None for those of compiled code, which set sizes and settings themselves. Two functions, __cinit__ and __init__, would
    # read the arguments twice.
    def __cinit__(self, layout=None, int dtype=0, int activation=0, double eps=0, int threads=0):
        self.n_axis = self.c_axis = self.s_axis = -1
        if layout is not None:
            self.c.dtype = <fbn_dtype>dtype
            self.c.activation = <fbn_activation>activation
            self.set_settings(eps, threads)
            self.set_layout(<tuple>layout)

    # ---- the setters ----

    cdef int set_layout(self, tuple layout) except -1:
        """Set sizes from (N, C, S), and axes from a `fastbn.geometry.Layout`, which has them behind its sizes."""
        self.c.N, self.c.C, self.c.S = layout[0], layout[1], layout[2]
        if len(layout) > 3:
            self.channels_last = layout[3]
            self.n_axis, self.c_axis, self.s_axis = layout[4], layout[5], layout[6]
        return 0

    cdef void set_settings(self, double eps, int threads) noexcept:
        cdef int most = fbn_num_threads()
        self.c.eps = eps
        self.c.threads = threads if 0 < threads < most else most
        self.c.on_team = threads > 0

    cdef inline void set_dense(self, fbn_tensor *tensor, char *data) noexcept:
        """Set the strides of C-contiguous memory."""
        tensor.data = data
        tensor.n, tensor.c, tensor.s = self.c.C * self.c.S, self.c.S, 1

    cdef int set_tensor(self, fbn_tensor *tensor, object given, str where) except -1:
        tensor.data = NULL
        if given is None:
            return 0
        if isinstance(given, tuple):
            self.set_dense(tensor, <char *><uintptr_t>given[0])
        else:
            self.set_dense(tensor, <char *>cnp.PyArray_DATA(given))
        check_address(tensor.data, self.c.N * self.c.C * self.c.S, where)
        if self.channels_last:
            tensor.c = 1
        if self.n_axis >= 0:
            tensor.n = self.stride_of(given, self.n_axis)
        if self.c_axis >= 0:
            tensor.c = self.stride_of(given, self.c_axis)
        if self.s_axis >= 0:
            tensor.s = self.stride_of(given, self.s_axis)
        return 0

    cdef int64_t stride_of(self, object given, int axis) except? -1:
        if isinstance(given, tuple):
            return given[1][axis]
        return cnp.PyArray_STRIDE(given, axis) // cnp.PyArray_ITEMSIZE(given)

    cdef int set_values(self, fbn_vector *vector, object given, str where) except -1:
        """Set values per channel."""
        return set_vector(vector, given, self.c.C, where)

    cdef int set_statistics(self, object batch_mean, object batch_m2, int64_t count) except -1:
        """Set batch statistics, two float64 arrays of C values, of `count` values per channel."""
        self.c.batch_mean = <double *>cnp.PyArray_DATA(batch_mean)
        self.c.batch_m2 = <double *>cnp.PyArray_DATA(batch_m2)
        self.c.count = count
        check_address(self.c.batch_mean, self.c.C, "batch_mean")
        return check_address(self.c.batch_m2, self.c.C, "batch_m2")

    cdef int set_sums(self, object sums) except -1:
        """Set the sums between the halves of the backward pass, a float64 array of shape (2, C)."""
        self.c.sums = <double *>cnp.PyArray_DATA(sums)
        return check_address(self.c.sums, self.c.C, "sums")

    cdef void *new_work(self) except NULL:
        fbn_choose(&self.c)
        cdef void *work = malloc(<size_t>fbn_work_bytes(&self.c) + 1)
        if work is NULL:
            raise MemoryError
        return work

    # ---- the kernels, over what has been set ----

    cdef int run_infer(self) except -1:
        cdef void *work = self.new_work()
        with nogil:
            fbn_infer(&self.c, work)
            free(work)
        return 0

    cdef int run_train(self) except -1:
        cdef void *work = self.new_work()
        with nogil:
            fbn_train(&self.c, self.momentum, self.unbiased, work)
            free(work)
        return 0

    cdef int run_backward(self, bint frozen) except -1:
        self.c.frozen = frozen
        cdef void *work = self.new_work()
        with nogil:
            fbn_backward(&self.c, work)
            free(work)
        return 0

    # ---- what Python calls ----

    def infer(self, *, x, out, residual, mean, var, weight, bias):
        """Write y into out."""
        self.set_tensor(&self.c.x, x, "x")
        self.set_tensor(&self.c.out, out, "out")
        self.set_tensor(&self.c.residual, residual, "residual")
        self.set_values(&self.c.mean, mean, "mean")
        self.set_values(&self.c.var, var, "var")
        self.set_values(&self.c.weight, weight, "weight")
        self.set_values(&self.c.bias, bias, "bias")
        self.run_infer()

    def set_running(self, running_mean, running_var, double momentum, bint unbiased):
        """Set the running statistics that `train` updates by momentum; either may be None."""
        self.set_values(&self.c.mean, running_mean, "running_mean")
        self.set_values(&self.c.var, running_var, "running_var")
        self.momentum, self.unbiased = momentum, unbiased

    def train(self, *, x, out, residual, weight, bias, batch_mean, batch_m2):
        """Write y into out and statistics into batch_mean and batch_m2; update the running statistics, where they are set."""
        self.set_tensor(&self.c.x, x, "x")
        self.set_tensor(&self.c.out, out, "out")
        self.set_tensor(&self.c.residual, residual, "residual")
        self.set_values(&self.c.weight, weight, "weight")
        self.set_values(&self.c.bias, bias, "bias")
        self.set_statistics(batch_mean, batch_m2, 0)
        self.run_train()

    def describe(self, *, strides, bint has_dy, bint has_stats):
        """Say how a job is run on tensors of these strides, in elements, without memory: the fields of fbn_description."""
        cdef fbn_description description
        cdef double stats
        self.set_tensor(&self.c.x, (64, strides, None), "x")
        self.set_tensor(&self.c.out, (128, strides, None), "out")
        self.set_tensor(&self.c.dy, (192, strides, None) if has_dy else None, "dy")
        self.c.batch_mean = self.c.batch_m2 = &stats if has_stats else NULL
        self.c.dweight.data = <char *>&stats if has_dy else NULL
        fbn_describe(&description, &self.c)
        self.c.batch_mean = self.c.batch_m2 = NULL
        self.c.dweight.data = NULL
        return description

    def stats(self, *, x, batch_mean, batch_m2):
        """Write statistics into batch_mean and batch_m2."""
        self.set_tensor(&self.c.x, x, "x")
        self.set_statistics(batch_mean, batch_m2, 0)
        cdef void *work = self.new_work()
        with nogil:
            fbn_stats(&self.c, work)
            free(work)

    def backward(self, *, x, dx, dy, residual, dresidual, dweight, dbias, weight, bias, batch_mean, batch_m2, int64_t count, bint frozen):
        """Write gradients into dx, dresidual, dweight and dbias."""
        self.set_tensor(&self.c.x, x, "x")
        self.set_tensor(&self.c.out, dx, "dx")
        self.set_tensor(&self.c.dy, dy, "dy")
        self.set_tensor(&self.c.residual, residual, "residual")
        self.set_tensor(&self.c.dresidual, dresidual, "dresidual")
        self.set_values(&self.c.dweight, dweight, "dweight")
        self.set_values(&self.c.dbias, dbias, "dbias")
        self.set_values(&self.c.weight, weight, "weight")
        self.set_values(&self.c.bias, bias, "bias")
        self.set_statistics(batch_mean, batch_m2, count)
        self.run_backward(frozen)

    def backward_sums(self, *, x, dy, dweight, dbias, weight, bias, batch_mean, batch_m2, int64_t count, sums):
        """Write the sums of shape (2, C), dweight and dbias of these values."""
        self.set_tensor(&self.c.x, x, "x")
        self.set_tensor(&self.c.dy, dy, "dy")
        self.set_values(&self.c.dweight, dweight, "dweight")
        self.set_values(&self.c.dbias, dbias, "dbias")
        self.set_values(&self.c.weight, weight, "weight")
        self.set_values(&self.c.bias, bias, "bias")
        self.set_statistics(batch_mean, batch_m2, count)
        self.set_sums(sums)
        cdef void *work = self.new_work()
        with nogil:
            fbn_backward_sums(&self.c, work)
            free(work)

    def backward_input(self, *, x, dx, dy, weight, bias, batch_mean, batch_m2, int64_t count, sums):
        """Write dx from sums over `count` values per channel."""
        self.set_tensor(&self.c.x, x, "x")
        self.set_tensor(&self.c.out, dx, "dx")
        self.set_tensor(&self.c.dy, dy, "dy")
        self.set_values(&self.c.weight, weight, "weight")
        self.set_values(&self.c.bias, bias, "bias")
        self.set_statistics(batch_mean, batch_m2, count)
        self.set_sums(sums)
        cdef void *work = self.new_work()
        with nogil:
            fbn_backward_input(&self.c, work)
            free(work)


cdef int set_vector(fbn_vector *vector, object given, int64_t length, str where) except -1:
    """Set values per channel from an array, (address, stride in elements, whether they are float64, owner) or None."""
    vector.data = NULL
    if given is None:
        return 0
    if isinstance(given, tuple):
        vector.data = <char *><uintptr_t>given[0]
        vector.stride = given[1]
        vector.is_f64 = given[2]
    else:
        vector.data = <char *>cnp.PyArray_DATA(given)
        vector.is_f64 = cnp.PyArray_ITEMSIZE(given) == 8
        vector.stride = cnp.PyArray_STRIDE(given, 0) // cnp.PyArray_ITEMSIZE(given)
    return check_address(vector.data, length, where)
