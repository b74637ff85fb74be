"""A re-estimation on real processes: the same bits for any number of them, in any order, with some killed; and what cannot be used."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

distributed = pytest.importorskip("distributed", reason="dask is not installed: the extra [cluster] brings it")

import dask.array  # noqa: E402
import dask.bag  # noqa: E402
import onnx  # noqa: E402
from cluster_tasks import Scheduler, deadly, executed, forget_runtime, set_version, wait_until  # noqa: E402
from sketch import model, norm  # noqa: E402
from statistics_truth import branches, images  # noqa: E402

import fastbn  # noqa: E402
from fastbn import reestimate  # noqa: E402
from fastbn.cli import main  # noqa: E402
from fastbn.cluster import connection  # noqa: E402
from fastbn.reestimation import cluster as tasks  # noqa: E402

X = images(60)
MODEL = branches().SerializeToString()
W = np.eye(1000, dtype=np.float32)


def bits(result):
    return {name: (stats.count, stats.mean.tobytes(), stats.m2.tobytes()) for name, stats in result.statistics.items()}


@pytest.fixture(name="wanted", scope="module")
def _wanted():
    """What this process computes alone."""
    return {mode: bits(reestimate(MODEL, X, batch=4, mode=mode)) for mode in ("population", "one-pass")}


@pytest.fixture(name="client", scope="module")
def _client():
    """A client of two processes on this machine."""
    options = {"n_workers": 2, "threads_per_worker": 1, "host": "127.0.0.1", "silence_logs": 50}
    options["scheduler_kwargs"] = {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    with distributed.LocalCluster(processes=True, **options) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        yield client
    assert multiprocessing.active_children() == []


def scaled(client, count):
    client.cluster.scale(count)
    wait_until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == count)


def test_an_interrupt_ends_workers_before_their_cluster_is_closed(monkeypatch):
    """Closing waits for what they do; here that is nothing that ever ends."""
    ended = []
    close = distributed.LocalCluster.close

    def closing(cluster, *arguments, **options):
        wait_until(lambda: not any(map(is_running, pids)))
        ended.append(True)
        return close(cluster, *arguments, **options)

    monkeypatch.setattr(distributed.LocalCluster, "close", closing)
    pids = []

    def interrupted():
        with connection.connected(1, None, None) as own:
            pids.extend(own.run(os.getpid).values())
            own.submit(time.sleep, 10**6, pure=False)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(pids) == len(ended) == 1


def is_running(pid):
    """Say whether a process runs; one that is dead and not yet waited for does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_any_number_of_workers_gives_the_same_bits(client, wanted):
    for count in (1, 2, 3, 5, 2):
        scaled(client, count)
        result = reestimate(MODEL, X, batch=4, client=client)
        assert bits(result) == wanted["population"]
        assert (result.workers, result.samples, result.partitions) == (count, 60, 15)
    assert bits(reestimate(MODEL, X, batch=4, client=client, mode="one-pass")) == wanted["one-pass"]


def test_whatever_is_kept(client, wanted):
    for memory in (0, 40_000, 150_000):
        assert bits(reestimate(MODEL, X, batch=4, client=client, memory=memory)) == wanted["population"]


def test_tasks_of_many_partitions(client, wanted, monkeypatch):
    monkeypatch.setattr(tasks, "MOST_TASKS", 3)
    assert tasks.width_of(15) == 32
    assert tasks.width_of(3) == 1
    many = {mode: bits(reestimate(MODEL, X, batch=1, mode=mode)) for mode in wanted}
    for memory in (0, 1 << 20):
        assert bits(reestimate(MODEL, X, batch=1, client=client, memory=memory)) == many["population"]
    assert bits(reestimate(MODEL, X, batch=1, client=client, mode="one-pass")) == many["one-pass"]


def test_all_workers_work_though_one_has_the_weights(client):
    """dask prefers the worker that has what a task needs, and moves a weight of 4 MB only where that is worth its time."""
    proto = model(
        "(float[n, 1000] x) => (float[n, 1000] y) { z = MatMul (x, w) y = BatchNormalization (z, s, t, m, v) }", w=W, **norm(1000)
    )
    before = client.run(executed)
    reestimate(proto, np.zeros((64, 1000), np.float32), batch=1, client=client)
    assert min(count - before[address] for address, count in client.run(executed).items()) > 32


