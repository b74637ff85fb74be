"""The JAX backend: callbacks with a gradient of their own, eager and under jit.

`jax.pure_callback` copies its arguments on the threads that run the program; a callback that waits for one of these threads, as on a
machine with one CPU, never ends. A primitive of our own takes the arrays as the program has them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from fastbn.keras import callbacks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import Array, FloatVector
    from fastbn.keras.callbacks import Gradients, Mask

__all__ = ["infer", "train"]

# Any: a function of NumPy arrays, and a tree of JAX arrays and None.
_Function: TypeAlias = Callable[..., Any]
_Tree: TypeAlias = Any
# Names and values of options, which a call under jit must be able to hash.
_Options: TypeAlias = tuple[tuple[str, float | int], ...]

_on_host = Primitive("fastbn")
_on_host.multiple_results = True
_on_host.def_abstract_eval(lambda *_, function, results: list(results))


# Any: what MLIR's lowering hands over and takes.
def _lower(ctx: Any, *arrays: Any, function: _Function, results: tuple[jax.core.ShapedArray, ...]) -> Any:
    values, _, _ = mlir.emit_python_callback(
        ctx, function, None, arrays, ctx.avals_in, ctx.avals_out, has_side_effect=False, returns_token=False
    )
    return values


mlir.register_lowering(_on_host, _lower, cacheable=False)


@partial(jax.jit, static_argnums=(0, 1))
def _call(function: _Function, options: _Options, like: _Tree, *arrays: _Tree) -> _Tree:
    """Call a function of NumPy arrays; its results have the shapes and dtypes of the tree `like`. None may stand among all of them."""
    _, tree = jax.tree.flatten(arrays)
    wanted, result_tree = jax.tree.flatten(like)

    def on_host(*values: Array) -> list[Array]:
        leaves: list[Array] = jax.tree.leaves(function(*tree.unflatten(values), **dict(options)))
        return leaves

    @jax.custom_batching.sequential_vmap
    def call(*values: jax.Array) -> list[jax.Array]:
        results = tuple(jax.core.ShapedArray(value.shape, value.dtype) for value in wanted)
        outputs: list[jax.Array] = _on_host.bind(*values, function=on_host, results=results)
        return outputs

    return result_tree.unflatten(call(*jax.tree.leaves(arrays)))


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def infer(
    x: jax.Array, mean: jax.Array, var: jax.Array, weight: jax.Array | None, bias: jax.Array | None, eps: float, axis: int
) -> jax.Array:
    """Return y."""
    return _call(callbacks.infer, (("eps", eps), ("axis", axis)), x, x, mean, var, weight, bias)


def _infer_forward(
    x: jax.Array, mean: jax.Array, var: jax.Array, weight: jax.Array | None, bias: jax.Array | None, eps: float, axis: int
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    return infer(x, mean, var, weight, bias, eps, axis), (x, mean, var, weight, bias)


def _infer_backward(eps: float, axis: int, saved_values: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array | None, ...]:
    x, mean, var, weight, bias = saved_values
    options = (("eps", eps), ("axis", axis))
    dx, dweight, dbias = _call(callbacks.infer_backward, options, (x, weight, bias), dy, *saved_values)
    return dx, jnp.zeros_like(mean), jnp.zeros_like(var), dweight, dbias


infer.defvjp(_infer_forward, _infer_backward)


def train(
    x: jax.Array,
    running_mean: jax.Array,
    running_var: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    momentum: float,
    eps: float,
    axis: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (y, running_mean, running_var); only y has a gradient."""
    y, mean, var = _train(x, running_mean, running_var, weight, bias, mask, momentum, eps, axis)
    return y, jax.lax.stop_gradient(mean), jax.lax.stop_gradient(var)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _train(
    x: jax.Array,
    running_mean: jax.Array,
    running_var: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    momentum: float,
    eps: float,
    axis: int,
) -> tuple[jax.Array, ...]:
    return _train_forward(x, running_mean, running_var, weight, bias, mask, momentum, eps, axis)[0]


# JAX has no float64 unless it is enabled: what the backward pass needs is passed as pairs of uint32.


# Any: the arguments of `callbacks.train`, and of `callbacks.train_backward`, passed on.
def _train_host(*arrays: Any, **options: Any) -> tuple[Array, ...]:
    *results, saved = callbacks.train(*arrays, **options)
    return *results, saved.view(np.uint32)


def _train_backward_host(
    dy: Array, x: Array, weight: FloatVector | None, bias: FloatVector | None, saved: NDArray[np.uint32], mask: Mask | None, **options: Any
) -> Gradients:
    return callbacks.train_backward(dy, x, weight, bias, saved.view(np.float64), mask, **options)


def _train_forward(
    x: jax.Array,
    running_mean: jax.Array,
    running_var: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    momentum: float,
    eps: float,
    axis: int,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...]]:
    saved = jnp.zeros(2 * callbacks.saved_size(x.shape[axis]), np.uint32)
    options = (("momentum", momentum), ("eps", eps), ("axis", axis))
    arrays = (x, running_mean, running_var, weight, bias, mask)
    *results, saved = _call(_train_host, options, (x, running_mean, running_var, saved), *arrays)
    return tuple(results), (*arrays, saved)


def _train_backward(
    momentum: float, eps: float, axis: int, saved_values: tuple[jax.Array, ...], gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, ...]:
    x, running_mean, running_var, weight, bias, mask, saved = saved_values
    options = (("eps", eps), ("axis", axis))
    dx, dweight, dbias = _call(_train_backward_host, options, (x, weight, bias), gradients[0], x, weight, bias, saved, mask)
    no_mask = None if mask is None else np.zeros(mask.shape, jax.dtypes.float0)
    return dx, jnp.zeros_like(running_mean), jnp.zeros_like(running_var), dweight, dbias, no_mask


_train.defvjp(_train_forward, _train_backward)
