"""bench from Python: two models that cannot be timed side by side are one sentence."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from sketch import classifier, conv_bn, model

import fastbn
from fastbn.cli import main
from fastbn.errors import ArgumentError, ArgumentTypeError, ModelError
from fastbn.graph.bench import bench

PLAIN = "(float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu(x) }"

# What stands beside the classifier, and what is said of it.
OTHERS = {
    "another name": (PLAIN.replace("x)", "image)"), "the inputs x as the first model has them, got image"),
    "one more": (PLAIN.replace("x)", "x, float[3] k)", 1), "the inputs x as the first model has them, got x, k"),
    "none": ("() => (float[1] y) { y = Constant<value_floats=[1.0]>() }", "the inputs x as the first model has them, got none"),
    "another size": (PLAIN.replace("8,8", "9,9"), "onnxruntime does not run it on the inputs of the first model"),
    "another type": (PLAIN.replace("float", "double"), "onnxruntime does not run it on the inputs of the first model"),
    "an unknown operator": (PLAIN.replace("Relu", "Rectify"), "onnxruntime does not run it on the inputs of the first model"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_models_with_other_inputs(case, tmp_path, capsys):
    text, said = OTHERS[case]
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    paths[0].write_bytes(classifier().SerializeToString())
    paths[1].write_bytes(model(text).SerializeToString())
    others = said.startswith("the inputs ")
    kind = ArgumentError if others else ModelError
    with pytest.raises(kind) as caught:
        bench(paths[0], paths[1], runs=1)
    if others:
        assert str(caught.value) == f"Expected {said} - at `{paths[1]}`"
    else:
        assert str(caught.value).startswith(f"Cannot time '{paths[1]}': {said}: ")
    assert "\n" not in str(caught.value)
    assert main(["bench", *map(str, paths), "--runs", "1"]) == 2
    assert capsys.readouterr().err == f"fastbn: {caught.value}\n"


@pytest.mark.parametrize("missing", ["a", "b"])
def test_external_data_that_is_not_there(missing, tmp_path, capsys):
    for name in "ab":
        onnx.save(classifier(), tmp_path / f"{name}.onnx", save_as_external_data=True, location=f"{name}.data", size_threshold=0)
    (tmp_path / f"{missing}.data").unlink()
    paths = [str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")]
    assert main(["bench", *paths, "--runs", "1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastbn: Cannot use '{tmp_path / missing}.data': ")
    assert f"{missing}.data" in err
    assert err.count("\n") == 1
    with pytest.raises(fastbn.FastbnError):
        bench(*paths, runs=1)


def test_options_of_a_benchmark():
    for runs in (0, -1):
        with pytest.raises(ArgumentError, match=r"got .* - at `runs`"):
            bench(classifier(), runs=runs)
    for runs in (1.5, "3", None, True):
        with pytest.raises(ArgumentTypeError, match=r"Expected a whole number, got .* - at `runs`"):
            bench(classifier(), runs=runs)
    with pytest.raises(ArgumentTypeError, match="at `input_shapes`"):
        bench(classifier(), runs=1, input_shapes="x=1")
    with pytest.raises(ArgumentError, match="Expected positive sizes"):
        bench(classifier(), runs=1, input_shapes={"x": [0, 3, 8, 8]})


def test_inputs_with_values_of_their_own_need_no_feed():
    """An initializer that is also an input may be there on one side only, as --freeze-inputs leaves it."""
    free = conv_bn()
    free.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3]))
    for pair in ((free, conv_bn()), (conv_bn(), free)):
        rows = bench(*pair, runs=1)
        assert {row["model"] for row in rows} == {"original", "folded"}
        assert all(np.isfinite(row["median_ms"]) for row in rows)
