"""The bounds that docs/numerics.md derives for the kernels, held by them, on both sides of each threshold."""

import re
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fastbn
from fastbn import _native

ROOT = Path(__file__).resolve().parent.parent
U = 2.0**-24
RECOMPUTED = 1e-13  # relative errors of m2 below this come from float64, those of one float32 pass are above


def error_of_m2(x):
    """The relative error of m2 of one channel."""
    values = x.astype(np.longdouble)
    exact = np.square(values - values.mean()).sum()
    return abs(float((fastbn.batch_stats(x[None, None]).m2[0] - exact) / exact))


def sampled_places(n):
    """Where the pivot of a channel of n values comes from, as in pivot.c."""
    k = np.arange(16)
    return k * n // 16 + (k * 0.6180339887498949 % 1 * (n // 16)).astype(np.int64)


@pytest.mark.parametrize("layout", [(1, 1, -1), (-1, 1, 1)], ids=["planes", "columns"])
@pytest.mark.parametrize("n", [17, 512, 513, 100_000, 3_000_000])
def test_a_sum_loses_fifteen_roundings_at_most_however_long(n, layout):
    rng = np.random.default_rng(n)
    for dy in (np.full(n, 1 / 3), rng.uniform(0, 1, n), 1 + rng.uniform(0, 1e-3, n), rng.standard_normal(n)):
        dy = dy.astype(np.float32).reshape(layout)
        stats = fastbn.BatchStats(n, np.zeros(1), np.full(1, float(n)))
        *_, dbias = fastbn.batch_norm_backward(dy, np.ones_like(dy), stats, np.ones(1), np.zeros(1))
        assert dbias.dtype == np.float64
        exact = dy.astype(np.longdouble)
        assert abs(dbias[0] - exact.sum()) <= 15.01 * U * np.abs(exact).sum()


@pytest.mark.parametrize("shape", [(1, 40, 49), (3, 20, 49), (2, 5, 511), (15, 33, 17), (7, 3, 100)])
def test_a_sum_of_a_short_plane_loses_nineteen_roundings_at_most(shape):
    n = shape[0] * shape[2]
    rng = np.random.default_rng(n)
    for dy in (np.full(shape, 1 / 3), rng.uniform(0, 1, shape), 1 + rng.uniform(0, 1e-3, shape), rng.standard_normal(shape)):
        dy = dy.astype(np.float32)
        stats = fastbn.BatchStats(n, np.zeros(shape[1]), np.full(shape[1], float(n)))
        *_, dbias = fastbn.batch_norm_backward(dy, np.ones_like(dy), stats, np.ones(shape[1]), np.zeros(shape[1]))
        exact = dy.astype(np.longdouble)
        assert (np.abs(dbias - exact.sum((0, 2))) <= 19.01 * U * np.abs(exact).sum((0, 2))).all()


@pytest.mark.parametrize("shape", [(1, 70, 49), (2, 19, 300), (5, 8, 16), (9, 33, 3)])
def test_channels_of_short_planes_that_are_reduced_together_keep_their_own_pivots(shape):
    rng = np.random.default_rng(0)
    means = rng.permutation(np.geomspace(1, 1e6, shape[1]))[None, :, None]
    x = (rng.standard_normal(shape) + means).astype(np.float32)
    stats = fastbn.batch_stats(x)
    exact = x.astype(np.longdouble)
    m2 = np.square(exact - exact.mean((0, 2), keepdims=True)).sum((0, 2))
    assert (np.abs(stats.m2 - m2) <= 289 * U * m2).all()
    assert (np.abs(stats.mean - exact.mean((0, 2))) <= 20 * U * np.sqrt(m2 / (shape[0] * shape[2]))).all()


@pytest.mark.parametrize(("distance", "recomputed"), [(0, False), (0.5, False), (1.95, False), (2.05, True), (5, True), (1000, True)])
def test_a_channel_is_recomputed_where_its_pivot_is_two_deviations_off(distance, recomputed):
    n, errors = 64_000, []
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal(n).astype(np.float32) + np.float32(3)
        # Where distance is large the 16 values count themselves: they move the mean and widen the deviation.
        others = np.delete(x, sampled_places(n)).astype(np.float64)
        wanted = distance * (n - 16) / n
        outlier = wanted / np.sqrt(1 - 16 / n * wanted**2) * others.std() if 16 / n * wanted**2 < 1 else 1000 * others.std()
        x[sampled_places(n)] = others.mean() + outlier * n / (n - 16)
        errors.append(error_of_m2(x))
    assert max(errors) <= 233 * U
    assert (max(errors) < RECOMPUTED) == recomputed


