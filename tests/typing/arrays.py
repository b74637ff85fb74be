"""What a type checker tells the users of the array functions."""

import array
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import fastbn

x: npt.NDArray[np.float32] = np.ones((2, 3, 4, 4), np.float32)
half: npt.NDArray[np.float16] = np.ones((2, 3), np.float16)
weight: npt.NDArray[np.float32] = np.ones(3, np.float32)
bias: npt.NDArray[np.float64] = np.zeros(3)
mean, var = np.zeros(3), np.ones(3)

# Results have the dtype of x.
assert_type(fastbn.batch_norm(x, mean, var), npt.NDArray[np.float32])
assert_type(fastbn.batch_norm(half, mean, var, weight, bias, eps=1e-3, axis=-1), npt.NDArray[np.float16])
assert_type(fastbn.batch_norm(x, mean, var, activation="relu", residual=x, out=x), npt.NDArray[np.float32])
assert_type(fastbn.batch_norm(x, mean, var, eps=np.float32(1e-3), axis=np.int64(1)), npt.NDArray[np.float32])
assert_type(fastbn.batch_norm(array.array("f", [1.0]), mean, var, axis=0), npt.NDArray[Any])

y, stats = fastbn.batch_norm_train(x, weight, bias, running_mean=mean, running_var=var, momentum=0.2, unbiased=False)
assert_type(y, npt.NDArray[np.float32])
assert_type(stats, fastbn.BatchStats)
assert_type(stats.count, int)
assert_type(stats.mean, npt.NDArray[np.float64])
assert_type(stats.var, npt.NDArray[np.float64])
assert_type(fastbn.batch_stats(x, axis=1), fastbn.BatchStats)
assert_type(fastbn.merge_stats([stats, stats]), fastbn.BatchStats)
assert_type(stats.merge(stats), fastbn.BatchStats)

# The backward pass has three results, or four with a residual; dweight and dbias are there where weight and bias are.
dx, dweight, dbias = fastbn.batch_norm_backward(y, x, stats, weight, bias, activation="relu")
assert_type(dx, npt.NDArray[np.float32])
assert_type(dweight, npt.NDArray[np.float32])
assert_type(dbias, npt.NDArray[np.float64])
dx, dweight, dbias, dresidual = fastbn.batch_norm_backward(y, x, stats, weight, bias, residual=x, training=True)
assert_type(dresidual, npt.NDArray[np.float32])
dx, no_weight, no_bias = fastbn.batch_norm_backward(y, x, stats)
assert_type(no_weight, npt.NDArray[Any] | None)
dx, no_weight, no_bias, dresidual = fastbn.batch_norm_backward(y, x, stats, weight, residual=x)
assert_type(no_bias, npt.NDArray[Any] | None)
assert_type(dresidual, npt.NDArray[np.float32])

# Folded weights have the dtype of the weights; values per channel may be lists.
new_weight, new_bias = fastbn.fold_conv(x, None, mean, var, eps=1e-3, groups=1, transposed=True)
assert_type(new_weight, npt.NDArray[np.float32])
assert_type(new_bias, npt.NDArray[np.float32])
assert_type(fastbn.fold_linear(half, [0.0, 1.0], mean, var), tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]])
assert_type(fastbn.fold_linear([[1.0, 2.0]], None, [0.0], [1.0]), tuple[npt.NDArray[Any], npt.NDArray[Any]])
