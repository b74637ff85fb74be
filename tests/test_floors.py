"""Floors of files: each imports only from lower ones, and onnx and onnxruntime only where they belong; CONTRIBUTING.md names every file."""

import ast
import re
import sys
from pathlib import Path

import pytest

import fastbn

PACKAGE = Path(fastbn.__file__).resolve().parent

# Lowest first; the files of one floor do not know each other.
FLOORS = [
    ["_types"],
    ["_native", "errors", "interrupts", "memory"],
    ["masks", "sizes"],
    ["dtypes", "geometry", "stats"],
    ["affine", "_check", "sync"],
    ["reference", "config", "folding", "conversion"],
    ["any_arrays"],
    ["functional", "backward_halves"],
    ["kernel_bench", "layers", "_torch.__init__"],
    ["_torch.threads"],
    ["_torch.kernels"],
    ["_torch.distributed"],
    ["_torch.operators", "_torch.population", "_torch.inventory"],
    ["_torch.autograd"],
    ["torch"],
    ["keras.callbacks"],
    ["keras.torch", "keras.jax", "keras.tensorflow"],
    ["keras.layer"],
    ["keras.conversion", "keras.folding"],
    ["keras.__init__"],
    ["graph.model.__init__", "graph.ops.__init__", "graph.planner.__init__", "graph.rewrite.__init__", "graph.parity.__init__"],
    ["graph.intervals", "graph.digests", "graph.reasons", "graph.ranges", "graph.model.element_types", "graph.model.files"],
    ["graph.model.nesting", "graph.ops.affine"],
    ["graph.model.external"],
    ["graph.model.objects"],
    ["graph.model.storage"],
    ["graph.results", "graph.runtime", "graph.model.node", "graph.model.schemas", "graph.rewrite.destination"],
    ["graph.report", "graph.model.constant", "graph.ops.shape_rules", "graph.rewrite.workdir"],
    ["graph.model.quantized"],
    ["graph.ops.row", "graph.rewrite.replacement", "graph.rewrite.data_files"],
    ["graph.ops.placing", "graph.ops.weighted"],
    ["graph.ops.identity"],
    ["graph.ops.multiples"],
    [
        "graph.ops.activation",
        "graph.ops.convolution",
        "graph.ops.einsum",
        "graph.ops.layout",
        "graph.ops.matmul",
        "graph.ops.normalization",
        "graph.ops.parts",
        "graph.ops.pooling",
        "graph.ops.quantization",
        "graph.ops.recurrent",
        "graph.ops.selection",
        "graph.ops.shape_reading",
    ],
    ["graph.ops.elementwise"],
    ["graph.ops.registry"],
    ["graph.model.evaluation", "graph.model.sequences"],
    ["graph.model.extent", "graph.model.loops"],
    ["graph.model.expressions"],
    ["graph.model.sizes"],
    ["graph.model.cropping"],
    ["graph.model.shapes"],
    ["graph.model.index"],
    ["graph.rewrite.version", "graph.planner.plan", "graph.planner.record"],
    ["graph.planner.guard"],
    ["graph.planner.view"],
    ["graph.planner.search", "graph.planner.representable", "graph.planner.kept"],
    ["graph.planner.meeting"],
    ["graph.planner.substitute"],
    ["graph.planner.placement"],
    ["graph.planner.planning"],
    ["graph.planner.advice", "graph.captions"],
    ["graph.drawing"],
    ["graph.notebook"],
    ["graph.rewrite.consistency", "graph.rewrite.draft", "graph.rewrite.inference"],
    ["graph.rewrite.output"],
    ["graph.rewrite.writer"],
    ["graph.parity.survival"],
    ["graph.parity.feeds", "graph.parity.difference", "graph.parity.reach"],
    ["graph.parity.comparable", "graph.parity.probe", "graph.parity.verdict"],
    ["graph.parity.fold_parity", "graph.parity.noise"],
    ["graph.parity.reference"],
    ["graph.parity.branches", "graph.parity.cuts"],
    ["graph.parity.model_parity"],
    ["graph.fold_result", "graph.options"],
    ["graph.job"],
    ["graph.timing", "graph.passes", "graph.olive", "exported.result"],
    ["graph.bench"],
    ["graph.__init__"],
    ["exported.__init__", "exported.variables", "_torch.replacements"],
    ["exported.job", "exported.torch_graph", "exported.torch_modules", "exported.keras_nodes", "exported.keras_copy"],
    ["exported.torch_parity", "exported.keras_parity", "exported.keras_layers"],
    ["exported.keras_graph"],
    ["exported.torch_fold", "exported.keras_fold"],
    ["deployment.recipe", "deployment.equalization", "deployment.synthetic", "deployment.bn_statistics"],
    ["deployment.trade_off", "deployment.equalization_trial"],
    ["cluster.__init__"],
    ["cluster.connection", "cluster.locations"],
    [
        "deployment.data_free",
        "deployment.groups",
        "deployment.labels",
        "deployment.quantize",
        "deployment.scores",
        "deployment.compare",
        "deployment.evidence",
        "deployment.measure",
        "deployment.provenance",
    ],
    ["deployment.samples", "deployment.quantizer", "deployment.options"],
    ["deployment.report"],
    ["deployment.result"],
    ["deployment.float_search", "deployment.places", "deployment.stages", "deployment.verdict"],
    ["deployment.quantized_stage"],
    [
        "reestimation.files",
        "reestimation.inputs",
        "reestimation.levels",
        "reestimation.merging",
        "reestimation.options",
        "reestimation.report",
    ],
    ["reestimation.partitions", "reestimation.pieces", "reestimation.result", "reestimation.writing"],
    ["reestimation.collections", "reestimation.work"],
    ["reestimation.engines"],
    ["reestimation.cluster"],
    ["reestimation.job"],
    ["deployment.reestimated"],
    ["deployment.pipeline"],
    ["deployment.__init__", "reestimation.__init__"],
    ["zoo.names", "zoo.result"],
    ["zoo.task"],
    ["zoo.job"],
    ["zoo.__init__"],
    ["__init__"],
    ["terminal", "command_line", "confinement"],
    ["arguments"],
    ["delivery"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}

# Who may import what is optional.
OPTIONAL = {
    "_types": ["typing_extensions"],  # type checkers bring it
    "torch": ["torch"],
    "_torch.threads": ["torch"],
    "_torch.kernels": ["torch"],
    "_torch.distributed": ["torch"],
    "_torch.operators": ["torch"],
    "_torch.population": ["torch"],
    "_torch.autograd": ["torch"],
    "_torch.inventory": ["torch"],
    "_torch.replacements": ["torch"],
    "conversion": ["torch", "keras"],
    "layers": ["torch", "keras"],
    "keras.torch": ["torch"],
    "keras.jax": ["jax"],
    "keras.tensorflow": ["tensorflow"],
    "keras.layer": ["keras"],
    "keras.conversion": ["keras"],
    "keras.folding": ["keras"],
    **{f"exported.keras_{part}": ["keras"] for part in ("nodes", "layers", "graph", "copy", "parity", "fold")},
    "deployment.report": ["jinja2"],
    "graph.model.objects": ["onnx_ir"],
    "graph.passes": ["onnx_ir"],
    **{name: ["pandas"] for name in ("graph.notebook", "graph.fold_result", "exported.result")},
    "graph.olive": ["olive"],
    "exported.torch_graph": ["torch"],
    "exported.torch_modules": ["torch"],
    "exported.torch_parity": ["torch"],
    "exported.torch_fold": ["torch"],
    "cluster.connection": ["dask", "distributed"],
    "cluster.locations": ["fsspec"],
    "reestimation.collections": ["dask"],
}

# Where the wings meet: what the graph wing may import of the rest, and who may import the graph wing.
MEETING = {"_types", "affine", "dtypes", "errors", "interrupts", "masks", "sizes"}
GRAPH_WING = ("graph.", "deployment.", "cluster.", "reestimation.", "zoo.", "exported.")

# A re-estimation takes statistics of arrays on their way through a graph; a model of a framework may hold layers of ours.
ALSO_MEETING = {
    "reestimation.": {"stats", "sync", "functional", "memory"},
    "exported.": {"torch", "_torch.inventory", "_torch.replacements", "keras.layer"},
}


def imported(name, types=True):
    """Yield (module of the package or None, module as written, whether it is loaded with the file) for every import of a file; without
    `types`, for those that Python sees."""
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    if not types:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and for_checkers(node))]
    blocks = [node for node in tree.body if isinstance(node, ast.Try) or (isinstance(node, ast.If) and not for_checkers(node))]
    top = set(tree.body) | {child for node in blocks for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in {name}"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            yield _of_package(module), module, node in top


def for_checkers(node):
    """Whether a block is one of `if TYPE_CHECKING`, which nothing but a type checker enters."""
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _of_package(module):
    parts = module.split(".")
    if parts[0] != "fastbn":
        return None
    for length in range(len(parts), 0, -1):
        inside = ".".join(parts[1:length])
        for candidate in (inside, f"{inside}.__init__" if inside else "__init__"):
            if candidate in FLOOR:
                return candidate
    raise AssertionError(f"{module} stands on no floor")


def test_every_file_stands_on_a_floor():
    assert set(FILES) | {"_native"} == set(FLOOR)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_lower_floors(name):
    # Types may be named across floors: nothing is loaded, and a result names the report that names the result.
    for target, module, top in imported(name, types=False):
        # fastbn itself may be asked for its version and its graph wing when they are needed, not when it is loaded; so may what folds the
        # models of a framework.
        if target is None or (not top and target in ("__init__", "graph.__init__", "exported.torch_fold", "exported.keras_fold")):
            continue
        assert FLOOR[target] < FLOOR[name], f"{name} imports {module}"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(GRAPH_WING)])
