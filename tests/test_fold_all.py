"""fold-all: each model in a process of its own; what fails costs only itself, and what is done is not done again."""

import contextlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from sketch import classifier, model, norm, normal

import fastbn
from fastbn import fold_all
from fastbn.cli import main
from fastbn.interrupts import in_order_of_end, submitted
from fastbn.zoo import job, task
from fastbn.zoo.names import entries


def good(seed=0):
    text = "(float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) { c = Conv (x, w) y = BatchNormalization (c, s, t, m, v) }"
    return model(text, w=normal(4, 3, 3, 3, seed=seed), **norm(4))


@pytest.fixture(name="zoo")
def _zoo(tmp_path):
    """Two good models, one that is none, and one below."""
    folder = tmp_path / "zoo"
    (folder / "below").mkdir(parents=True)
    onnx.save(good(), folder / "a.onnx")
    (folder / "broken.onnx").write_text("no model")
    (folder / "notes.txt").write_text("nothing")
    onnx.save(good(1), folder / "below" / "c.onnx", save_as_external_data=True, location="c.data", size_threshold=0)
    return folder


def by_name(zoo, folder):
    return {os.path.relpath(each.source, folder): each for each in zoo.outcomes}


def test_a_folder(zoo, tmp_path):
    told = []
    made = fold_all(zoo, tmp_path / "out", workers=2, progress=lambda done, count, last: told.append((done, count)))
    found = by_name(made, zoo)
    assert {name: each.status for name, each in found.items()} == {"a.onnx": "ok", "broken.onnx": "failed", "below/c.onnx": "ok"}
    assert (found["a.onnx"].before, found["a.onnx"].after) == (1, 0)
    assert found["a.onnx"].error <= found["a.onnx"].allowed
    assert found["broken.onnx"].reason.startswith("Expected an ONNX model, got bytes that are none - at `")
    assert sorted(told) == [(done, 3) for done in range(4)]
    for name in ("a.onnx", "below/c.onnx"):
        (tmp_path / "one").mkdir(exist_ok=True)
        fastbn.fold(zoo / name).save(tmp_path / "one" / "model.onnx")
        mine, other = (onnx.load(path) for path in (tmp_path / "out" / name, tmp_path / "one" / "model.onnx"))
        assert mine.SerializeToString() == other.SerializeToString()
    assert not (tmp_path / "out" / "broken.onnx").exists()
    assert "3 models: 2 ok, 1 failed; BatchNormalization 2 -> 0" in str(made)


def test_a_second_run_skips_what_is_the_same(zoo, tmp_path):
    fold_all(zoo, tmp_path / "out", workers=2)
    with open(tmp_path / "out" / "fold-all.jsonl", "a", encoding="utf-8") as file:
        file.write('{"half a li')
    onnx.save(good(7), zoo / "below" / "c.onnx")
    found = by_name(fold_all(zoo, tmp_path / "out", workers=2), zoo)
    assert {name: each.status for name, each in found.items()} == {"a.onnx": "there", "broken.onnx": "failed", "below/c.onnx": "ok"}
    assert found["a.onnx"].before == 1
    (tmp_path / "out" / "a.onnx").unlink()
    assert by_name(fold_all(zoo / "a.onnx", tmp_path / "out"), zoo)["a.onnx"].status == "ok"
    for options in ({"options": ["--freeze-inputs"]}, {"again": True}):
        assert by_name(fold_all(str(zoo / "a.on*"), tmp_path / "out", **options), zoo)["a.onnx"].status == "ok"
    assert by_name(fold_all(zoo / "a.onnx", tmp_path / "out", options=["--freeze-inputs"]), zoo)["a.onnx"].status == "ok"


