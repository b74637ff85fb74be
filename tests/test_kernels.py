"""The kernels of src_c: the same bits on every ISA and for any number of threads, and not one element read or written beside the arrays."""

import itertools
import mmap

import ml_dtypes
import numpy as np
import pytest

import fastbn
from fastbn import _native
from fastbn.dtypes import dtype_code

ISAS = fastbn.show_config()["isa_available"]
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
# (shape, axis): both layouts, tails of every kind, tiles and groups that are split, joined rows with a rest, maps beside reductions.
CASES = [
    ((3, 5, 7, 9), 1),
    ((2, 3, 33000), 1),
    ((40, 70, 5, 5), 1),
    ((40, 24, 40, 41), 1),
    ((1, 9, 300), 1),
    ((1500, 3), 1),
    ((333, 130), 1),
    ((6, 50, 40, 67), -1),
    ((12, 9000), 1),
    ((1, 1, 70000), 1),
    ((3, 23, 29, 31), 1),
    ((2, 5, 130, 150), 1),
    ((5, 3, 4, 4), 1),
    ((7, 40, 17), 1),
    ((2, 70, 28, 28), 1),
    ((1, 37, 513), 1),
]


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = fastbn.get_num_threads()
    yield
    fastbn.set_num_threads(before)


def everything(x, dy, residual, weight, bias, axis, activation):
    """Every result that the kernels can make of these arrays, as bytes."""
    options = {"axis": axis, "activation": activation, "residual": residual}
    y, stats = fastbn.batch_norm_train(x, weight, bias, **options)
    results = [y, stats.mean, stats.m2, fastbn.batch_norm(x, stats.mean, stats.var, weight, bias, **options)]
    for training in (True, False):
        results += fastbn.batch_norm_backward(dy, x, stats, weight, bias, training=training, **options)
    return [np.asarray(values).tobytes() for values in results if values is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_same_bits_on_every_isa_and_for_any_threads(shape, axis, dtype):
    rng = np.random.default_rng(0)
    x, dy, residual = ((rng.standard_normal(shape) * 2 + 1).astype(dtype) for _ in range(3))
    weight, bias = rng.standard_normal((2, shape[axis]))
    for activation, added in ((None, None), ("relu", None), ("leaky_relu", residual), ("relu6", residual)):
        fastbn.set_num_threads(1)
        with fastbn.use_isa("scalar"):
            want = everything(x, dy, added, weight, bias, axis, activation)
        for isa in ISAS:
            for threads in (1, 2, 3, 8) if dtype == np.float32 and activation is None else (2,):
                fastbn.set_num_threads(threads)
                with fastbn.use_isa(isa):
                    assert everything(x, dy, added, weight, bias, axis, activation) == want, (isa, threads)


@pytest.mark.parametrize("isa", ISAS)
def test_no_pattern_of_nan_becomes_a_number_in_bfloat16(isa):
    dtype = np.dtype(ml_dtypes.bfloat16)
    patterns = np.array([0x7F81, 0x7FFF, 0xFF81, 0xFFFF, 0x7FC0], np.uint16)
    x = np.ones((patterns.size, 40), dtype)
    x[:, 7] = patterns.view(dtype)
    one, nan = np.ones(40, np.float32), np.full(40, 0xFFFFFFFF, np.uint32).view(np.float32)
    with fastbn.use_isa(isa):
        for activation in (None, "relu", "leaky_relu", "relu6"):
            y = fastbn.batch_norm(x, one, one, activation=activation)
            assert np.isnan(y[:, 7].astype(float)).all()
            assert np.isfinite(np.delete(y, 7, axis=1).astype(float)).all()
            for changed in ((nan, one, one, one), (one, nan, one, one), (one, one, nan, one), (one, one, one, nan)):
                assert np.isnan(fastbn.batch_norm(np.ones_like(x), *changed, activation=activation).astype(float)).all()
            dy = x.copy()
            stats = fastbn.BatchStats(1, np.zeros(40), np.ones(40))
            *_, dresidual = fastbn.batch_norm_backward(
                dy, np.ones_like(x), stats, one, training=False, activation=activation, residual=np.ones_like(x)
            )
            assert (dresidual[:, 7].view(np.uint16) & 0x7FFF > 0x7F80).all()


def test_streaming_changes_no_bit():
    # Larger than half of any last cache up to 64 MB, and odd planes, so that heads and tails meet streaming stores.
    x = np.random.default_rng(0).standard_normal((9, 31, 190, 191), dtype=np.float32)
    # The third case has channels that are reduced by columns and mapped group by group where the map streams, and in one pass in place.
    by_groups = x.reshape(18, 31 * 95, 191).copy()
    for axis, array in ((1, x), (1, x.reshape(9, 31 * 190, 191)), (1, by_groups), (-1, np.ascontiguousarray(x.transpose(0, 2, 3, 1)))):
        weight, bias = (np.linspace(first, 2, array.shape[axis]) for first in (1, -1))
        big, stats = fastbn.batch_norm_train(array, weight, bias, axis=axis, activation="relu")
        in_place, _ = fastbn.batch_norm_train(array, weight, bias, axis=axis, activation="relu", out=array)
        assert big.tobytes() == in_place.tobytes()
        assert stats.count == array.size // array.shape[axis]
        # `array` has y by now, and y is what comes back, too.
        stats = fastbn.batch_stats(array, axis=axis)
        dx, *_ = fastbn.batch_norm_backward(big, array, stats, weight, bias, axis=axis)
        in_place, *_ = fastbn.batch_norm_backward(big, array, stats, weight, bias, axis=axis, out=big)
        assert dx.tobytes() == in_place.tobytes()


class Guarded:
    """Arrays that end, or begin, where the next byte is not mapped: a read past them is a crash."""

    def __init__(self):
        self.maps = []

    def array(self, shape, dtype, at_end):
        size = int(np.prod(shape)) * dtype.itemsize
        page = mmap.PAGESIZE
        room = -(-size // page) * page
        memory = mmap.mmap(-1, room + 2 * page)
        self.maps.append(memory)
        whole = np.frombuffer(memory, np.uint8)
        protect(whole.ctypes.data, page)
        protect(whole.ctypes.data + page + room, page)
        first = page + (room - size if at_end else 0)
        return whole[first : first + size].view(dtype).reshape(shape)


def at(place, array):
    """A copy of an array that begins `place` bytes behind a cache line."""
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + place
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("channels", [64, 80, 96, 128, 144, 160, 192, 251, 256, 272, 528, 1040, 2112])
def test_where_an_array_begins_changes_no_bit(channels, dtype, isa):
    """Narrow rows are put together from whole lines wherever x and dy begin, wide ones have a head where both begin at the same place. Of
    45 rows, 32 are whole blocks, and 48 are nothing else. Rows of whole lines begin with one where they end a page, so that no guard meets
    them."""
    rng = np.random.default_rng(channels)
    weight, bias = rng.standard_normal((2, channels))
    size = dtype.itemsize
    with fastbn.use_isa(isa):
        for rows, activation in itertools.product((15, 16), (None, "relu")):
            x, dy, residual = (rng.standard_normal((3, rows, channels)).astype(dtype) for _ in range(3))
            added = residual if activation else None
            want = everything(at(0, x), at(0, dy), added, weight, bias, -1, activation)
            for x_at, dy_at in ((16, 16), (size, size), (48, 48), (64 - size, 64 - size), (16, 32), (0, 16)):
                assert everything(at(x_at, x), at(dy_at, dy), added, weight, bias, -1, activation) == want


def rows_beyond_the_last_cache(channels, dtype):
    """Rows of tensors that take a little more of the last cache than a backward pass has of it."""

    def plan(rows):
        return _native.Job((rows, channels, 1), dtype_code(dtype)).describe(strides=(channels, 1), has_dy=True, has_stats=False)

    most = plan(64)["most_bytes"]
    rows = most // (3 * dtype.itemsize * channels) + 5
    assert plan(rows)["bytes"] > most
    if rows * channels > 1 << 24:
        pytest.skip(f"{most >> 20} MB of the last cache")
    return rows


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("channels", [48, 512, 1024, 4096])
def test_where_a_large_array_begins_changes_no_bit(channels, dtype, activation):
    """Above the last cache, gradients are mapped from whole lines where x or dy begins elsewhere in a line than dx."""
    rows = rows_beyond_the_last_cache(channels, dtype)
    x, dy = np.random.default_rng(channels).standard_normal((2, rows, channels)).astype(dtype)
    weight, bias = np.random.default_rng(0).standard_normal((2, channels))
    stats = fastbn.batch_stats(x, axis=-1)

    def gradient(x_at, dy_at, out_at):
        placed = at(dy_at, dy)
        out = placed if out_at is None else at(out_at, dy)
        return fastbn.batch_norm_backward(placed, at(x_at, x), stats, weight, bias, axis=-1, activation=activation, out=out)[0].tobytes()

    with fastbn.use_isa("scalar"):
        want = gradient(0, 0, 0)
    size = dtype.itemsize
    for places in ((0, 16, 48), (16, 48, 48), (48, 16, 48), (64 - size, size, 0), (16, 48, None), (0, 0, 0)):
        for threads in (1, 2):
            fastbn.set_num_threads(threads)
            assert gradient(*places) == want


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(("samples", "plane"), [(2, 777), (20, 777), (1, 20), (20, 20)])
def test_where_planes_past_the_cache_begin_changes_no_bit(samples, plane, dtype, isa):
    """A tensor that is stored past the cache, without a look at times: the first and the last line of a plane, or of a run of planes,
    belong to others too. In place nothing is stored past it. Samples that lie backward are prefetched backward."""
    job = _native.Job((samples, 64, plane), dtype_code(dtype)).describe(strides=(64 * plane, plane), has_dy=True, has_stats=False)
    times = 4  # CERTAINLY_LARGE in plan.c
    channels = times * job["most_bytes"] // (3 * dtype.itemsize * samples * plane) + 3
    if samples * channels * plane > 1 << 24:
        pytest.skip(f"{job['last_cache'] >> 20} MB of the last cache")
    shape = (samples, channels, plane)
    plan = _native.Job(shape, dtype_code(dtype)).describe(strides=(channels * plane, plane), has_dy=True, has_stats=False)
    assert plan["streams"]
    x = np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)
    weight = np.linspace(0.5, 2, channels)
    with fastbn.use_isa(isa):
        stats = fastbn.batch_stats(x)

        def results(place):
            y, out, backward = at(place, x), at(place, x), at(place, x)
            fastbn.batch_norm_train(x, weight, weight, out=y)
            fastbn.batch_norm_backward(x, x, stats, weight, weight, activation="relu", out=out)
            fastbn.batch_norm_train(x[::-1], weight, weight, out=backward[::-1])
            return [array.tobytes() for array in (y, out, backward)]

        want = results(0)
        assert results(16) == results(64 - dtype.itemsize) == want
        y, dx = x.copy(), x.copy()
        fastbn.batch_norm_train(y, weight, weight, out=y)
        fastbn.batch_norm_backward(dx, x, stats, weight, weight, activation="relu", out=dx)
        assert [y.tobytes(), dx.tobytes()] == want[:2]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("channels", [1, 5, 16, 40, 63, 64, 130])
def test_rows_apart_have_the_same_bits_on_every_isa(channels, dtype):
    """A slice of the channels of a larger tensor, whose other channels stay as they are."""
    rng = np.random.default_rng(channels)
    x, dy, residual = (rng.standard_normal((7, 29, channels + 9)).astype(dtype)[..., 3:-6] for _ in range(3))
    weight, bias = rng.standard_normal((2, channels))
    for activation in (None, "relu"):
        with fastbn.use_isa("scalar"):
            want = everything(x, dy, residual, weight, bias, -1, activation)
        for isa in ISAS:
            with fastbn.use_isa(isa):
                assert everything(x, dy, residual, weight, bias, -1, activation) == want
                whole = np.full((7, 29, channels + 9), 7, dtype)
                y, _ = fastbn.batch_norm_train(x, weight, bias, axis=-1, activation=activation, residual=residual, out=whole[..., 3:-6])
                assert y.tobytes() == want[0]
                assert np.all(whole[..., :3] == 7)
                assert np.all(whole[..., -6:] == 7)


@pytest.mark.parametrize("shape", [(90_001, 230), (2_500, 9_000)], ids=["tiles", "groups"])
def test_sums_of_many_tiles_are_the_same_on_any_number_of_threads(shape):
    """One thread adds the sums of a tile to those before it, several keep them until all are there."""
    x, dy = np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32)
    weight = np.ones(shape[1])
    threads, results = fastbn.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            fastbn.set_num_threads(count)
            stats = fastbn.batch_stats(x, axis=-1)
            dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, stats, weight, weight, axis=-1)
            results.append([values.tobytes() for values in (stats.mean, stats.m2, dx, dweight, dbias)])
    finally:
        fastbn.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("isa", ISAS[1:])