def test_the_wings_meet_in_few_files(name):
    for target, module, top in imported(name):
        # Its version is what the package may be asked for, when it is needed.
        meeting = MEETING.union(*(files for folder, files in ALSO_MEETING.items() if name.startswith(folder)))
        allowed = target is None or target.startswith(GRAPH_WING) or target in meeting or (target == "__init__" and not top)
        assert allowed, f"{name} imports {module}"


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(GRAPH_WING)])
def test_the_array_wing_knows_nothing_of_onnx(name):
    for target, module, top in imported(name):
        assert module.split(".")[0] not in ("onnx", "onnxruntime", "google", "ml_dtypes")
        assert not (top and target and target.startswith(GRAPH_WING)), f"{name} loads {module}"


@pytest.mark.parametrize("name", FILES)
def test_onnxruntime_is_imported_inside_functions(name):
    for _, module, top in imported(name):
        if module.split(".")[0] == "onnxruntime":
            assert name in ("graph.runtime", "deployment.quantize", "deployment.provenance")
            assert not top


@pytest.mark.parametrize("name", FILES)
def test_only_the_dependencies_are_imported(name):
    allowed = {*sys.stdlib_module_names, "fastbn", "numpy", "onnx", "onnxruntime", "google", *OPTIONAL.get(name, ())}
    for _, module, _ in imported(name):
        assert module.split(".")[0] in allowed


