"""Masked arrays: no function drops a mask; and other arguments that look like what is wanted and are not."""

import numpy as np
import pytest
from sketch import classifier, norm, normal
from sketch import model as model_of

import fastbn
from fastbn.errors import ArgumentTypeError

MASKED = np.ma.masked_array(normal(4, 3), mask=np.eye(4, 3, dtype=bool))
ROW = MASKED[0]
PLAIN, ONES = normal(4, 3), np.ones(3, np.float32)
SQUARE = np.ma.masked_array(normal(3, 3), mask=np.eye(3, dtype=bool))

CALLS = {
    "batch_norm x": lambda: fastbn.batch_norm(MASKED, ONES, ONES),
    "batch_norm mean": lambda: fastbn.batch_norm(PLAIN, ROW, ONES),
    "batch_norm_train x": lambda: fastbn.batch_norm_train(MASKED),
    "batch_norm_train weight": lambda: fastbn.batch_norm_train(PLAIN, weight=ROW),
    "batch_norm_train out": lambda: fastbn.batch_norm_train(PLAIN, out=MASKED),
    "batch_stats": lambda: fastbn.batch_stats(MASKED),
    "BatchStats": lambda: fastbn.BatchStats(1, ROW, ONES),
    "fold_linear weight": lambda: fastbn.fold_linear(SQUARE, None, ONES, ONES),
    "fold_linear bias": lambda: fastbn.fold_linear(np.ones((3, 3)), ROW, ONES, ONES),
    "BatchNorm": lambda: fastbn.BatchNorm(3)(MASKED),
    "load_state_dict": lambda: fastbn.BatchNorm(3).load_state_dict({**fastbn.BatchNorm(3).state_dict(), "weight": ROW}),
    "deploy": lambda: fastbn.deploy(classifier(), data=np.ma.masked_less(normal(4, 3, 8, 8), 0), runs=1),
    "reestimate": lambda: fastbn.reestimate(
        model_of("(float[N, 3] x) => (float[N, 3] y) { y = BatchNormalization (x, s, t, m, v) }", **norm(3)), {"x": MASKED}
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_mask_is_refused(name):
    with pytest.raises(ArgumentTypeError, match=r"^Expected an array without a mask, .*, got masked elements - at `"):
        CALLS[name]()


def test_a_masked_array_without_masked_elements_is_an_array():
    found = fastbn.batch_norm_train(np.ma.masked_array(PLAIN))[0]
    assert type(found) is np.ndarray
    assert np.array_equal(found, fastbn.batch_norm_train(PLAIN)[0])


WRONG = {
    "axis=1.0": lambda: fastbn.batch_norm_train(PLAIN, axis=1.0),
    "axis='1'": lambda: fastbn.batch_norm_train(PLAIN, axis="1"),
    "eps='1e-5'": lambda: fastbn.batch_norm_train(PLAIN, eps="1e-5"),
    "eps=b'1'": lambda: fastbn.BatchNorm(3, eps=b"1"),
    "momentum='0.1'": lambda: fastbn.BatchNorm(3, momentum="0.1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_text_is_no_number_and_a_float_no_axis(name):
    with pytest.raises(ArgumentTypeError, match=rf"^Expected an? (integer|number), got \w+ - at `{name.partition('=')[0]}`$"):
        WRONG[name]()


def test_one_array_for_both_running_statistics():
    both = np.zeros(3, np.float32)
    with pytest.raises(fastbn.ArgumentError, match=r"- at `running_var`$"):
        fastbn.batch_norm_train(PLAIN, running_mean=both, running_var=both)
    layer = fastbn.BatchNorm(3)
    layer.running_mean = layer.running_var
    with pytest.raises(fastbn.ArgumentError, match=r"- at `running_var`$"):
        layer(PLAIN)
    assert not both.any()
