"""What kernel_schedule says is what the kernels do, and bench_kernels measures it."""

import json
import re

import numpy as np
import pytest

import fastbn
from fastbn import _native, bench_kernels, kernel_bench, kernel_schedule
from fastbn.cli import main
from fastbn.kernel_bench import OPERATIONS, kernel_lines


@pytest.fixture(autouse=True)
def _threads():
    before = fastbn.get_num_threads()
    yield
    fastbn.set_num_threads(before)


@pytest.mark.parametrize(
    ("shape", "axis", "reduction", "mapped", "fused"),
    [
        ((32, 64, 56, 56), 1, "by planes", "by planes", True),
        ((32, 56, 56, 64), -1, "by columns", "by columns", False),
        ((32, 64, 7, 7), 1, "by columns", "by planes", False),
        ((64, 512), 1, "by columns", "by columns", False),
        ((5000,), 0, "by columns", "by columns", False),
    ],
)
def test_the_way(shape, axis, reduction, mapped, fused):
    fastbn.set_num_threads(1)
    inference, training, backward = kernel_schedule(shape, axis=axis)
    assert inference["reduction"] is None
    assert not inference["fused"]
    for row in (training, backward):
        assert (row["reduction"], row["fused"]) == (reduction, fused)
    assert {row["map"] for row in (inference, training, backward)} == {mapped}


def test_threads_follow_from_the_size():
    fastbn.set_num_threads(4)
    for elements, threads in ((8, 1), (1 << 12, 1), (1 << 15, 4), (1 << 30, 4)):
        row = kernel_schedule((1, 1, elements))[1]
        assert row["threads"] == threads
    assert kernel_schedule((1, 1, 8))[1]["why"][0] == "1 thread: more would cost more than they save with 8 elements"
    assert kernel_schedule((1, 1, 1 << 30))[1]["why"][0] == "4 threads: all that may be used"
    between = kernel_schedule((1, 1, (1 << 15) + 1))[1]["why"][0]
    assert between == "4 threads: the first calls will compare 1 thread, 2 threads, 4 threads"


def test_ways_are_compared_by_the_time_of_calls():
    """Of a shape that no other test has: nothing is known of it before its first calls."""
    fastbn.set_num_threads(2)
    x = np.ones((3, 7, 4001), np.float32)
    before = kernel_schedule(x.shape)[0]["why"][0]
    values = np.ones(7, np.float32)
    out = np.empty_like(x)
    calls = [fastbn.batch_norm(x, values, values, values, values, out=out).tobytes() for _ in range(20)]
    assert len(set(calls)) == 1
    row = kernel_schedule(x.shape)[0]
    assert before == "2 threads: the first calls will compare 1 thread, 2 threads"
    found = re.fullmatch(r"(\d) threads?: by the time of calls: 1 thread (\S+) (.?s), 2 threads (\S+) (.?s)", row["why"][0])
    assert found
    assert int(found[1]) == row["threads"]
    one, two = (float(found[i]) * {"us": 1, "ms": 1e3}[found[i + 1]] for i in (2, 4))
    # The second has to be faster by a sixteenth; the times are printed with three digits.
    assert row["threads"] == (2 if two * 17 / 16 < one * 0.99 else 1) or abs(two * 17 / 16 / one - 1) < 0.02


def test_the_times_of_many_shapes_in_turn_are_all_kept():
    """Shapes that share a place in the table of times would all begin again with every call, on one thread."""
    fastbn.set_num_threads(2)
    batches = [np.ones((2, 4, channels, 901), np.float32) for channels in range(20, 140)]
    for _ in range(40):  # two ways, 16 calls each, and more
        for x, out in batches:
            values = np.ones(x.shape[1], np.float32)
            fastbn.batch_norm(x, values, values, values, values, out=out)
    plans = [_native.Job((4, channels, 901)).describe(strides=(0, 0, 1), has_dy=False, has_stats=False) for channels in range(20, 140)]
    assert all(time > 0 for plan in plans for time in plan["way_nanoseconds"][: plan["ways"]])


def test_the_halves_of_a_backward_pass_have_times_of_their_own():
    fastbn.set_num_threads(2)
    x, dx, stats = np.ones((3, 6, 4002), np.float32), np.empty((3, 6, 4002), np.float32), np.ones(6)
    for _ in range(20):
        _native.Job((3, 6, 4002)).backward_input(
            x=x, dx=dx, dy=x, weight=None, bias=None, batch_mean=stats, batch_m2=stats, count=8, sums=np.ones((2, 6))
        )
    assert "2 threads: the first calls will compare 1 thread, 2 threads" in kernel_schedule(x.shape)[2]["why"]


