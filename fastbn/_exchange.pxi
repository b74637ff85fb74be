# Tensors of a framework, read through the function pointers of DLPack's `DLPackExchangeAPI`: asking each for its address, sizes and strides
# in Python costs a small batch more than its arithmetic. What is not plain is left to the caller's general way, and so is every error.

from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport PyObject
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef struct DLTensor:
    char *data
    int32_t device_type, device_id
    int32_t ndim
    uint8_t code, bits
    uint16_t lanes
    int64_t *shape
    int64_t *strides
    uint64_t byte_offset


ctypedef int (*tensor_reader)(void *tensor, DLTensor *out) noexcept


cdef struct DLPackExchangeAPI:
    uint32_t major, minor
    void *previous
    void *new_tensor
    void *managed_from_object
    void *object_from_managed
    tensor_reader read
    void *current_stream


cdef enum:
    DL_VERSION = 1
    DL_CPU = 1
    DL_INT = 0
    DL_FLOAT = 2
    DL_BFLOAT = 4


cdef class Exchange:
    """The kernels over plain tensors. A tensor is plain when its class is one of two, a subclass may stand for others, when its memory lies
    on the CPU, has one of the four types and more than one channel, holds
    elements, and is dense with the channels second in its memory, or last; values per channel when they are float32 or float64, of shape
    (C,). All tensors of one call have the same sizes and strides. Nothing is plain whose memory holds the other sign, as that of
    z.conj().imag does; such values per channel are told by their stride, before a call asks."""

    cdef tensor_reader read
    cdef object new_like, kind, parameter

    def __cinit__(self, capsule, new_like, kind, parameter):
        """`new_like` makes an uninitialised tensor like another; `kind` and `parameter` are the classes of plain tensors."""
        cdef DLPackExchangeAPI *api
        self.new_like, self.kind, self.parameter = new_like, kind, parameter
        if capsule is not None:
            api = <DLPackExchangeAPI *>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
            self.read = api.read if api.major == DL_VERSION else NULL

    cdef bint is_known(self, object tensor):
        return type(tensor) is self.kind or type(tensor) is self.parameter

    cdef bint take(self, object tensor, DLTensor *out):
        """Whether a tensor could be read and has memory on the CPU."""
        if self.read is NULL or not self.is_known(tensor):
            return False
        if self.read(<void *><PyObject *>tensor, out):
            PyErr_Clear()
            return False
        if out.data is NULL or out.device_type != DL_CPU or out.lanes != 1:
            return False
        out.data += out.byte_offset
        return True

    cdef bint has_memory(self, object tensor):
        """Whether a tensor is of the two classes and its elements, where it has any, lie in memory of the CPU."""
        cdef DLTensor out
        cdef int i
        if not self.is_known(tensor):
            return False
        if self.read is NULL:
            try:
                return tensor.is_cpu and (tensor.data_ptr() != 0 or tensor.numel() == 0)
            except RuntimeError:  # one of a batch that torch maps over, or of another layout
                return False
        if self.read(<void *><PyObject *>tensor, &out):
            PyErr_Clear()
            return False
        if out.device_type != DL_CPU:
            return False
        if out.data is not NULL:
            return True
        for i in range(out.ndim):
            if out.shape[i] == 0:
                return True
        return False

    def have_memory(self, *tensors):
        """Whether every tensor that is there is one of memory on the CPU and of nothing else, so that its address says what it holds."""
        for tensor in tensors:
            if tensor is not None and not self.has_memory(tensor):
                return False
        return True

    cdef bint take_first(self, fbn_job *job, object tensor, DLTensor *first):
        """Set sizes and type of a job by its first tensor; whether that is plain."""
        cdef int i
        cdef int64_t spatial = 1
        cdef bint in_order = True, channels_last
        if not self.take(tensor, first) or first.ndim < 2 or tensor.is_neg():
            return False
        if first.code == DL_BFLOAT and first.bits == 16:
            job.dtype = <fbn_dtype>3
        elif first.code == DL_FLOAT and (first.bits == 16 or first.bits == 32 or first.bits == 64):
            job.dtype = <fbn_dtype>(2 if first.bits == 16 else 0 if first.bits == 32 else 1)
        else:
            return False
        job.C = first.shape[1]
        channels_last = first.strides[1] == 1
        for i in range(first.ndim - 1, 1, -1):
            in_order = in_order and (first.shape[i] == 1 or first.strides[i] == spatial)
            channels_last = channels_last and (first.shape[i] == 1 or first.strides[i] == spatial * job.C)
            spatial *= first.shape[i]
        if first.shape[0] * spatial == 0 or job.C < 2 or first.shape[0] != 1 and first.strides[0] != spatial * job.C:
            return False
        if in_order and first.strides[1] == spatial:
            job.N, job.S = first.shape[0], spatial
        elif channels_last:
            job.N, job.S = first.shape[0] * spatial, 1
        else:
            return False
        place(job, &job.x, first)
        return True

    cdef bint take_like(self, const fbn_job *job, fbn_tensor *out, object tensor, const DLTensor *first):
        """Place a further tensor of a job; whether it is like the first."""
        cdef int i
        cdef DLTensor other
        if not self.take(tensor, &other) or other.ndim != first.ndim or other.code != first.code or other.bits != first.bits:
            return False
        for i in range(first.ndim):
            if other.shape[i] != first.shape[i] or other.shape[i] != 1 and other.strides[i] != first.strides[i]:
                return False
        place(job, out, &other)
        return True

    cdef bint take_vector(self, const fbn_job *job, fbn_vector *out, object tensor):
        """Place values per channel, or None; whether they are plain."""
        cdef DLTensor other
        if tensor is None:
            return True
        if not self.take(tensor, &other) or other.ndim != 1 or other.shape[0] != job.C:
            return False
        if other.strides[0] != 1 and tensor.is_neg():
            return False
        if other.code != DL_FLOAT or (other.bits != 32 and other.bits != 64):
            return False
        out.data = other.data
        out.stride = other.strides[0]
        out.is_f64 = other.bits == 64
        return True

    def train(self, x, out, running_mean, running_var, weight, bias, batches, double eps, double momentum, int threads):
        """(batch_mean, batch_m2), with y in out, the running statistics moved and one added to batches, an int64; or None and nothing done."""
        cdef DLTensor first, counter
        cdef fbn_job job = new_job((0, 0, 0), 0, 0, eps, threads)
        if not (
            self.take_first(&job, x, &first)
            and self.take_like(&job, &job.out, out, &first)
            and self.take_vector(&job, &job.mean, running_mean)
            and self.take_vector(&job, &job.var, running_var)
            and self.take_vector(&job, &job.weight, weight)
            and self.take_vector(&job, &job.bias, bias)
            and (batches is None or self.take(batches, &counter) and counter.ndim == 0 and counter.code == DL_INT and counter.bits == 64)
            and job.N * job.S > 1
        ):
            return None
        moments = new_moments(job.C)
        set_moments(&job, moments[0], moments[1])
        cdef void *work = new_work(&job)
        with nogil:
            fbn_train(&job, momentum, True, work)
            free(work)
        if batches is not None:
            (<int64_t *>counter.data)[0] += 1
        return moments

    def infer(self, x, out, mean, var, weight, bias, double eps, int threads):
        """Whether y is in out."""
        cdef DLTensor first
        cdef fbn_job job = new_job((0, 0, 0), 0, 0, eps, threads)
        if not (
            mean is not None
            and var is not None
            and self.take_first(&job, x, &first)
            and self.take_like(&job, &job.out, out, &first)
            and self.take_vector(&job, &job.mean, mean)
            and self.take_vector(&job, &job.var, var)
            and self.take_vector(&job, &job.weight, weight)
            and self.take_vector(&job, &job.bias, bias)
        ):
            return False
        cdef void *work = new_work(&job)
        with nogil:
            fbn_infer(&job, work)
            free(work)
        return True

    def backward(self, x, dx, dy, weight, bias, batch_mean, batch_m2, int64_t count, double eps, bint frozen, tuple wanted, int threads):
        """(dx, dweight, dbias), the last two new and None where not wanted; or None and nothing done. A count of 0 is that of x."""
        cdef DLTensor first
        cdef fbn_job job = new_job((0, 0, 0), 0, 0, eps, threads)
        if not (
            self.take_first(&job, x, &first)
            and self.take_like(&job, &job.out, dx, &first)
            and self.take_like(&job, &job.dy, dy, &first)
            and not dy.is_neg()
            and self.take_vector(&job, &job.weight, weight)
        ):
            return None
        if wanted[1] and weight is None or wanted[2] and bias is None:
            return None
        dweight = self.new_like(weight) if wanted[1] else None
        dbias = self.new_like(bias) if wanted[2] else None
        if not (self.take_vector(&job, &job.dweight, dweight) and self.take_vector(&job, &job.dbias, dbias)):
            return None
        set_moments(&job, batch_mean, batch_m2)
        job.count = count if count else job.N * job.S
        job.frozen = frozen
        cdef void *work = new_work(&job)
        with nogil:
            fbn_backward(&job, work)
            free(work)
        return dx, dweight, dbias


cdef void place(const fbn_job *job, fbn_tensor *out, const DLTensor *tensor):
    """The strides of a dense view."""
    out.data = tensor.data
    out.n, out.c, out.s = job.C * job.S, job.S, 1