def test_sums_of_a_large_tensor_are_the_same_on_every_isa(isa):
    x, dy = np.random.default_rng(0).standard_normal((2, 90_001, 230), dtype=np.float32)

    def sums():
        stats = fastbn.batch_stats(x, axis=-1)
        _, dweight, dbias = fastbn.batch_norm_backward(dy, x, stats, np.ones(230), np.ones(230), axis=-1)
        return [values.tobytes() for values in (stats.mean, stats.m2, dweight, dbias)]

    with fastbn.use_isa(ISAS[0]):
        want = sums()
    with fastbn.use_isa(isa):
        assert sums() == want


def protect(address, size):
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 0):
        pytest.skip("no guard pages here")


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_nothing_beside_the_arrays_is_touched(dtype, isa, at_end):
    with fastbn.use_isa(isa):
        for shape in [
            (3, 5, 1),
            (1, 3, 1),
            (2, 3, 5),
            (3, 2, 17),
            (2, 3, 67),
            (5, 33),
            (17, 65),
            (33, 3),
            (300, 7),
            (9, 7, 3, 3),
            (2, 2, 1029),
        ]:
            guarded = Guarded()
            x, dy, residual, out = (guarded.array(shape, dtype, at_end) for _ in range(4))
            for array, seed in ((x, 0), (dy, 1), (residual, 2)):
                array[...] = np.random.default_rng(seed).standard_normal(shape)
            weight, bias, mean, var = (guarded.array((shape[1],), np.dtype(np.float32), at_end) for _ in range(4))
            for values in (weight, bias, mean, var):
                values[...] = 1
            for activation in (None, "relu"):
                _, stats = fastbn.batch_norm_train(
                    x, weight, bias, running_mean=mean, running_var=var, activation=activation, residual=residual, out=out
                )
                fastbn.batch_norm(x, mean, var, weight, bias, activation=activation, out=out)
                for training in (True, False):
                    fastbn.batch_norm_backward(
                        dy, x, stats, weight, bias, activation=activation, residual=residual, training=training, out=out
                    )


@pytest.mark.parametrize("isa", ISAS)
def test_neighbors_of_a_strided_output_are_left_alone(isa):
    rng = np.random.default_rng(0)
    with fastbn.use_isa(isa):
        for shape in [(4, 5, 37), (4, 5, 3), (70, 41), (3, 6, 19, 5)]:
            frame = np.full([size + 2 for size in shape], 7, np.float32)
            inside = frame[tuple(slice(1, -1) for _ in shape)]
            x = rng.standard_normal(shape, dtype=np.float32)
            fastbn.batch_norm_train(x, out=inside)
            np.testing.assert_allclose(inside, fastbn.batch_norm_train(x)[0], atol=2e-6)
            assert (frame == 7).sum() == frame.size - inside.size


def test_the_table_is_complete():
    for isa in ISAS:
        with fastbn.use_isa(isa):
            names = fastbn.kernels()
        assert len(names) == len(set(names)) == (5 * 2 + 2) * 4
        assert all(name.startswith("fbn_") and name.endswith(f"_{isa}") for name in names)
        for op in ("pivot", "stats", "apply", "grad_reduce", "grad_input"):
            assert f"fbn_{op}_nsc_bf16_{isa}" in names
        assert f"fbn_stats_apply_ncs_f16_{isa}" in names
