"""Lent memory: it comes back with the last reference, is lent again, and does not pile up."""

import gc
import threading

import numpy as np
import pytest

from fastbn import memory

FLOAT = np.dtype(np.float32)


@pytest.fixture(autouse=True)
def _nothing_kept():
    memory.release()
    yield
    memory.release()


def kept():
    return sum(size * len(blocks) for size, blocks in memory._idle.items())


def test_memory_is_lent_again_when_the_last_reference_is_gone():
    array = memory.lend((3, 1000), FLOAT)
    address, part = array.ctypes.data, array[1:]
    assert (array.shape, array.dtype, array.flags.c_contiguous, array.flags.writeable) == ((3, 1000), FLOAT, True, True)
    del array
    assert kept() == 0, "a part of it is still in use"
    del part
    assert kept() == 12000
    assert memory.lend((1500,), np.dtype(np.float64)).ctypes.data == address


def test_arrays_in_use_do_not_share_memory():
    arrays = [memory.lend((1000,), FLOAT) for _ in range(4)]
    for place, array in enumerate(arrays):
        array[:] = place
    assert [set(array.tolist()) for array in arrays] == [{0}, {1}, {2}, {3}]


def test_memory_begins_at_a_cache_line():
    arrays = [memory.lend((size,), FLOAT) for size in (1, 1000, 1 << 20, 1 << 24)]
    assert [array.ctypes.data % 64 for array in arrays] == [0] * 4


def test_no_more_is_kept_than_promised(monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 50_000)
    for size in (1000, 2000, 3000, 4000):
        arrays = [memory.lend((size,), FLOAT) for _ in range(3)]
        del arrays
    assert 0 < kept() <= 50_000
    assert max(memory._idle) == 16_000, "what came back last is kept"
    memory.release()
    assert kept() == 0


def test_memory_lent_sparingly_takes_the_place_of_what_is_kept():
    for size in (1000, 3000):
        array = memory.lend_sparingly((size,), FLOAT)
        assert kept() == 0, "blocks of another size are freed first"
        address = array.ctypes.data
        del array
        assert kept() == 4 * size
    assert memory.lend_sparingly((3000,), FLOAT).ctypes.data == address


def test_a_reference_in_a_cycle():
    cycle = [memory.lend((1000,), FLOAT)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert kept() == 4000


def test_many_threads():
    def work(place):
        for _ in range(300):
            array = memory.lend((1000,), FLOAT)
            array[:] = place
            assert (array == place).all()

    errors = []
    threads = [threading.Thread(target=lambda place=place: errors.append(work(place))) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [None] * 4
    assert kept() <= 4 * 2 * 4000  # a thread asks for the next array before it gives the last one up


def test_tensors_of_torch_give_it_back():
    torch = pytest.importorskip("torch")
    from fastbn.torch import batch_norm

    x = torch.ones(4, 8, 200, 100)
    y = batch_norm(x, None, None, training=True)
    address, view = y.data_ptr(), y[1].numpy()
    del y
    assert kept() == 0
    del view
    assert kept() == x.nbytes
    y = batch_norm(x.bfloat16().contiguous(memory_format=torch.channels_last).float(), None, None, training=True)
    assert y.data_ptr() == address
    del y
    assert kept() == x.nbytes