def test_workers_that_are_killed_change_no_bit(client, wanted, monkeypatch):
    from fastbn.cluster import connection

    monkeypatch.setattr(connection, "LOOK", 0.005)
    pids = set(client.run(os.getpid).values())
    ended = []

    def kill(number, total, step, detail):
        if step.startswith("level") and detail and not detail.startswith("15") and number not in ended and len(ended) < 2:
            ended.append(number)
            os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)

    assert bits(reestimate(MODEL, X, batch=4, client=client, progress=kill)) == wanted["population"]
    assert len(ended) == 2
    wait_until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 2)
    assert len(pids & set(client.run(os.getpid).values())) <= 1


def test_a_look_at_the_progress_cuts_no_transfer(client, monkeypatch):
    from fastbn.cluster import connection

    monkeypatch.setattr(connection, "LOOK", 0.003)
    for number in range(30):  # a result that arrives while its time is up, in one of two
        future = client.submit(bytes, (1 << 22) + number, pure=False)
        assert len(connection.wait_for(future, [future], lambda done, count: None)) == (1 << 22) + number


def test_collections_of_dask(client, wanted):
    array = dask.array.from_array(X, chunks=(7, 3, 4, 8))
    for memory in (0, 1 << 20):
        assert bits(reestimate(MODEL, array, batch=4, client=client, memory=memory)) == wanted["population"]
    bag = dask.bag.from_sequence([{"x": part} for part in np.split(X, 15)], npartitions=15)
    assert bits(reestimate(MODEL, bag, batch=4, client=client)) == wanted["population"]


def test_files_are_read_by_the_workers(client, wanted, tmp_path):
    np.savez_compressed(tmp_path / "x.npz", x=X)
    assert bits(reestimate(MODEL, tmp_path / "x.npz", batch=4, client=client)) == wanted["population"]
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-64])
    with pytest.raises(fastbn.StorageError, match=r"^Expected \d+ bytes more, got \d+ - at `.*x\.npy`$"):
        reestimate(MODEL, tmp_path / "x.npy", batch=4, client=client)


def test_errors_name_the_sample(client):
    bad = X.copy()
    bad[37, 0, 0, 0] = np.nan
    with pytest.raises(fastbn.ArgumentError, match=r"^Expected finite values, got NaN in 'x' - at `sample 37 of data`$"):
        reestimate(MODEL, bad, batch=4, client=client)
    proto = model("(float[N, 2] x) => (float[N, 2] y) { z = Expand (x, big) f = Flatten (z) y = BatchNormalization (f, s, t, m, v) }",
                  big=np.int64([1 << 40, 1, 2]), **norm(2))  # fmt: skip
    with pytest.raises(
        fastbn.FastbnError, match=r"^Cannot go on with samples 0 to 3 of data: the memory of a worker does not suffice; a smal"
    ):
        reestimate(proto, np.zeros((4, 2), np.float32), client=client)


def test_a_partition_that_ends_every_worker_is_named(client, monkeypatch):
    scheduler = client.cluster.scheduler
    monkeypatch.setattr(scheduler, "allowed_failures", 0)
    bag = dask.bag.from_sequence([{"x": X}], npartitions=1).map(deadly)
    with pytest.raises(fastbn.FastbnError, match=r"^Cannot go on with .*: it ended one worker after the other; most likely their memory"):
        reestimate(MODEL, bag, client=client)
    wait_until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 2)


def test_workers_that_cannot_be_used(client):
    address = next(iter(client.scheduler_info(n_workers=-1)["workers"]))
    try:
        version = client.run(set_version, "9.9.9", workers=[address])[address]
        with pytest.raises(
            fastbn.FastbnError, match=rf"^Cannot use the worker at {address}: it has fastbn 9\.9\.9, and this process {version}$"
        ):
            reestimate(MODEL, X, client=client)
    finally:
        client.run(set_version, fastbn.__version__, workers=[address])
    client.run(forget_runtime, True, workers=[address])
    with pytest.raises(fastbn.FastbnError, match=rf"^Cannot use the worker at {address}: onnx or onnxruntime is not installed there"):
        reestimate(MODEL, X, client=client)
    client.run(forget_runtime, False, workers=[address])
    with pytest.raises(fastbn.ArgumentError, match=r"^Expected a distributed\.Client, got str - at `client`$"):
        reestimate(MODEL, X, client="tcp://127.0.0.1:1")


