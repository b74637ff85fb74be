"""BatchNorm: a layer over NumPy arrays, with state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, SupportsFloat, TypedDict, cast, overload

import numpy as np

from fastbn import _check, backward_halves, conversion, functional, sync
from fastbn.errors import ArgumentError, ArgumentTypeError, expected
from fastbn.masks import unmasked
from fastbn.stats import BatchStats

if TYPE_CHECKING:
    import keras
    import torch
    from numpy.typing import ArrayLike, NDArray

    from fastbn._types import Activation, Array, Communicator, FloatVector, ScalarT, State, StateName, TensorLike

__all__ = ["BatchNorm"]


class _Options(TypedDict):
    """What a layer hands to every array function."""

    eps: float
    axis: int
    activation: Activation | None


class BatchNorm:
    """Batch normalization with running statistics, forward and backward, in PyTorch's semantics.

    Parameters
    ----------
    num_features : int
        C, the size of the channel axis.
    eps : float
        Added to the variance.
    momentum : float or None
        The weight of the new batch in the running statistics; None keeps the plain average of all batches.
    axis : int
        The channel axis; -1 for channels last.
    affine : bool
        Learn a weight (gamma, at first ones) and a bias (beta, at first zeros).
    track_running_stats : bool
        Keep running statistics for eval mode. Without them eval mode normalizes with the statistics of the batch, too.
    activation : None, "relu", "leaky_relu" or "relu6"
        Applied last, forward and backward.
    comm : communicator or None
        Share the statistics of each training batch with the other processes: anything with mpi4py's ``allgather``. Each process then
        gives its part of the batch, of any size and even empty, and all get what one process would compute of the whole, with the same
        bits for one number of processes. dweight and dbias are sums over the part of this process.

    Attributes
    ----------
    weight, bias, running_mean, running_var : float32 array of shape (C,) or None
    num_batches_tracked : int
    training : bool
        Changed by `train` and `eval`.
    unbiased : bool
        running_var receives the variance times n/(n-1), as in PyTorch; False after `from_keras`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        An argument that cannot be used.

    Examples
    --------
    >>> import numpy as np
    >>> layer = BatchNorm(2, momentum=None)
    >>> y = layer(np.array([[1.0, 5.0], [3.0, 5.0]], np.float32))
    >>> layer.running_mean.tolist(), layer.running_var.tolist()
    ([2.0, 5.0], [2.0, 0.0])
    >>> layer.eval()(np.array([[2.0, 5.0]], np.float32)).tolist()
    [[0.0, 0.0]]
    """

    weight: FloatVector | None
    bias: FloatVector | None
    running_mean: FloatVector | None
    running_var: FloatVector | None

    def __init__(
        self,
        num_features: int | np.integer,
        *,
        eps: SupportsFloat = 1e-5,
        momentum: SupportsFloat | None = 0.1,
        axis: int | np.integer = 1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: Activation | None = None,
        comm: Communicator | None = None,
    ) -> None:
        self.num_features = _check.positive_int(num_features, "num_features")
        self.eps = _check.eps_of(eps)
        self.momentum = None if momentum is None else _check.momentum_of(momentum)
        if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
            raise ArgumentTypeError(expected("an integer", type(axis).__name__, "axis"))
        self.axis = int(axis)
        _check.activation_of(activation)
        self.activation: Activation | None = activation
        if comm is not None and not callable(getattr(comm, "allgather", None)):
            raise ArgumentTypeError(expected("a communicator with allgather", type(comm).__name__, "comm"))
        self.comm = comm
        self.affine, self.track_running_stats = bool(affine), bool(track_running_stats)
        self.weight = np.ones(self.num_features, np.float32) if affine else None
        self.bias = np.zeros(self.num_features, np.float32) if affine else None
        self.running_mean = np.zeros(self.num_features, np.float32) if track_running_stats else None
        self.running_var = np.ones(self.num_features, np.float32) if track_running_stats else None
        self.num_batches_tracked = 0
        self.unbiased = True
        self.training = True
        self._saved: tuple[Array, BatchStats, bool, Communicator | None] | None = None  # of the last forward pass

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.num_features}, eps={self.eps:g}, momentum={self.momentum}, axis={self.axis}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, activation={self.activation!r})"
        )

    def train(self, mode: bool = True) -> Self:
        """Normalize with the statistics of each batch from here on; return self.

        Examples
        --------
        >>> BatchNorm(3).eval().train().training
        True
        """
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Normalize with the running statistics from here on; return self.

        Examples
        --------
        >>> BatchNorm(2, eps=0.0).eval()(np.array([[1.0, 5.0]])).tolist()
        [[1.0, 5.0]]
        """
        return self.train(False)

    @overload
    def __call__(self, x: NDArray[ScalarT], *, out: Array | None = ...) -> NDArray[ScalarT]: ...
    @overload
    def __call__(self, x: TensorLike, *, out: Array | None = ...) -> Array: ...
    def __call__(self, x: TensorLike, *, out: Array | None = None) -> Array:
        return self.forward(x, out=out)

    @overload
    def forward(self, x: NDArray[ScalarT], *, out: Array | None = ...) -> NDArray[ScalarT]: ...
    @overload
    def forward(self, x: TensorLike, *, out: Array | None = ...) -> Array: ...
    def forward(self, x: TensorLike, *, out: Array | None = None) -> Array:
        """Return y, in the shape, type and memory order of x.

        Parameters
        ----------
        x : array of float32, float64, float16 or bfloat16
            C values along `axis`, in any shape and strides that `fastbn.batch_norm` takes. `backward` reads it again: leave it unchanged
            until then.
        out : array of x's shape and dtype, or None
            Receives y. It may be x itself, after which there is no `backward`.

        Returns
        -------
        y : array

        Raises
        ------
        ArgumentError, ArgumentTypeError
            An argument that cannot be used; nothing has been written, no other process has been asked.

        Notes
        -----
        In training, ``running = (1 - momentum) * running + momentum * batch``, unless the batch has no elements.
        One value per channel gives y = bias and a variance of 0.
        """
        x, _ = _check.tensor(x, "x")
        if x.shape[_check.axis_of(self.axis, x)] != self.num_features:
            raise ArgumentError(expected(f"{self.num_features} channels on axis {self.axis}", f"shape {x.shape}", "x"))
        options: _Options = {"eps": self.eps, "axis": self.axis, "activation": self.activation}
        by_batch, comm = self.training or not self.track_running_stats, self.comm if self.training else None
        if not by_batch:
            mean: Any = self.running_mean  # an array, as is running_var, where they are tracked
            var: Any = self.running_var
            stats = BatchStats(1, mean, var)
            y = functional.batch_norm(x, mean, var, self.weight, self.bias, **options, out=out)
        elif comm is not None:
            y, stats = self._forward_shared(x, options, out, comm)
        else:
            y, stats = self._forward_alone(x, options, out)
        if self.training and self.track_running_stats:
            self.num_batches_tracked += 1
        self._saved = None if out is not None and np.may_share_memory(x, y) else (x, stats, by_batch, comm)
        return y

    def _factor(self) -> float:
        """The weight of the batch at hand in the running statistics."""
        return 1 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum

    def _forward_alone(self, x: Array, options: _Options, out: Array | None) -> tuple[Array, BatchStats]:
        tracked = self.training and self.track_running_stats
        return functional.batch_norm_train(
            x,
            self.weight,
            self.bias,
            running_mean=self.running_mean if tracked else None,
            running_var=self.running_var if tracked else None,
            momentum=self._factor(),
            unbiased=self.unbiased,
            **options,
            out=out,
        )

    def _forward_shared(self, x: Array, options: _Options, out: Array | None, comm: Communicator) -> tuple[Array, BatchStats]:
        y = _check.output(out, x)
        stats = sync.merge(functional.batch_stats(x, axis=self.axis), comm.allgather)
        if x.size:
            functional.normalize_with(x, stats, self.weight, self.bias, **options, out=y)
        if self.track_running_stats:
            sync.update_running(self.running_mean, self.running_var, stats, self._factor(), self.unbiased)
        return y, stats

    @overload
    def backward(self, dy: NDArray[ScalarT], *, out: Array | None = ...) -> tuple[NDArray[ScalarT], Array | None, Array | None]: ...
    @overload
    def backward(self, dy: TensorLike, *, out: Array | None = ...) -> tuple[Array, Array | None, Array | None]: ...
    def backward(self, dy: TensorLike, *, out: Array | None = None) -> tuple[Array, Array | None, Array | None]:
        """Return the gradients of the last forward pass.

        Parameters
        ----------
        dy : array of x's shape and dtype
            The gradient of y.
        out : array of x's shape and dtype, or None
            Receives dx.

        Returns
        -------
        dx : array of x's shape and dtype
        dweight, dbias : float32 array of shape (C,), or None without weight or bias
            With `comm`, of the values of this process: the sum over processes is the gradient of the whole batch.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            No forward pass before this, or an argument that cannot be used.

        Examples
        --------
        >>> layer = BatchNorm(1, eps=0.0)
        >>> y = layer(np.array([[1.0], [3.0]]))
        >>> [gradient.tolist() for gradient in layer.backward(np.array([[1.0], [0.0]]))]
        [[[0.0], [0.0]], [-1.0], [1.0]]
        """
        if self._saved is None:
            raise ArgumentError("Cannot go backward: there is no forward pass, or it has overwritten its x")
        x, stats, by_batch, comm = self._saved
        options: _Options = {"eps": self.eps, "axis": self.axis, "activation": self.activation}
        if comm is None:
            return functional.batch_norm_backward(dy, x, stats, self.weight, self.bias, training=by_batch, out=out, **options)
        dy = _check.same_shape(dy, "dy", x)
        dx = _check.output(out, x, dy)
        if x.size:
            sums, dweight, dbias = backward_halves.backward_sums(dy, x, stats, self.weight, self.bias, **options)
        else:
            sums = np.zeros((2, self.num_features))
            dweight, dbias = (None if values is None else np.zeros_like(values) for values in (self.weight, self.bias))
        sums = sync.add_up(sums, comm.allgather)
        if x.size:
            backward_halves.backward_input(dy, x, stats, sums, self.weight, self.bias, **options, out=dx)
        return dx, dweight, dbias

    def state_dict(self) -> State:
        """Return a copy of the state under PyTorch's names: weight, bias, running_mean, running_var and num_batches_tracked, as arrays.

        Those that the layer does not have are left out, as in PyTorch.

        Examples
        --------
        >>> BatchNorm(2, affine=False).state_dict()["running_var"].tolist()
        [1.0, 1.0]
        """
        state: State = {}
        for name in _ARRAYS:
            values: FloatVector | None = getattr(self, name)
            if values is not None:
                state[name] = values.copy()
        if self.track_running_stats:
            state["num_batches_tracked"] = np.array(self.num_batches_tracked, np.int64)
        return state

    def load_state_dict(self, state: State | Mapping[str, ArrayLike]) -> None:
        """Take over a state: that of `state_dict`, or of a batch normalization of PyTorch.

        Parameters
        ----------
        state : mapping of names to arrays or CPU tensors
            Exactly the names that `state_dict` returns; num_batches_tracked may be missing, as in old files.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            A name too many or too few, or another shape; the layer is unchanged.

        Examples
        --------
        >>> layer = BatchNorm(2, track_running_stats=False)
        >>> layer.load_state_dict({"weight": [1.0, 2.0], "bias": [0.0, 3.0]})
        >>> layer.weight.tolist()
        [1.0, 2.0]
        """
        names = set(self.state_dict())
        if unknown := set(state) ^ names - ({"num_batches_tracked"} - set(state)):
            raise ArgumentError(expected(f"the names {', '.join(sorted(names))}", f"{', '.join(sorted(state))}", sorted(unknown)[0]))
        # A checker lets a State be read by literal names alone.
        arrays = cast("Mapping[str, ArrayLike]", state)
        vectors = {name: _vector(arrays[name], name, self.num_features) for name in _ARRAYS if name in names}
        count = self.num_batches_tracked
        if "num_batches_tracked" in state:
            given = _check.converted(np.asarray, arrays["num_batches_tracked"], "a number of batches", "num_batches_tracked")
            if given.shape != () or given.dtype.kind not in "iu" or given < 0:
                raise ArgumentError(expected("a number of batches", f"{given}", "num_batches_tracked"))
            count = int(given)
        for name, values in vectors.items():
            getattr(self, name)[...] = values
        self.num_batches_tracked = count

    @classmethod
    def from_torch(cls, module: torch.nn.Module) -> Self:
        """Return a layer with the parameters, statistics and settings of a batch normalization of PyTorch.

        Everything has the same meaning there: eps, momentum (None too), the unbiased running variance, the names of the state. The values
        are copied; bfloat16 and float16 ones become float32.

        Parameters
        ----------
        module : torch.nn.BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm

        Raises
        ------
        ArgumentTypeError
            Another module.
        """
        return cls._of(conversion.from_torch(module))

    def to_torch(self, dimensions: int = 2) -> torch.nn.modules.batchnorm._BatchNorm:
        """Return a ``torch.nn.BatchNorm1d``, 2d or 3d with copies of this layer's parameters, statistics and settings.

        `fastbn.torch.convert` makes fastbn's module of it. Where `unbiased` is False, the running variance goes on as PyTorch's does: with
        the unbiased variance of the batches to come.

        Parameters
        ----------
        dimensions : int
            1, 2 or 3 spatial dimensions.

        Raises
        ------
        ArgumentError
            Another number of dimensions, another axis than 1 or an activation, which PyTorch's modules do not have.
        ModuleNotFoundError
            PyTorch is not installed.
        """
        return conversion.to_torch(self._data(), dimensions)

    @classmethod
    def from_keras(cls, layer: keras.layers.BatchNormalization) -> Self:
        """Return a layer with the parameters, statistics and settings of a built ``BatchNormalization`` of Keras.

        Keras's momentum is the weight of the old statistics: ours is 1 minus it. Its epsilon is our eps. Its moving variance follows the
        biased variance of the batches, and so does running_var here (`unbiased` is False); in inference the two mean the same.

        Parameters
        ----------
        layer : keras.layers.BatchNormalization
            Built, that is, called once or loaded.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            Another layer, one that is not built, or one that normalizes over several axes.
        """
        return cls._of(conversion.from_keras(layer))

    def to_keras(self, dimensions: int = 2) -> keras.layers.BatchNormalization:
        """Return a built ``keras.layers.BatchNormalization`` with copies of this layer's parameters, statistics and settings.

        momentum becomes 1 - momentum, eps epsilon. Keras's moving variance goes on with the biased variance of the batches to come,
        whatever `unbiased` is here; num_batches_tracked has no counterpart.

        Parameters
        ----------
        dimensions : int
            0 to 3 spatial dimensions: Keras builds a layer for one rank.

        Raises
        ------
        ArgumentError
            Another number of dimensions, or what Keras does not have: momentum None, no running statistics, an activation.
        ModuleNotFoundError
            Keras is not installed.
        """
        return conversion.to_keras(self._data(), dimensions)

    @classmethod
    def _of(cls, data: conversion.LayerData) -> Self:
        affine, tracked = data.weight is not None or data.bias is not None, data.running_mean is not None
        layer = cls(data.num_features, eps=data.eps, momentum=data.momentum, axis=data.axis, affine=affine, track_running_stats=tracked)
        layer.weight, layer.bias = data.weight, data.bias
        layer.running_mean, layer.running_var = data.running_mean, data.running_var
        layer.num_batches_tracked, layer.unbiased = data.num_batches_tracked, data.unbiased
        return layer.train(data.training)

    def _data(self) -> conversion.LayerData:
        return conversion.LayerData(
            num_features=self.num_features,
            eps=self.eps,
            momentum=self.momentum,
            axis=self.axis,
            activation=self.activation,
            unbiased=self.unbiased,
            training=self.training,
            weight=self.weight,
            bias=self.bias,
            running_mean=self.running_mean if self.track_running_stats else None,
            running_var=self.running_var if self.track_running_stats else None,
            num_batches_tracked=self.num_batches_tracked,
        )


_ARRAYS: tuple[StateName, ...] = ("weight", "bias", "running_mean", "running_var")


def _vector(value: ArrayLike, where: str, channels: int) -> Array:
    array = _check.converted(np.asarray, unmasked(value, where), "an array", where)
    if array.dtype.kind not in "fiu" or array.shape != (channels,):
        raise ArgumentError(expected(f"numbers of shape ({channels},)", f"{array.dtype} of shape {array.shape}", where))
    return array
