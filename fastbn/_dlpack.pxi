# Tensors of a framework, read through the function pointers of DLPack's `DLPackExchangeAPI`: asking each for its address, sizes and strides
# in Python costs a small batch more than its arithmetic. Tensors that are not plain, and every error, are left to the caller.

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


@cython.final
cdef class PlainTensors:
    """The kernels over plain tensors.

    A tensor is plain when its class is one of two (a subclass may wrap another tensor), its memory lies on the CPU, has one of the four
    types, elements and more than one channel, and is dense with the channels second in memory, or last. Values per channel are plain when
    they are float32 or float64, of shape (C,). All tensors of one call have the same sizes and strides. A tensor with the negative bit, as
    z.conj().imag has, is not plain: its memory holds the other sign. Among values per channel only those of a stride other than 1 can have
    it."""

    cdef tensor_reader read
    cdef object new_like, tensor_class, parameter_class

    def __cinit__(self, capsule, new_like, tensor_class, parameter_class):
        """`new_like` makes an uninitialized tensor like another; the two classes are those of plain tensors."""
        cdef DLPackExchangeAPI *api
        self.new_like, self.tensor_class, self.parameter_class = new_like, tensor_class, parameter_class
        if capsule is not None:
            api = <DLPackExchangeAPI *>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
            self.read = api.read if api.major == DL_VERSION else NULL

    cdef bint has_plain_class(self, object tensor):
        return type(tensor) is self.tensor_class or type(tensor) is self.parameter_class

    cdef bint read_cpu(self, object tensor, DLTensor *out):
        """Whether a tensor could be read and has memory on the CPU."""
        if self.read is NULL or not self.has_plain_class(tensor):
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
        if not self.has_plain_class(tensor):
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
        """Whether every tensor but None is of the two classes, with its elements in memory of the CPU."""
        for tensor in tensors:
            if tensor is not None and not self.has_memory(tensor):
                return False
        return True

    cdef bint set_input(self, Job job, object tensor, DLTensor *x):
        """Set the sizes and the type of a job by its input; whether that is plain."""
        cdef int i
        cdef int64_t spatial = 1
        cdef bint channels_first = True, channels_last
        if not self.read_cpu(tensor, x) or x.ndim < 2 or tensor.is_neg():
            return False
        if x.code == DL_BFLOAT and x.bits == 16:
            job.c.dtype = FBN_BFLOAT16
        elif x.code == DL_FLOAT and x.bits == 32:
            job.c.dtype = FBN_FLOAT32
        elif x.code == DL_FLOAT and x.bits == 64:
            job.c.dtype = FBN_FLOAT64
        elif x.code == DL_FLOAT and x.bits == 16:
            job.c.dtype = FBN_FLOAT16
        else:
            return False
        job.c.C = x.shape[1]
        channels_last = x.strides[1] == 1
        for i in range(x.ndim - 1, 1, -1):
            channels_first = channels_first and (x.shape[i] == 1 or x.strides[i] == spatial)
            channels_last = channels_last and (x.shape[i] == 1 or x.strides[i] == spatial * job.c.C)
            spatial *= x.shape[i]
        if x.shape[0] * spatial == 0 or job.c.C < 2 or x.shape[0] != 1 and x.strides[0] != spatial * job.c.C:
            return False
        if channels_first and x.strides[1] == spatial:
            job.c.N, job.c.S = x.shape[0], spatial
        elif channels_last:
            job.c.N, job.c.S = x.shape[0] * spatial, 1
        else:
            return False
        job.set_dense(&job.c.x, x.data)
        return True

    cdef bint set_like(self, Job job, fbn_tensor *slot, object tensor, const DLTensor *x):
        """Set a further tensor of a job; whether it has the type, the sizes and the strides of the input."""
        cdef int i
        cdef DLTensor other
        if not self.read_cpu(tensor, &other) or other.ndim != x.ndim or other.code != x.code or other.bits != x.bits:
            return False
        for i in range(x.ndim):
            if other.shape[i] != x.shape[i] or other.shape[i] != 1 and other.strides[i] != x.strides[i]:
                return False
        job.set_dense(slot, other.data)
        return True

    cdef bint set_values(self, Job job, fbn_vector *slot, object tensor):
        """Set values per channel, or none for None; whether they are plain."""
        cdef DLTensor values
        if tensor is None:
            return True
        if not self.read_cpu(tensor, &values) or values.ndim != 1 or values.shape[0] != job.c.C:
            return False
        if values.strides[0] != 1 and tensor.is_neg():
            return False
        if values.code != DL_FLOAT or (values.bits != 32 and values.bits != 64):
            return False
        slot.data = values.data
        slot.stride = values.strides[0]
        slot.is_f64 = values.bits == 64
        return True

    cdef object float64_of(self, Job job, object tensor):
        """Values per channel as a new float64 array, or None where they are not plain."""
        cdef fbn_vector values
        cdef cnp.npy_intp channels = job.c.C
        cdef int64_t i
        cdef double *out
        if tensor is None or not self.set_values(job, &values, tensor):
            return None
        array = cnp.PyArray_EMPTY(1, &channels, cnp.NPY_FLOAT64, 0)
        out = <double *>cnp.PyArray_DATA(array)
        for i in range(channels):
            out[i] = (<double *>values.data)[i * values.stride] if values.is_f64 else (<float *>values.data)[i * values.stride]
        return array

    def train(self, x, out, running_mean, running_var, weight, bias, batches, double eps, double momentum, int threads):
        """(batch_mean, batch_m2), with y in out, the running statistics updated and one added to batches, an int64; or None and nothing done."""
        cdef DLTensor input, counter
        cdef Job job = Job.__new__(Job)
        job.set_settings(eps, threads)
        if not (
            self.set_input(job, x, &input)
            and self.set_like(job, &job.c.out, out, &input)
            and self.set_values(job, &job.c.mean, running_mean)
            and self.set_values(job, &job.c.var, running_var)
            and self.set_values(job, &job.c.weight, weight)
            and self.set_values(job, &job.c.bias, bias)
            and (batches is None or self.read_cpu(batches, &counter) and counter.ndim == 0 and counter.code == DL_INT and counter.bits == 64)
            and job.c.N * job.c.S > 1
        ):
            return None
        moments = new_moments(job.c.C)
        job.set_statistics(moments[0], moments[1], 0)
        job.momentum, job.unbiased = momentum, True
        job.run_train()
        if batches is not None:
            (<int64_t *>counter.data)[0] += 1
        return moments

    def infer(self, x, out, mean, var, weight, bias, double eps, int threads):
        """Whether y is in out."""
        cdef DLTensor input
        cdef Job job = Job.__new__(Job)
        job.set_settings(eps, threads)
        if not (
            mean is not None
            and var is not None
            and self.set_input(job, x, &input)
            and self.set_like(job, &job.c.out, out, &input)
            and self.set_values(job, &job.c.mean, mean)
            and self.set_values(job, &job.c.var, var)
            and self.set_values(job, &job.c.weight, weight)
            and self.set_values(job, &job.c.bias, bias)
        ):
            return False
        job.run_infer()
        return True

    def backward(self, x, dx, dy, weight, bias, batch_mean, batch_m2, int64_t count, double eps, bint frozen, tuple wanted, int threads):
        """(dx, dweight, dbias), the last two new and None where not wanted; or None and nothing done. A count of 0 is that of x. The
        statistics are float64 arrays, or plain tensors."""
        cdef DLTensor input
        cdef Job job = Job.__new__(Job)
        job.set_settings(eps, threads)
        if not (
            self.set_input(job, x, &input)
            and self.set_like(job, &job.c.out, dx, &input)
            and self.set_like(job, &job.c.dy, dy, &input)
            and not dy.is_neg()
            and self.set_values(job, &job.c.weight, weight)
        ):
            return None
        if wanted[1] and weight is None or wanted[2] and bias is None:
            return None
        dweight = self.new_like(weight) if wanted[1] else None
        dbias = self.new_like(bias) if wanted[2] else None
        if not (self.set_values(job, &job.c.dweight, dweight) and self.set_values(job, &job.c.dbias, dbias)):
            return None
        mean = batch_mean if cnp.PyArray_Check(batch_mean) else self.float64_of(job, batch_mean)
        m2 = batch_m2 if cnp.PyArray_Check(batch_m2) else self.float64_of(job, batch_m2)
        if mean is None or m2 is None:
            return None
        job.set_statistics(mean, m2, count if count else job.c.N * job.c.S)
        job.run_backward(frozen)
        return dx, dweight, dbias
