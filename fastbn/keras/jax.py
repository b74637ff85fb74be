"""The JAX backend: callbacks with a gradient of their own, eager and under jit.

`jax.pure_callback` copies its arguments on the threads that run the program: where one of these is left waiting in a callback, as on a
machine with one CPU, that never ends. A primitive of our own takes the arrays as the program has them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from fastbn.keras import callbacks

__all__ = ["infer", "train"]

_on_host = Primitive("fastbn")
_on_host.multiple_results = True
_on_host.def_abstract_eval(lambda *_, function, results: list(results))


def _lower(ctx, *arrays, function, results):
    found, _, _ = mlir.emit_python_callback(
        ctx, function, None, arrays, ctx.avals_in, ctx.avals_out, has_side_effect=False, returns_token=False
    )
    return found


mlir.register_lowering(_on_host, _lower, cacheable=False)


@partial(jax.jit, static_argnums=(0, 1))
def _call(function, options, like, *arrays):
    """Call a function of NumPy arrays; its results have the shapes and dtypes of the tree `like`. None may stand among all of them."""
    _, tree = jax.tree.flatten(arrays)
    wanted, result_tree = jax.tree.flatten(like)

    def on_host(*values):
        return jax.tree.leaves(function(*tree.unflatten(values), **dict(options)))

    @jax.custom_batching.sequential_vmap
    def call(*values):
        results = tuple(jax.core.ShapedArray(value.shape, value.dtype) for value in wanted)
        return _on_host.bind(*values, function=on_host, results=results)

    return result_tree.unflatten(call(*jax.tree.leaves(arrays)))


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def infer(x, mean, var, weight, bias, eps, axis):
    """Return y."""
    return _call(callbacks.infer, (("eps", eps), ("axis", axis)), x, x, mean, var, weight, bias)


def _infer_forward(x, mean, var, weight, bias, eps, axis):
    return infer(x, mean, var, weight, bias, eps, axis), (x, mean, var, weight, bias)


def _infer_backward(eps, axis, kept, dy):
    x, mean, var, weight, bias = kept
    options = (("eps", eps), ("axis", axis))
    dx, dweight, dbias = _call(callbacks.infer_backward, options, (x, weight, bias), dy, *kept)
    return dx, jnp.zeros_like(mean), jnp.zeros_like(var), dweight, dbias


infer.defvjp(_infer_forward, _infer_backward)


def train(x, running_mean, running_var, weight, bias, mask, momentum, eps, axis):
    """Return (y, running_mean, running_var); only y has a gradient."""
    y, *running = _train(x, running_mean, running_var, weight, bias, mask, momentum, eps, axis)
    return y, *map(jax.lax.stop_gradient, running)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _train(x, running_mean, running_var, weight, bias, mask, momentum, eps, axis):
    return _train_forward(x, running_mean, running_var, weight, bias, mask, momentum, eps, axis)[0]


# JAX has no float64 unless it is told to: what the backward pass needs travels as pairs of uint32.


def _train_host(*arrays, **options):
    *results, saved = callbacks.train(*arrays, **options)
    return *results, saved.view(np.uint32)


def _train_backward_host(dy, x, weight, bias, saved, mask, **options):
    return callbacks.train_backward(dy, x, weight, bias, saved.view(np.float64), mask, **options)


def _train_forward(x, running_mean, running_var, weight, bias, mask, momentum, eps, axis):
    saved = jnp.zeros(2 * callbacks.saved_size(x.shape[axis]), np.uint32)
    options = (("momentum", momentum), ("eps", eps), ("axis", axis))
    arrays = (x, running_mean, running_var, weight, bias, mask)
    *results, saved = _call(_train_host, options, (x, running_mean, running_var, saved), *arrays)
    return tuple(results), (*arrays, saved)


def _train_backward(momentum, eps, axis, kept, gradients):
    x, running_mean, running_var, weight, bias, mask, saved = kept
    options = (("eps", eps), ("axis", axis))
    found = _call(_train_backward_host, options, (x, weight, bias), gradients[0], x, weight, bias, saved, mask)
    no_mask = None if mask is None else np.zeros(mask.shape, jax.dtypes.float0)
    return found[0], jnp.zeros_like(running_mean), jnp.zeros_like(running_var), *found[1:], no_mask


_train.defvjp(_train_forward, _train_backward)