def test_a_scheduler_with_workers_of_its_own(tmp_path, environment, wanted, capsys):
    onnx.save(branches(), tmp_path / "in.onnx")
    np.save(tmp_path / "x.npy", X)
    with Scheduler(tmp_path, environment) as scheduler:
        command = ["reestimate", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--data", str(tmp_path / "x.npy"), "--batch", "4"]
        assert main([*command, "--scheduler", scheduler.address]) == 2
        assert capsys.readouterr().err.endswith(f"fastbn: Cannot use the scheduler at '{scheduler.address}': it has no workers\n")
        for _ in range(2):
            scheduler.add_worker()
        ended = []

        def kill(number, total, step, detail):
            if step.startswith("level 2") and not ended:
                ended.append(scheduler.workers[0].kill())

        with distributed.Client(scheduler.address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            assert bits(reestimate(MODEL, X, batch=4, scheduler=scheduler.address, progress=kill)) == wanted["population"]
            assert len(ended) == 1
        assert main([*command, "--scheduler", scheduler.address, "-q"]) == 0
        assert main([*command[:2], str(tmp_path / "own.onnx"), *command[3:], "--workers", "0", "-q"]) == 0
        assert (tmp_path / "own.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_a_scheduler_that_cannot_be_reached(tmp_path, capsys, monkeypatch):
    onnx.save(branches(), tmp_path / "in.onnx")
    np.save(tmp_path / "x.npy", X)
    with socket.socket() as taken:  # bound and not listening: nobody answers there
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        command = ["reestimate", str(tmp_path / "in.onnx"), str(tmp_path / "out.onnx"), "--data", str(tmp_path / "x.npy"), "-q"]
        began = time.monotonic()
        assert main([*command, "--scheduler", address]) == 2
        assert time.monotonic() - began < 10
    error = capsys.readouterr().err
    assert error.startswith(f"fastbn: Cannot reach the scheduler at '{address}': ")
    assert error.count("\n") == 1
    monkeypatch.setattr("distributed.Client", None)  # one that is not made in the end waits when it is removed
    for nonsense in ("nonsense", "", "tcp://"):
        assert main([*command, "--scheduler", nonsense]) == 2
        assert capsys.readouterr().err.startswith(f"fastbn: Cannot reach the scheduler at '{nonsense}': missing port number")
    assert not (tmp_path / "out.onnx").exists()


SCRIPT = """
import sys, fastbn
result = fastbn.reestimate(sys.argv[1], sys.argv[2], batch=4, workers=2)
print("done")
"""


def test_processes_that_are_started_here(tmp_path, environment, wanted):
    """The command with its own workers, interrupted once and then left alone: nothing half written, and no process is left."""
    psutil = pytest.importorskip("psutil")
    onnx.save(branches(), tmp_path / "in.onnx")
    np.save(tmp_path / "x.npy", X)
    command = [sys.executable, "-m", "fastbn", "reestimate", "in.onnx", "out.onnx", "--data", "x.npy", "--batch", "4", "--workers", "2"]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**environment, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stderr.readline() for _ in range(2)]
        assert lines[-1].startswith("fastbn: 2/6 level 1 of 4"), lines
        children = psutil.Process(process.pid).children(recursive=True)
        # Under this name a later run removes what a killed one leaves.
        assert any(path.name.startswith(".fastbn-") for path in temporary.iterdir())
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.endswith("fastbn: interrupted, nothing written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "tmp", "x.npy"]
    assert not any(path.name.startswith(".fastbn-") for path in temporary.iterdir())
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=20)[1] == []

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "60 samples in 15 partitions by 2 workers" in done.stdout
    assert [line.split()[1] for line in done.stderr.splitlines()] == [f"{number}/6" for number in range(1, 7)]
    assert onnx.load(tmp_path / "out.onnx").SerializeToString() == reestimate(MODEL, X, batch=4).model.SerializeToString()


def test_a_script_without_a_guard_is_told(tmp_path, environment):
    onnx.save(branches(), tmp_path / "in.onnx")
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", "in.onnx", "x.npy"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert 'put the call under `if __name__ == "__main__":`' in done.stderr


def test_without_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    message = r"^Cannot use a cluster: distributed is not installed \(pip install dask distributed\); --workers 0 works without it$"
    with pytest.raises(fastbn.FastbnError, match=message):
        reestimate(MODEL, X, workers=2)