# The floors of the C files, as CONTRIBUTING.md states them. A .c, a .h and an .inc of one name are one unit; isa_<name>.c are all "isa".
ROOT = Path(__file__).resolve().parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
C_FLOORS = re.search(r"^    src_c: (.+(?:\n    .+)*)", CONTRIBUTING, re.MULTILINE)[1].split("<")
C_FLOOR = {name: number for number, floor in enumerate(C_FLOORS) for name in re.findall(r"\w+", floor)}
C_FILES = {path.name: path for path in sorted((ROOT / "src_c").iterdir())}
C_SYSTEM = {"pthread", "sched", "signal", "unistd", "immintrin", "emmintrin", "arm_neon"}  # beside C11's own
C_STANDARD = {"math", "stdatomic", "stddef", "stdint", "stdio", "stdlib", "string", "time"}


def c_unit(file):
    stem = file.rpartition(".")[0]
    return "isa" if stem.startswith("isa_") else stem


def c_included(name):
    """Yield ("<" or a quote, file) of every #include line of a C file."""
    yield from re.findall(r'^\s*#\s*include\s*(["<])([^">]+)[">]', C_FILES[name].read_text(encoding="utf-8"), re.MULTILINE)


def test_contributing_names_every_file():
    tree = re.search(r"^    src_c/.*\n(?:    .+\n)+", CONTRIBUTING, re.MULTILINE)[0]
    named = set(re.findall(r"[\w.]+", tree))
    python = {path.name for path in FILES.values()} - {"__init__.py", "__main__.py"}
    assert python <= named
    assert {c_unit(name) for name in C_FILES} <= {file.split(".")[0] for file in named} | {"isa"}


def test_every_c_file_stands_on_a_floor():
    assert {c_unit(name) for name in C_FILES} == set(C_FLOOR)
    assert len(C_FLOORS) > 5


@pytest.mark.parametrize("name", C_FILES)
def test_a_c_file_includes_only_from_lower_floors(name):
    for bracket, file in c_included(name):
        if bracket == '"' and c_unit(file) != c_unit(name):
            assert C_FLOOR[c_unit(file)] < C_FLOOR[c_unit(name)], f"{name} includes {file}"


@pytest.mark.parametrize("name", C_FILES)
def test_c_includes_nothing_but_libc_libm_pthreads_and_vectors(name):
    for bracket, file in c_included(name):
        assert file in C_FILES if bracket == '"' else file.removesuffix(".h") in C_STANDARD | C_SYSTEM


@pytest.mark.parametrize("name", C_FILES)
def test_no_c_file_has_the_name_of_a_header_of_the_system(name):
    """src_c is searched before the directories of the system: threads.h would hide C11's own from Python's headers."""
    assert name.rpartition(".")[0] not in C_STANDARD | C_SYSTEM | {"assert", "errno", "float", "limits", "stdbool", "threads", "time"}


def test_contributing_shows_every_file():
    """The tree of the page for contributors."""
    tree = CONTRIBUTING.split("## Layout of the source")[1].split("Every file stands on a floor")[0]
    shown = set(re.findall(r"[\w.<>]+", tree))
    assert len(shown) > 100
    files = {path for ending in ("py", "pyi", "pyx", "pxi") for path in (ROOT / "fastbn").rglob(f"*.{ending}") if path.stem[:2] != "__"}
    assert sorted(path.relative_to(ROOT).as_posix() for path in files if path.name not in shown) == []