def test_what_fails_costs_only_itself(zoo, tmp_path, monkeypatch):
    fault = "import json, sys\npath = json.loads(sys.argv[1])[2]\nif path[0].startswith('import '): exec(path[0])\n"
    program = fault + task.PROGRAM
    faults = {
        "a.onnx": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "below/c.onnx": "import time; time.sleep(60)",
    }
    monkeypatch.setattr(task, "PROGRAM", program)
    started = subprocess.Popen

    def popen(command, **options):
        memory, arguments, path = json.loads(command[-1])
        fault = next((fault for name, fault in faults.items() if arguments[1].endswith(name)), None)
        path = [fault, *path] if fault else path
        return started([*command[:-1], json.dumps([memory, arguments, path])], **options)

    monkeypatch.setattr(task.subprocess, "Popen", popen)
    onnx.save(good(), zoo / "d.onnx")
    found = by_name(fold_all(zoo, tmp_path / "out", workers=4, timeout=20), zoo)
    assert {name: each.status for name, each in found.items()} == {
        "a.onnx": "crashed",
        "broken.onnx": "failed",
        "below/c.onnx": "time",
        "d.onnx": "ok",
    }
    assert found["a.onnx"].reason == "its process was ended by SIGKILL"
    assert found["below/c.onnx"].reason == "it takes more than 20 s; --timeout may give it more"


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of memory that holds")
def test_a_limit_of_memory(tmp_path, monkeypatch):
    onnx.save(good(), tmp_path / "a.onnx")
    monkeypatch.setattr(job, "LEAST_MEMORY", 1)
    (outcome,) = fold_all(tmp_path / "a.onnx", tmp_path / "out", memory="60M").outcomes
    assert outcome.status in ("failed", "crashed")
    assert outcome.reason
    monkeypatch.setattr(task, "PROGRAM", "import sys; sys.exit(1)")
    assert fold_all(tmp_path / "a.onnx", tmp_path / "out").outcomes[0].status == "failed", "1 without a report is no parity"


@pytest.mark.parametrize("memory", [1, "1", "255M", 255 << 20])
def test_memory_in_which_no_model_folds_is_one_error(memory, tmp_path):
    with pytest.raises(fastbn.ArgumentError, match=r"^Expected 256M or more, or 0 for all there is, got \w+ - at `memory`$"):
        fold_all(tmp_path / "a.onnx", tmp_path / "out", memory=memory)


