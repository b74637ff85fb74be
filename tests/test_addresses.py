"""The Cython boundary refuses address 0 where there are elements: to the kernels it means None. Every pointer of every method."""

import numpy as np
import pytest

from fastbn import _native
from fastbn.dtypes import DTYPES

N, C, S = 2, 3, 4
LAYOUT = (N, C, S)
CODE = DTYPES["float64"]


def memory(array, absent, *rest):
    """What a `Job` takes for an array: its address, or 0."""
    return (0 if absent else array.ctypes.data, *rest, array)


class Call:
    """A method of `Job` with good arguments, by name, of which one is then replaced."""

    def __init__(self, method, tensors, values, **others):
        self.method, self.tensors, self.values, self.others = method, tensors, values, others

    def __call__(self, absent=None, layout=LAYOUT):
        given = {name: memory(np.ones((N, C, S)), name == absent, (C * S, S, 1)) for name in self.tensors}
        given |= {name: memory(np.ones(C), name == absent, 1, True) for name in self.values}
        job = _native.Job(layout, CODE, int(self.method == "backward"), 1e-5)
        if self.method == "train":
            job.set_running(given.pop("running_mean"), given.pop("running_var"), 0.1, True)
        getattr(job, self.method)(**given, **self.others)


MOMENTS = {"batch_mean": np.ones(C), "batch_m2": np.ones(C)}
HALVES = {**MOMENTS, "count": N * S, "sums": np.ones((2, C))}
CALLS = {
    "infer": Call("infer", ["x", "out", "residual"], ["mean", "var", "weight", "bias"]),
    "train": Call("train", ["x", "out", "residual"], ["running_mean", "running_var", "weight", "bias"], **MOMENTS),
    "stats": Call("stats", ["x"], [], **MOMENTS),
    "backward": Call(
        "backward",
        ["x", "dx", "dy", "residual", "dresidual"],
        ["dweight", "dbias", "weight", "bias"],
        **MOMENTS,
        count=N * S,
        frozen=False,
    ),
    "backward_sums": Call("backward_sums", ["x", "dy"], ["dweight", "dbias", "weight", "bias"], **HALVES),
    "backward_input": Call("backward_input", ["x", "dx", "dy"], ["weight", "bias"], **HALVES),
}


@pytest.mark.parametrize(
    ("method", "absent"), [(method, name) for method, call in CALLS.items() for name in (*call.tensors, *call.values)], ids="-".join
)
def test_elements_without_an_address_are_an_error(method, absent):
    CALLS[method]()
    elements = C if absent in CALLS[method].values else N * C * S
    with pytest.raises(RuntimeError, match=rf"^Expected memory, got address 0 for {elements} elements - at `{absent}`$"):
        CALLS[method](absent)


@pytest.mark.parametrize("method", list(CALLS))
def test_no_elements_need_no_address(method):
    for absent in CALLS[method].tensors:
        CALLS[method](absent, (0, C, S))


@pytest.mark.parametrize("absent", ["weight", "scale"])
def test_a_scale_into_weights(absent):
    values = {"weight": np.ones((1, C, S)), "scale": np.ones(C)}
    given = {name: 0 if name == absent else array.ctypes.data for name, array in values.items()}
    with pytest.raises(RuntimeError, match=rf"^Expected memory, got address 0 for \d+ elements - at `{absent}`$"):
        _native.scale_weight(0, given["weight"], given["scale"], 1, 1, C, S, CODE)
