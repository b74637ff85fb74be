"""Training batches shared by real processes over gloo: what one process would compute of the whole, or an error."""

import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("this torch has no gloo", allow_module_level=True)

import gloo  # noqa: E402

import fastbn.torch  # noqa: E402


def together(size, folder, task, environment):
    """Run a task in so many processes; return their exit codes and outputs."""
    command = [sys.executable, "-W", "ignore", gloo.__file__, str(size), str(folder), task]
    done = subprocess.run(command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=True)
    codes = json.loads(done.stdout)
    assert set(codes) <= {0, 3}, done.stderr
    return codes, [(folder / f"{rank}.txt").read_text(encoding="utf-8") for rank in range(size)]


def whole(dtype=torch.float32, **options):
    return gloo.steps(gloo.module(**options), lambda tensor: tensor, dtype)


@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_a_batch_give_what_the_whole_gives(size, tmp_path, environment):
    codes, outputs = together(size, tmp_path, "train", environment)
    assert set(codes) == {0}
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in range(size)]

    def joined(name, key):
        parts = [rank[f"{name}.{key}"] for rank in ranks]
        if key[:-1] in ("y", "dx"):
            return np.concatenate(parts)
        return np.sum(parts, axis=0) if key in ("dweight", "dbias") else parts[0]

    cases = {"world": whole(), "group": whole(momentum=None), "sync": whole(), "bfloat16": whole(torch.bfloat16)}
    for name, want in cases.items():
        # A unit of the type: the statistics of the parts and of the whole differ in their last bits only.
        unit = 2.0**-8 if name == "bfloat16" else 2.0**-23
        for key, values in want.items():
            scale = np.abs(values).max() if key[:-1] in ("y", "dx") or key.startswith("d") else np.abs(values)
            assert np.all(np.abs(joined(name, key) - values) <= 4 * unit * scale), (name, key)
    assert np.abs(ranks[1]["none.y0"] - ranks[1]["world.y0"]).max() > 0.01, "a part alone would have passed"

    for key in cases["world"]:
        for rank in ranks:
            assert rank[f"again.{key}"].tobytes() == rank[f"world.{key}"].tobytes(), key
            assert rank[f"sync.{key}"].tobytes() == rank[f"world.{key}"].tobytes(), key
            if key.startswith("running"):
                assert rank[f"world.{key}"].tobytes() == ranks[0][f"world.{key}"].tobytes(), key
    for output in outputs:
        # Two training steps, one exchange forward and one backward; eval mode asks nobody.
        assert "exchanges 4\n" in output
        assert "one value: Expected more than 1 value per channel when training, got 1 in all processes - at `input` 0\n" in output
        assert "twice: trying to differentiate twice a function that was marked with @once_differentiable\n" in output


@pytest.mark.parametrize(("task", "last"), [("die", 3), ("stay", 0)])
def test_a_missing_process_is_an_error(task, last, tmp_path, environment):
    codes, outputs = together(3, tmp_path, task, environment)
    assert codes == [0, 0, last]
    assert outputs[:2] == ["error True 0 True\n"] * 2


def test_without_torch_distributed():
    layer = gloo.module(process_group="world")
    with pytest.raises(fastbn.TensorError, match=r"Cannot share the batch with a process group: torch\.distributed is not initialized"):
        layer(torch.ones(2, 4, 3, 3))
    assert int(layer.num_batches_tracked) == 0
    layer.eval()(torch.ones(2, 4, 3, 3))
    converted = fastbn.torch.convert(gloo.module(torch.nn.SyncBatchNorm))
    assert torch.equal(converted(gloo.batch(0)[0]), gloo.module()(gloo.batch(0)[0]))
