"""import fastbn: what it loads, what it offers, its version."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import fastbn

# The names that other people's scripts rely on, as far as they are built.
NAMES = {"fold", "fold_conv", "fold_linear", "verify", "Fold", "FoldResult", "Kept", "Parity", "show_config", "kernels", "__version__"}
NAMES |= {"batch_norm", "batch_norm_train", "batch_norm_backward", "batch_stats", "merge_stats", "BatchStats"}
NAMES |= {"Deployment", "deploy", "Reestimation", "reestimate", "Zoo", "fold_all"}
NAMES |= {"bench_kernels", "kernel_schedule", "BatchNorm", "set_num_threads", "get_num_threads", "use_isa"}
ERRORS = {"FastbnError", "ArgumentError", "ArgumentTypeError", "FoldError", "ModelError", "ParityError", "StorageError", "TensorError"}


def python(code, environment):
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def test_import_loads_numpy_and_nothing_else(environment):
    code = "import sys, json; import numpy; before = set(sys.modules); import fastbn; print(json.dumps(sorted(set(sys.modules) - before)))"
    loaded = python(code, environment)
    assert not {name.split(".")[0] for name in loaded} & {
        "onnx",
        "onnxruntime",
        "ml_dtypes",
        "torch",
        "google",
        "tensorflow",
        "dask",
        "distributed",
        "fsspec",
    }
    assert not [
        name
        for name in loaded
        if name.startswith(("fastbn.graph", "fastbn.deployment", "fastbn.cluster", "fastbn.reestimation", "fastbn.zoo"))
    ]
    others = {name.split(".")[0] for name in loaded} - {"fastbn"} - set(sys.stdlib_module_names)
    assert {name for name in others if "cython" not in name.lower()} == set()


def test_array_functions_and_configuration_work_without_onnx(environment):
    code = (
        "import sys, json; sys.modules['onnx'] = sys.modules['onnxruntime'] = None; import fastbn, numpy;"
        "w, b = fastbn.fold_linear(numpy.ones((2, 3)), None, [0, 1.0], [1, 1.0]); fastbn.show_config();"
        "try_fold = fastbn.cli if hasattr(fastbn, 'cli') else __import__('fastbn.cli', fromlist=['main']);"
        "print(json.dumps([w.shape, try_fold.main(['fold', 'x.onnx', '-q'])]))"
    )
    assert python(code, environment) == [[2, 3], 2]


def test_hints_name_no_package_that_anybody_could_claim():
    """fastbn is not on the index: what is installed by name is what the extras name."""
    folder = Path(fastbn.__file__).parent
    hints = [hint for path in folder.rglob("*.py") for hint in re.findall(r"\(pip install ([^)]*)\)", path.read_text(encoding="utf-8"))]
    assert {name for hint in hints for name in hint.split()} == {"onnx", "onnxruntime", "jinja2", "pandas", "dask", "distributed", "fsspec"}
    root = Path(__file__).resolve().parents[1]
    texts = [path for path in [*root.glob("*.md"), *root.glob("docs/*")] if path.suffix in (".md", ".yml")]
    assert [path.name for path in texts if re.search(r"pip install [^\n]*[ \"']fastbn\b", path.read_text(encoding="utf-8"))] == []


def test_without_onnx_the_graph_wing_says_what_to_install(environment):
    code = (
        "import sys, json; sys.modules['onnx'] = None; import fastbn\n"
        "try: fastbn.fold\n"
        "except fastbn.FastbnError as error: print(json.dumps(str(error)))"
    )
    assert python(code, environment).startswith("Cannot read models: onnx is not installed (pip install onnx onnxruntime)")


def test_a_dry_run_loads_no_onnxruntime(environment, small_cnn):
    code = (
        "import sys, json, contextlib, io; from fastbn.cli import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()): code = main(['fold', {str(small_cnn)!r}, '--dry-run'])\n"
        "print(json.dumps([code, 'onnxruntime' in sys.modules]))"
    )
    assert python(code, environment) == [0, False]


def test_public_names():
    assert set(fastbn.__all__) == NAMES | ERRORS
    for name in fastbn.__all__:
        assert getattr(fastbn, name) is not None
        assert name in dir(fastbn)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fastbn.nothing  # noqa: B018


def test_errors_are_also_the_builtin_ones():
    values = ("ArgumentError", "FoldError", "ModelError", "ParityError")
    kinds = {**dict.fromkeys(values, ValueError), "ArgumentTypeError": TypeError}
    for name, kind in {**kinds, "StorageError": OSError}.items():
        assert issubclass(getattr(fastbn, name), (kind, fastbn.FastbnError))
        assert issubclass(getattr(fastbn, name), kind)
        assert issubclass(getattr(fastbn, name), fastbn.FastbnError)


def test_the_version_is_the_installed_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastbn.__version__)
    assert fastbn.show_config()["version"] == fastbn.__version__
    try:
        installed = metadata.version("fastbn")
    except metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed")
    assert installed == fastbn.__version__


def test_the_package_says_that_it_is_typed():
    assert (Path(fastbn.__file__).parent / "py.typed").is_file()


def test_show_config_fits_into_json():
    config = fastbn.show_config()
    assert json.loads(json.dumps(config)) == config
    assert {"version", "numpy", "onnx", "onnxruntime", "machine", "cpus"} <= set(config)
    assert fastbn.kernels()


def test_a_source_folder_that_is_not_built_says_so(tmp_path, environment):
    copied = shutil.copytree(Path(fastbn.__file__).parent, tmp_path / "fastbn", ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    environment = {**environment, "PYTHONPATH": str(tmp_path)}
    # An editable installation would find the compiled part of the folder that it stands for.
    code = "import sys; sys.meta_path[:] = [each for each in sys.meta_path if 'Editable' not in str(each)]; import fastbn"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    last = done.stderr.splitlines()[-1]
    reason = "it is not built in this source folder: start elsewhere, or run `pip install -e .` here"
    assert last == f"ImportError: Cannot load the compiled part of fastbn from '{copied}': {reason}"


def test_a_missing_numpy_is_named(environment):
    code = "import sys; sys.modules['numpy'] = None; import fastbn"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    start = f"ImportError: Cannot load the compiled part of fastbn from '{Path(fastbn.__file__).parent}': "
    assert done.stderr.splitlines()[-1] == start + "NumPy is not installed"


def test_an_editable_installation_is_a_path():
    """With this setting alone: else it is a finder, which comes after folders, such as a clone called fastbn where Python starts."""
    options = tomllib.loads(Path(__file__).resolve().parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))
    assert options["tool"]["setuptools"]["package-dir"] == {"": "."}
