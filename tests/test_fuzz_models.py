"""Malformed and malicious models: each fold returns a result or raises one of fastbn's errors, prints nothing, and never ends the process.

Here are the first cases of each kind; `python tools/fuzz_models.py` has a hundred thousand. SECURITY.md has what came of them.
"""

import random
import sys
from pathlib import Path

import byte_faults
import fuzz_models
import onnx
import pytest
from byte_faults import Corpus

import fastbn

MODELS = [Path(__file__).parent / "models"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits of a worker need Linux")


@pytest.mark.parametrize(("kind", "cases"), [("bytes", 400), ("built", 400)])
def test_a_hostile_model_ends_in_a_result_or_an_error(kind, cases, environment, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    report = fuzz_models.fuzz({kind: range(cases)}, 1, MODELS, None)["kinds"][kind]
    assert report["wrong"] == []
    assert sum(report["ends"].values()) == cases
    # Some must fold: models that all fail a check would not test the code behind the checks.
    assert report["ends"]["result"] > cases // 8
    assert report["ends"]["error"] > cases // 8


# What a worker prints and does for each case, by its number.
WORKER = """
import json, os, signal, sys, time
kind, first, last, step = sys.argv[2], *map(int, sys.argv[3:6])
for seed in range(first, last, step):
    print(seed, flush=True)
    if seed == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed == 2:
        os.kill(os.getpid(), signal.SIGPROF)
    if seed == 3:
        held = b"x" * (400 << 20)
        time.sleep(60)
    if seed == 4:
        time.sleep(60)
    print(json.dumps({"end": "result" if seed else "traceback", "text": "", "seconds": 0.5, "bytes": seed}), flush=True)
"""


def test_whatever_ends_a_worker_is_noted_and_the_next_one_goes_on(tmp_path, monkeypatch, capsys):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(fuzz_models, "__file__", str(worker))
    monkeypatch.setattr(fuzz_models, "MOST_MEMORY", 200 << 20)
    monkeypatch.setattr(fuzz_models, "CLOCK_SECONDS", 2)
    report = fuzz_models.fuzz({"built": range(8)}, 1, [], tmp_path / "report.json")["kinds"]["built"]
    assert [(each["seed"], each["end"]) for each in report["wrong"]] == [
        (0, "traceback"),
        (1, "signal"),
        (2, "slow"),
        (3, "fat"),
        (4, "slow"),
    ]
    assert report["ends"]["result"] == 3
    assert report["largest"][-1] == (7, 7)
    assert "built:1 signal" in capsys.readouterr().out
    assert '"result": 3' in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize(
    ("failure", "end"),
    [
        (KeyError("x"), "traceback"),
        (MemoryError(), "fat"),
        (fastbn.ModelError("Expected x, got y - at `z`"), "error"),
    ],
)
def test_how_a_case_ends(failure, end, tmp_path, monkeypatch):
    def fold(*arguments, **options):
        raise failure

    monkeypatch.setattr(fuzz_models, "_by_command", fold)
    monkeypatch.setattr(fastbn, "fold", fold)
    assert fuzz_models.ending(None, "built", 3, tmp_path)[0] == end


def test_a_result_that_onnxruntime_refuses(tmp_path, small_cnn):
    class Result:
        def to_bytes(self):
            return b"no model"

    with pytest.raises(fuzz_models.Wrong) as caught:
        fuzz_models._check_validity(small_cnn.read_bytes(), small_cnn, Result())
    assert caught.value.kind == "invalid"
    fuzz_models._check_validity(b"no model", small_cnn, Result())


def test_a_seed_says_everything():
    corpus, again = Corpus(MODELS), Corpus(MODELS)
    for seed in (0, 1, 777, 5000):
        assert byte_faults.mutated(corpus, seed) == byte_faults.mutated(again, seed)
        assert fuzz_models.made(None, "built", seed) == fuzz_models.made(None, "built", seed)


def test_fields_are_read_and_written_as_they_are():
    corpus = Corpus(MODELS)
    for path in corpus.paths[::7]:
        data = corpus.bytes(path)
        assert byte_faults._bytes(byte_faults._fields(data, onnx.ModelProto.DESCRIPTOR)) == data


def test_mutations_reach_the_code_behind_the_parser():
    corpus = Corpus(MODELS)
    read = 0
    for seed in range(0, 10_000, 50):
        try:
            onnx.ModelProto.FromString(byte_faults.mutated(corpus, seed))
            read += 1
        except Exception:
            continue
    assert read > 100


def test_a_window_of_a_large_file_is_a_model():
    corpus = Corpus(MODELS)
    large = [path for path in corpus.paths if path.name == "torch_digits.onnx"]
    window = byte_faults._window(random.Random(1), corpus._inferred(large[0]))
    assert 0 < len(window.graph.node) <= 12
    assert fastbn.fold(window).parity is None or fastbn.fold(window).parity.ok