@pytest.mark.parametrize(
    ("shape", "above", "by"), [((1, 72), "ends", 1), ((4, 72), "ends", 1), ((3, 72), "end", 1), ((8, 400), "first", 5)]
)
def test_the_lines_of_a_pivot_are_never_too_far_from_the_mean(shape, above, by):
    """A fifth of a short channel at least, or four lines spread over it. Above the rest is the first line of each plane, that of the first
    plane, or all of the first plane."""
    x = np.random.default_rng(0).uniform(0, 1e-3, shape).astype(np.float32)
    x[{"ends": np.s_[:, :16], "end": np.s_[0, :16], "first": np.s_[0]}[above]] += by
    values = x.astype(np.longdouble)
    exact = np.square(values - values.mean()).sum()
    error = abs(float((fastbn.batch_stats(x[:, None]).m2[0] - exact) / exact))
    assert RECOMPUTED < error <= 233 * U


@pytest.mark.parametrize(("exponent", "recomputed"), [(-60, False), (-89, False), (-91, True), (-110, True), (-140, True)])
def test_squares_near_the_end_of_the_range_are_recomputed(exponent, recomputed):
    errors = []
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal(5000)
        errors.append(error_of_m2((x / x.std() * 2.0 ** (exponent / 2)).astype(np.float32)))
    assert max(errors) <= 233 * U
    assert (max(errors) < RECOMPUTED) == recomputed


@pytest.mark.parametrize("ratio", [0, 1e2, 1e4, 1e6, 1e7])
def test_the_split_mean_costs_four_roundings_at_any_ratio(ratio):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((1, 1, 20_000)) + ratio).astype(np.float32)
    exact = x.astype(np.longdouble)
    mean, var = exact.mean(), exact.var()
    y = fastbn.batch_norm_train(x, np.ones(1), np.zeros(1))[0]
    want = (exact - mean) / np.sqrt(var + np.longdouble(1e-5))
    assert (np.abs(y - want) <= 4 * U * np.maximum(np.abs(want), max(1.0, U * ratio))).all()


def test_few_samples_of_a_pivot_lie_on_one_border():
    for images in (1, 2, 4, 8, 16, 32, 64):
        for size in (28, 32, 56, 64, 112, 128, 224):
            places = sampled_places(images * size * size) % (size * size)
            for line in (places % size, places // size):
                assert max((line == 0).sum(), (line == size - 1).sum()) <= 2


def scaled(weight, scale):
    out = np.empty_like(weight)
    dtype = {"float32": 0, "float16": 2, "bfloat16": 3}[weight.dtype.name]
    _native.scale_weight(out.ctypes.data, weight.ctypes.data, scale.ctypes.data, 1, 1, scale.size, 1, dtype)
    return out


def test_a_scaled_weight_is_rounded_once_or_all_but_once():
    rng = np.random.default_rng(0)
    weight, scale = rng.standard_normal(20_000).astype(np.float32), rng.standard_normal(20_000)
    for w, s, got in zip(weight.tolist(), scale.tolist(), scaled(weight, scale), strict=True):
        error = abs(Fraction(w) * Fraction(s) - Fraction(float(got))) / Fraction(float(np.spacing(np.abs(got))))
        assert error <= Fraction(1, 2) + Fraction(1, 2**30)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)], ids=lambda dtype: dtype.name)
def test_every_16_bit_number_and_every_middle_between_two_rounds_as_it_should(dtype):
    """From 0 to infinity: a middle goes to the even neighbor, a value beside it to the nearer one."""
    last = int(np.array(np.inf, dtype).view(np.uint16))
    bits = np.arange(last, dtype=np.uint16)
    values = bits.view(dtype).astype(np.float64)
    one = np.ones(last, dtype)
    assert (scaled(one, values).view(np.uint16) == bits).all()
    assert (scaled(one, -values).view(np.uint16) == bits + 0x8000).all()
    spacing = np.diff(values, append=2 * values[-1] - values[-2])
    middle = values + spacing / 2
    assert (scaled(one, middle).view(np.uint16) == bits + bits % 2).all()
    assert (scaled(one, np.nextafter(middle, 0)).view(np.uint16) == bits).all()
    assert (scaled(one, np.nextafter(middle, np.inf)).view(np.uint16) == bits + 1).all()


def test_every_pointer_of_the_kernels_names_a_section():
    kernels = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8").partition("\n## Kernels\n")[2].partition("\n## ")[0]
    sections = {name.lower() for name in re.findall(r"^### (.+)$", kernels, re.MULTILINE)}
    named = set()
    for path in sorted([*(ROOT / "src_c").iterdir(), ROOT / "fastbn" / "stats.py"]):
        text = re.sub(r"\s+(\* )?", " ", path.read_text(encoding="utf-8"))
        for pointer in re.findall(r"docs/numerics\.md: ([^.:*/]+)", text):
            named |= {name.strip() for name in pointer.split(";")}
    assert named == sections
