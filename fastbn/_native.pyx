# cython: boundscheck=False, wraparound=False, freethreading_compatible=True
"""The only Cython: addresses in, GIL released, no policy. Callers have checked shapes, types and contiguity."""

from libc.stdint cimport int64_t, uintptr_t


cdef extern from "fastbn.h" nogil:
    ctypedef enum fbn_dtype:
        pass

    ctypedef struct fbn_scale_report:
        int64_t nonfinite
        int64_t flushed

    void fbn_scale_weight(void *out, fbn_scale_report *report, const void *weight, const double *scale, int64_t G, int64_t M, int64_t C,
                          int64_t S, fbn_dtype dtype)


def scale_weight(uintptr_t out, uintptr_t weight, uintptr_t scale, int64_t G, int64_t M, int64_t C, int64_t S, int dtype):
    """Write round(weight * scale) over the view (G, M, C, S), or only look when out is 0; return (nonfinite, flushed)."""
    cdef fbn_scale_report report
    with nogil:
        fbn_scale_weight(<void *>out, &report, <const void *>weight, <const double *>scale, G, M, C, S, <fbn_dtype>dtype)
    return report.nonfinite, report.flushed