def test_the_store_follows_from_bytes_and_cache():
    fastbn.set_num_threads(1)
    for operation in range(3):
        small, large = (kernel_schedule((n, 64, 16, 16))[operation] for n in (1, 1 << 20))
        assert (small["store"], large["store"]) == ("ordinary", "streaming")
        assert small["why"][1].startswith("ordinary stores: the tensors have ")
        assert small["why"][1].endswith(" hold")
        assert re.search(r" more than \S+ MB of a last cache of \S+ MB$", large["why"][1])
    between = kernel_schedule((128, 65, 16, 16))[0]["why"][1]
    assert between.endswith("the first calls will compare ordinary stores, streaming stores")
    halves = kernel_schedule((3, 64, 16, 16), dtype=np.float16)[0]["why"][1]
    assert "the tensors have 0.188 MB" in halves


def test_measured():
    bench = bench_kernels((4, 8, 128, 128), seconds=0.01)
    assert json.loads(json.dumps(bench)) == bench
    assert (bench["shape"], bench["axis"], bench["dtype"], bench["bytes"]) == ([4, 8, 128, 128], 1, "float32", 4 * 8 * 128 * 128 * 4)
    for row in bench["timings"]:
        assert row["us"] > 0
        assert row["copies"] == row["us"] / bench["copy_us"]
    assert [row["operation"] for row in bench["timings"]][:3] == ["inference", "training", "backward"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (2, 0)}, r"Expected an integer >= 1, got 0 - at `shape`"),
        ({"shape": ()}, r"Expected 1 to 64 dimensions, got 0 - at `shape`"),
        ({"shape": (1,) * 65}, r"Expected 1 to 64 dimensions, got 65 - at `shape`"),
        ({"shape": (1 << 20, 1 << 20)}, r"Expected 1 to 2\*\*40 elements, got .* - at `shape`"),
        ({"shape": (2, 3), "axis": 2}, r"Expected an axis of 2 dimensions, got 2 - at `axis`"),
        ({"shape": (2, 3), "dtype": "int8"}, r"Expected float32, float64, float16 or bfloat16, got int8 - at `dtype`"),
        ({"shape": (2, 3), "dtype": "no"}, r"Expected a dtype, got 'no' - at `dtype`"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(fastbn.ArgumentError, match=message):
        kernel_schedule(**arguments)
    with pytest.raises(fastbn.ArgumentError, match=message):
        bench_kernels(**arguments)


@pytest.mark.parametrize("seconds", [0, -1, True, "1", float("nan")])
def test_refused_seconds(seconds):
    with pytest.raises(fastbn.ArgumentError, match=r"Expected a number of seconds above 0, got .* - at `seconds`"):
        bench_kernels((2, 3), seconds=seconds)
    assert fastbn.get_num_threads() >= 1


def test_more_than_the_machine_has_is_refused_before_it_is_filled(monkeypatch):
    monkeypatch.setattr(kernel_bench, "_calls", lambda *arguments: pytest.fail("arrays are made"))
    with pytest.raises(MemoryError, match="four arrays"):
        bench_kernels((1 << 39, 1))


def test_threads_are_as_before_whatever_happens():
    fastbn.set_num_threads(3)
    bench_kernels((2, 3), seconds=0.001)
    assert fastbn.get_num_threads() == 3


def test_lines_have_columns_units_and_each_reason_once():
    bench = bench_kernels((2, 3, 8), seconds=0.001)
    first, head, *rows = kernel_lines(bench)
    assert re.fullmatch(r"2,3,8 float32, channels on axis 1, 192 bytes: a copy takes [\d.]+ us on one thread", first)
    assert head.split() == ["threads", "operation", "time", "copies", "sums", "results", "stores"]
    assert len({line.index(word) for line, word in zip([head, *rows[:3]], ["operation", *OPERATIONS], strict=True)}) == 1
    reasons = [line for line in rows if line.startswith("why  ")]
    assert len(set(reasons)) == len(reasons) == len({each for row in bench["timings"] for each in row["why"]})


def test_the_command(capsys):
    assert main(["bench-kernels", "2,3", "--seconds", "0.001", "--axis", "-1"]) == 0
    assert capsys.readouterr().out.startswith("2,3 float32, channels on axis 1")
    assert main(["bench-kernels", "2,x"]) == 2
    assert capsys.readouterr().err == "fastbn: Expected positive sizes, as 32,64,56,56, got '2,x' - at `SHAPE`\n"


@pytest.mark.parametrize(
    "words",
    [
        ["2x3x4"],
        ["(2,3,4)"],
        ["(2, 3, 4)"],
        ["[2, 3, 4,]"],
        ["2", "3", "4"],
        ["2,", "3,", "4"],
        [" 2 3 4 "],
        ["--axis", "-1", "2", "3", "4"],
    ],
)
def test_a_shape_as_people_write_it(words, capsys):
    assert main(["bench-kernels", *words, "--seconds", "0.001"]) == 0
    assert capsys.readouterr().out.startswith("2,3,4 float32")


@pytest.mark.parametrize("text", ["", "()", "(2,3", "2,3]", "2,,3", "2,3,", "2,(3)", "2x", "2,0", "-"])
def test_no_shape(text, capsys):
    assert main(["bench-kernels", text]) == 2
    assert capsys.readouterr().err == f"fastbn: Expected positive sizes, as 32,64,56,56, got {text!r} - at `SHAPE`\n"
