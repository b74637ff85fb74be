"""What a type checker tells the users of the layer and of the configuration."""

from collections.abc import Sequence
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import fastbn


class Alone:
    """A communicator of one process."""

    def allgather(self, values: npt.NDArray[np.float64], /) -> Sequence[npt.NDArray[np.float64]]:
        return [values]


x = np.ones((4, 2), np.float32)
layer = fastbn.BatchNorm(2, momentum=None, activation="relu6", comm=Alone())
assert_type(layer(x), npt.NDArray[np.float32])
assert_type(layer.forward(x, out=x), npt.NDArray[np.float32])
assert_type(layer.train(), fastbn.BatchNorm)
assert_type(layer.eval().training, bool)
assert_type(layer.weight, npt.NDArray[np.float32] | npt.NDArray[np.float64] | None)
dx, dweight, dbias = layer.backward(x)
assert_type(dx, npt.NDArray[np.float32])
assert_type(dweight, npt.NDArray[Any] | None)
layer.load_state_dict(layer.state_dict())
state = layer.state_dict()
if "num_batches_tracked" in state:
    assert_type(state["num_batches_tracked"], npt.NDArray[np.int64])
np.savez("layer.npz", **layer.state_dict())
layer.load_state_dict({"weight": [1.0, 2.0]})

with fastbn.use_isa("scalar"):
    assert_type(fastbn.kernels(), list[str])
fastbn.set_num_threads(2)
assert_type(fastbn.get_num_threads(), int)
config = fastbn.show_config()
assert_type(config["isa"], str)
assert_type(config["onnx"], str | None)

# Names that are loaded when they are first asked for are those of the graph wing.
results: list[type] = [fastbn.Fold, fastbn.FoldResult, fastbn.Kept, fastbn.Parity, fastbn.Deployment]
functions = fastbn.fold, fastbn.verify, fastbn.deploy

try:
    fastbn.batch_norm(x, x[0], x[0])
except fastbn.ArgumentError as error:
    value_error: ValueError = error
