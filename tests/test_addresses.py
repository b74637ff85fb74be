"""The last net of the Cython boundary: address 0 stands for None, so that elements there are an error, for every pointer of every road."""

import numpy as np
import pytest

from fastbn import _native

N, C, S = 2, 3, 4
VIEW = (N, C, S)
CODE = 1  # float64


class Call:
    """A function of the boundary with good arguments, by name, of which one is then replaced."""

    def __init__(self, function, tensors, vectors, before=(), behind=()):
        self.function, self.tensors, self.vectors = function, tensors, vectors
        self.before, self.behind = before, behind

    def __call__(self, absent=None, view=VIEW):
        owned = {name: np.ones((N, C, S)) for name in self.tensors} | {name: np.ones(C) for name in self.vectors}
        given = [0 if name == absent else owned[name].ctypes.data for name in self.tensors]
        given += [(0 if name == absent else owned[name].ctypes.data, 1, True) for name in self.vectors]
        return self.function(*given, *self.before, *(view, CODE), *self.behind)


def moments():
    return np.ones(C), np.ones(C)


CALLS = {
    "infer": Call(_native.infer, ["x", "out", "residual"], ["mean", "var", "weight", "bias"], (), (0, 1e-5)),
    "train": Call(
        _native.train, ["x", "out", "residual"], ["running_mean", "running_var", "weight", "bias"], moments(), (0, 1e-5, 0.1, True)
    ),
    "stats": Call(_native.stats, ["x"], [], moments()),
    "backward": Call(
        _native.backward,
        ["x", "dx", "dy", "residual", "dresidual"],
        ["dweight", "dbias", "weight", "bias"],
        (*moments(), N * S),
        (1, 1e-5, False),
    ),
    "backward_sums": Call(
        _native.backward_sums, ["x", "dy"], ["dweight", "dbias", "weight", "bias"], (*moments(), N * S, np.ones((2, C))), (0, 1e-5)
    ),
    "backward_input": Call(_native.backward_input, ["x", "dx", "dy"], ["weight", "bias"], (*moments(), N * S, np.ones((2, C))), (0, 1e-5)),
}


@pytest.mark.parametrize(
    ("road", "absent"), [(road, name) for road, call in CALLS.items() for name in (*call.tensors, *call.vectors)], ids="-".join
)
def test_elements_without_an_address_are_an_error(road, absent):
    CALLS[road]()
    elements = C if absent in CALLS[road].vectors else N * C * S
    with pytest.raises(RuntimeError, match=rf"^Expected memory, got address 0 for {elements} elements - at `{absent}`$"):
        CALLS[road](absent)


@pytest.mark.parametrize("road", list(CALLS))
def test_no_elements_need_no_address(road):
    for absent in CALLS[road].tensors:
        CALLS[road](absent, (0, C, S))


@pytest.mark.parametrize("absent", ["weight", "scale"])
def test_a_scale_into_weights(absent):
    values = {"weight": np.ones((1, C, S)), "scale": np.ones(C)}
    given = {name: 0 if name == absent else array.ctypes.data for name, array in values.items()}
    with pytest.raises(RuntimeError, match=rf"^Expected memory, got address 0 for \d+ elements - at `{absent}`$"):
        _native.scale_weight(0, given["weight"], given["scale"], 1, 1, C, S, CODE)