def test_what_is_missing_is_said_before_any_model_is_folded(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "fold_one", None)
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["fold-all", str(zoo), "--out", str(tmp_path / "out"), "--scheduler", "tcp://127.0.0.1:1"]) == 2
    reason = "Cannot use a cluster: distributed is not installed (pip install dask distributed); --workers 0 works without it"
    assert capsys.readouterr().err == f"fastbn: {reason}\n"
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert main(["fold-all", str(zoo), "--out", "s3://bucket/out"]) == 2
    assert capsys.readouterr().err == "fastbn: Cannot use a URL: fsspec is not installed (pip install fsspec)\n"
    monkeypatch.undo()
    if importlib.util.find_spec("fsspec"):
        assert main(["fold-all", str(zoo), "--out", "nothing://bucket/out"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_no_workers_is_one_after_the_other(tmp_path, monkeypatch):
    pools = []
    monkeypatch.setattr(job, "ThreadPoolExecutor", lambda workers: pools.append(workers) or ThreadPoolExecutor(workers))
    onnx.save(good(), tmp_path / "a.onnx")
    assert fold_all(tmp_path / "a.onnx", tmp_path / "out", workers=0).outcomes[0].status == "ok"
    assert pools == [1]


def test_the_summary_is_printed_once(zoo, tmp_path, capsys):
    line = ["fold-all", str(zoo), "--out", str(tmp_path / "out")]
    assert main([*line, "--workers", "2"]) == 4
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("3 models: 2 ok, 1 failed; ")
    *steps, last = err.splitlines()
    assert [step.split()[1] for step in steps] == ["1/3", "2/3", "3/3"]
    assert last == "fastbn: not every model is folded and verified (exit code 4)"
    assert main([*line, "-q"]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastbn: not every model is folded and verified: 3 models: 1 failed, 2 there; ")


def test_names_that_collide_are_found_first(zoo, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    onnx.save(good(3), other / "A.onnx")
    with pytest.raises(fastbn.ArgumentError, match=r"^Cannot fold both '.*a\.onnx' and '.*A\.onnx': they would get the same name"):
        fold_all([zoo, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(entries([str(zoo), str(zoo / "a.onnx")], str(tmp_path / "out"))) == 3
    with pytest.raises(fastbn.ArgumentError, match=r"^Cannot write '.*a\.onnx': it is one of the models that are read$"):
        fold_all(zoo, zoo)
    with pytest.raises(fastbn.StorageError, match=r"no \.onnx file lies in it or below$"):
        fold_all(_empty(tmp_path), tmp_path / "out2")
    with pytest.raises(fastbn.StorageError, match=r"^Cannot read '.*nothing\.onnx': no such file or folder$"):
        fold_all(tmp_path / "nothing.onnx", tmp_path / "out")
    for wrong, error in (([], ValueError), ([3], TypeError)):
        with pytest.raises(error, match="at `sources`"):
            fold_all(wrong, tmp_path / "out")


def _empty(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def test_folders_that_lead_back_are_not_entered(zoo, tmp_path):
    (zoo / "below" / "loop").symlink_to(zoo)
    (zoo / "out").mkdir()
    onnx.save(good(), zoo / "out" / "a.onnx")  # of an earlier run
    for out in (str(zoo / "out"), f"{zoo}/below/../out/"):
        assert sorted(each.name for each in entries([str(zoo)], out)) == ["a.onnx", "below/c.onnx", "broken.onnx"]
    assert len(entries([str(zoo)], str(tmp_path / "out"))) == 4


def test_the_command(zoo, tmp_path, capsys):
    assert main(["fold-all", str(zoo), "--out", str(tmp_path / "out"), "--workers", "2", "--json", str(tmp_path / "rows.jsonl")]) == 4
    out, err = capsys.readouterr()
    assert err.endswith("\nfastbn: not every model is folded and verified (exit code 4)\n")
    assert "3 models: 2 ok, 1 failed; BatchNormalization 2 -> 0" in out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed"]
    assert main(["fold-all", str(zoo / "a.onnx"), "--out", str(tmp_path / "out"), "-q", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "there"


def test_parity_that_fails_gives_exit_code_1(tmp_path, monkeypatch):
    onnx.save(good(), tmp_path / "a.onnx")
    report = {"batch_normalizations": {"before": 1, "after": 0}, "parity": {"error": 1.0, "allowed": 0.5}, "written": []}
    program = f"import sys, json; open(json.loads(sys.argv[1])[1][4], 'w').write({json.dumps(report)!r}); sys.exit(1)"
    monkeypatch.setattr(task, "PROGRAM", program)
    assert main(["fold-all", str(tmp_path / "a.onnx"), "--out", str(tmp_path / "out"), "-q"]) == 1


def test_urls(tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed: the extra [cluster] brings it")
    memory = fsspec.filesystem("memory")
    onnx.save(good(1), tmp_path / "c.onnx", save_as_external_data=True, location="c.data", size_threshold=0)
    try:
        for name in ("c.onnx", "c.data"):
            memory.pipe_file(f"/zoo/below/{name}", (tmp_path / name).read_bytes())
        (outcome,) = fold_all("memory://zoo", "memory://folded").outcomes
        assert (outcome.status, outcome.before, outcome.after) == ("ok", 1, 0), outcome
        for path in memory.find("/folded"):
            (tmp_path / os.path.basename(path)).write_bytes(memory.cat_file(path))
        assert "BatchNormalization" not in [node.op_type for node in onnx.load(tmp_path / "c.onnx").graph.node]
    finally:
        memory.store.clear()


def test_an_interrupt_ends_the_processes(tmp_path, environment):
    for number in range(6):
        onnx.save(classifier(), tmp_path / f"{number}.onnx")
    command = [sys.executable, "-m", "fastbn", "fold-all", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "2"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stderr.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.endswith("fastbn: interrupted, nothing written\n")
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False)
    assert left.stdout == ""


def interrupting(point):
    """Return a trace function that interrupts at a line, by its number among those that run, of what waits for threads."""
    left = itertools.count()

    def trace(frame, event, argument):
        if frame.f_code.co_filename.endswith(("_base.py", "thread.py", "interrupts.py")):
            may_come = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is deferred
            if event == "line" and may_come and next(left) == point:
                raise KeyboardInterrupt
        return trace

    return trace


def test_an_interrupt_at_any_moment_leaves_threads_that_end():
    """With concurrent.futures.wait or as_completed in the place of in_order_of_end, a lock stays taken that the threads wait for."""
    before = sys.gettrace()
    for point in itertools.count():
        pool, is_interrupted = ThreadPoolExecutor(2), True
        jobs = [submitted(pool, time.sleep, 0.001) for _ in range(4)]
        with contextlib.suppress(KeyboardInterrupt):
            sys.settrace(interrupting(point))
            try:
                ended = [job.result() for job in in_order_of_end(jobs)]
                is_interrupted = False
            finally:
                sys.settrace(before)
        ending = threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": True}, daemon=True)
        ending.start()
        ending.join(20)
        assert not ending.is_alive(), point
        if not is_interrupted:
            break
    assert ended == [None] * 4
    assert point > 20


def test_on_a_cluster(zoo, tmp_path, environment):
    distributed = pytest.importorskip("distributed", reason="dask is not installed: the extra [cluster] brings it")
    from cluster_tasks import Scheduler

    with Scheduler(tmp_path, environment) as scheduler:
        scheduler.add_worker()
        with distributed.Client(scheduler.address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=60)
        found = by_name(fold_all(zoo, tmp_path / "out", scheduler=scheduler.address, jobs=2), zoo)
    assert {name: each.status for name, each in found.items()} == {"a.onnx": "ok", "broken.onnx": "failed", "below/c.onnx": "ok"}
    assert np.isfinite(found["a.onnx"].seconds)
