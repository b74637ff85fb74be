"""Every rule of every row, made wrong in each direction: the proof of the fold must catch it, and where that proof is switched off the
comparison of the whole model must."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import pytest
from sketch import assert_same, model, norm, normal
from test_absorb import FOLDS
from test_carry import PASSES, W4, backward, forward, ints
from test_gather import OTHER_PICKS
from test_join import PASSES as JOINS
from test_matmul import MATMUL_CONSTANTS, MATMULS
from test_meeting import PASSES as MEETINGS
from test_normalization import BEHIND, behind, deformable
from test_widening import ONE_NUMBER

import fastbn
from fastbn.graph import job
from fastbn.graph.model import storage
from fastbn.graph.model.constant import Dense
from fastbn.graph.model.index import Index
from fastbn.graph.model.quantized import SCALE, Dequantized
from fastbn.graph.ops.affine import Affine
from fastbn.graph.ops.registry import OPERATORS
from fastbn.graph.parity.fold_parity import FoldParity
from fastbn.graph.planner.planning import plan

# A wrong scale, and models in which each row is tried in each direction.
WRONG, ENOUGH = 1.05, 2

WAYS = ("backward", "forward", "join", "meet")


def recurrent(op, gates):
    """Return a norm before a recurrent network."""
    nodes = f"r = Tanh(x) n = BatchNormalization(r, s, t, m, v) q = Transpose <perm = [0,2,1]> (n) y = {op} <hidden_size = 3> (q, w, u)"
    weights = {"w": normal(1, 3 * gates, 4), "u": 0.5 * normal(1, 3 * gates, 3)}
    return model(f"(float[5,4,2] x) => (float y) {{ {nodes} }}", **weights, **norm(4))


def elementwise(nodes):
    """Return nodes behind r, with constants k and l per channel and e per element."""
    norms = norm(4) if "BatchNormalization" in nodes else {}
    shapes = {"k": (4, 1, 1), "l": (1, 4, 1, 1), "e": (4, 3, 3)}
    constants = {name: 1 + np.abs(normal(*shape)) for name, shape in shapes.items() if f"{name})" in nodes}
    return model(f"(float[2,4,3,3] x) => (float y) {{ r = Tanh(x) {nodes} }}", **constants, **norms)


POINT = "p = GlobalAveragePool(n)"
REDUCE = "d = {} <axes = [2,3], keepdims = 0> (n)"
CRD = """(float[2,8,3,3] x) => (float y) {
    r = Tanh(x)
    n = BatchNormalization(r, s, t, m, v)
    d = DepthToSpace <blocksize = 2, mode = "CRD"> (n)
    y = Conv(d, w)
}"""
DEFORMABLE = "DeformConv <pads = [1,1,1,1]>"
RMS = """(float[7,4] x) => (float y) {
    c = RMSNormalization(x, g)
    y = Mul(c, k)
}"""
MORE = {
    **{f"a norm behind {op}": behind(op) for op in BEHIND},
    "Mul behind an RMSNormalization": model(RMS, opset=23, ir_version=10, g=normal(4), k=normal(4, seed=1)),
    "DeformConv": deformable(f"c = {DEFORMABLE} (x, w, o, b) y = BatchNormalization(c, s, t, m, v)", **norm(4)),
    "DeformConv forward": deformable(f"r = Tanh(x) n = Mul(r, k) y = {DEFORMABLE} (n, w, o, b)", k=normal(1, 4, 1, 1)),
    "Mean forward": model(
        "(float[2,4,6,6] x) => (float y) { r = Tanh(x) f = Add(r, k) d = Mean(f, x) y = Conv(d, w) }", w=W4, k=normal(4, 1, 1)
    ),
    "Einsum": backward('d = Einsum <equation = "nchw,oc->nohw"> (c, k)', shift=False, k=normal(4, 4)),
    "Einsum of another axis": backward('d = Einsum <equation = "nchw,hg->ncgw"> (c, k)', shift=False, k=normal(6, 5)),
    "Einsum forward": forward('d = Einsum <equation = "nchw,oc->nohw"> (n, k)', w=W4, k=normal(4, 4)),
    "Einsum of each channel, forward": forward('d = Einsum <equation = "nc...,c->nc..."> (n, k)', w=W4, k=normal(4)),
    "LSTM": recurrent("LSTM", 4),
    "GRU": recurrent("GRU", 3),
    "RNN": recurrent("RNN", 1),
    "ConvTranspose forward": model(
        "(float[2,4,5,5] x) => (float y) { r = Tanh(x) n = BatchNormalization(r, s, t, m, v) y = ConvTranspose <pads = [1,1,1,1]> (n, w) }",
        w=normal(4, 5, 2, 2),
        **norm(4),
    ),
    "MatMul forward": model(
        "(float[2,4] x) => (float y) { r = Tanh(x) n = BatchNormalization(r, s, t, m, v) c = MatMul(n, w) y = Add(c, b) }",
        w=normal(4, 3),
        b=normal(3),
        **norm(4),
    ),
    "Add before a norm": elementwise("c = Add(r, k) y = BatchNormalization(c, s, t, m, v)"),
    "Sub before a norm": elementwise("c = Sub(r, k) y = BatchNormalization(c, s, t, m, v)"),
    "norm before a norm": elementwise("n = BatchNormalization(r, s, t, m, v) y = BatchNormalization(n, s, t, m, v)"),
    "norm before a Mul": elementwise("n = BatchNormalization(r, s, t, m, v) y = Mul(n, k)"),
    **{f"{op} before a Mul": elementwise(f"c = {op}(r, e) y = Mul(c, k)") for op in ("Mul", "Div")},
    "Mul behind a Div": elementwise("c = Div(r, k) y = Mul(c, l)"),
    "Div behind a Mul": elementwise("c = Mul(r, k) y = Div(c, l)"),
    "Sub behind an Add": elementwise("c = Add(r, k) y = Sub(c, l)"),
    **{f"{op} behind a norm": forward(f"d = {op}(n, k)", w=W4, k=1 + np.abs(normal(4, 1, 1))) for op in ("Add", "Sub", "Mul", "Div")},
    **{f"{op} of two, forward": forward(f"e = Conv(x, w2) d = {op}(n, e)", w=W4, w2=normal(4, 4, 1, 1)) for op in ("Add", "Sub", "Sum")},
    "Div of two, forward": forward("p = Exp(x) d = Div(n, p)", w=W4, shift=False),
    "Dropout": backward("d = Dropout(c)"),
    "Dropout forward": forward("d = Dropout(n)", w=W4),
    "Unsqueeze forward": forward(f"{POINT} q = Squeeze(p, k) d = Unsqueeze(q, k)", w=normal(5, 4, 1, 1), k=ints(2, 3)),
    "Flatten backward": backward("p = GlobalMaxPool(c) d = Flatten(p)", positive=True),
    "DepthToSpace forward": model(CRD, w=normal(5, 2, 2, 2), **{name: np.repeat(values, 4) for name, values in norm(2).items()}),
    "Expand forward": forward(f"{POINT} d = Expand(p, k)", w=W4, k=ints(2, 4, 3, 3)),
    "Pad forward": forward('d = Pad <mode = "edge"> (n, k)', w=W4, k=ints(0, 0, 1, 1, 0, 0, 1, 1)),
    "GlobalMaxPool forward": forward("p = GlobalMaxPool(n) d = Flatten(p)", w=normal(4, 3), positive=True),
    **{f"{op} forward": forward(REDUCE.format(op), w=normal(4, 3), positive=True) for op in ("ReduceMax", "ReduceMin")},
    **{f"{op} forward": forward(REDUCE.format(op), w=normal(4, 3), positive=True, shift=False) for op in ("ReduceL1", "ReduceL2")},
    "ReduceL1": backward("d = ReduceL1 <axes = [2,3]> (c)", shift=False, positive=True),
    "ReduceSum forward": forward("d = ReduceSum <keepdims = 0> (n, k)", w=normal(4, 3), shift=False, k=ints(2, 3)),
    "Upsample forward": forward("d = Upsample(n, k)", opset=9, w=W4, k=np.float32([1, 1, 2, 2])),
    "LeakyRelu forward": forward("d = LeakyRelu <alpha = 0.2> (n)", w=W4, positive=True, shift=False),
    "PRelu forward": forward("d = PRelu(n, k)", w=W4, positive=True, shift=False, k=normal(4, 1, 1)),
}


def matmul(case):
    """Return a model of test_absorb's table of MatMul."""
    shape, nodes, _ = MATMULS[case]
    used = {name: value for name, value in MATMUL_CONSTANTS.items() if f"{name}," in nodes or f"{name})" in nodes}
    return model(f"(float[{shape}] x) => (float y) {{ {nodes} }}", **used)


def rows():
    """Return every (operands, operator, direction) that there is a rule for."""
    plain = [("values", op, way) for op, row in OPERATORS.items() for way in WAYS if getattr(row, way)]
    constant = [(op, row.with_constant) for op, row in OPERATORS.items() if row.with_constant is not None]
    return plain + [("with a constant", op, way) for op, row in constant for way in WAYS if getattr(row, way)]


def edited(monkeypatch, row, change):
    """Let `change` edit what a row answers."""
    operands, op, way = row
    whole = OPERATORS[op]
    rule = getattr(whole if operands == "values" else whole.with_constant, way)

    def answer(*arguments):
        transfer = rule(*arguments)
        return map(change, transfer) if isinstance(transfer, (list, Iterator)) else change(transfer)

    changed = {way: answer} if operands == "values" else {"with_constant": replace(whole.with_constant, **{way: answer})}
    monkeypatch.setitem(OPERATORS, op, replace(whole, **changed))


def crossed(proto):
    """Return the rows that the planner asks on its way, of operators that take part in a fold."""
    asked = set()
    with pytest.MonkeyPatch.context() as patch:
        for row in rows():
            edited(patch, row, lambda transfer, row=row: asked.add(row) or transfer)
        plans = plan(Index(storage.load(proto))).plans
    ops = {node.op for found in plans for node in found.path}
    return {row for row in asked if row[1] in ops}


@pytest.fixture(scope="module")
def models():
    """Row -> models whose folds use it."""
    found = {}
    picks = [proto for proto, _ in OTHER_PICKS.values()]
    widened = [ONE_NUMBER[name][0] for name in ("no shift", "a divisor")]
    tables = (MORE, JOINS, MEETINGS, PASSES)
    folded = [proto for table in tables for proto in table.values()]
    for proto in [*widened, *picks, *folded, *map(matmul, MATMULS), *FOLDS.values()]:
        for row in crossed(proto):
            found.setdefault(row, []).append(proto)
    return found


def off(values):
    return values * WRONG


def permuted(values):
    return np.roll(values, 1)


def spoiled(transfer, change):
    """Return an answer of a row in which the first affine, or else the first constant, is wrong."""
    if transfer.passed_on:
        slot, affine = transfer.passed_on[0]
        wrong = Affine(change(affine.scale), change(affine.shift), affine.axis, affine.rank, affine.abs_terms)
        return replace(transfer, passed_on=[(slot, wrong), *transfer.passed_on[1:]])
    slot, constant = next(iter(transfer.constants.items()), (None, None))
    if constant is None:
        return transfer
    dense = Dense.of(constant)
    return replace(transfer, constants={**transfer.constants, slot: replace(dense, values=change(dense.values))})


def recorded(monkeypatch, owner, name, said):
    """Let a function of `owner` record in `said` what it returns."""
    function = getattr(owner, name)

    def recording(*arguments):
        said.append(function(*arguments))
        return said[-1]

    monkeypatch.setattr(owner, name, recording)


@pytest.mark.parametrize("change", [off, permuted])
@pytest.mark.parametrize("row", rows(), ids="-".join)
def test_a_wrong_rule_is_caught(row, change, models, monkeypatch):
    right = {proto.SerializeToString(): fastbn.fold(proto, verify=False) for proto in models[row]}
    edited(monkeypatch, row, lambda transfer: spoiled(transfer, change))
    caught = 0
    for data, expected in right.items():
        wrong = fastbn.fold(data, verify=False)
        if not wrong.folded or wrong.to_bytes() == expected.to_bytes():
            continue  # one channel cannot be permuted; a wrong affine may find no absorber
        caught += 1
        assert expected.folded
        assert_left_out(data, wrong, monkeypatch, by_model=False)
        assert_left_out(data, wrong, monkeypatch, by_model=True)
        if caught == ENOUGH:
            break
    assert caught, "no model folds wrongly with this row"


@pytest.mark.parametrize("change", [off, permuted])
def test_a_wrong_scale_of_a_quantized_weight_is_caught(change, monkeypatch):
    """DequantizeLinear has no row of its own: the scale of a fold goes into its scale."""
    text = (
        "(float[2,3,6,6] x) => (float y) { w = DequantizeLinear <axis = 0> (q, sc) c = Conv(x, w) y = BatchNormalization(c, s, z, z, v) }"
    )
    weight = np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
    constants = {**norm(4, positive=True), "q": weight, "sc": np.linspace(0.001, 0.003, 4, dtype=np.float32), "z": np.zeros(4, np.float32)}
    used = {name: values for name, values in constants.items() if name not in "tm"}
    data = model(text, **used).SerializeToString()
    right = fastbn.fold(data)
    assert right.folded
    assert right.parity.ok

    stepped = Dequantized._stepped

    def wrong(self, *given):
        right = stepped(self, *given)
        scale = right.constants[self.node, SCALE]
        return replace(right, constants={**right.constants, (self.node, SCALE): replace(scale, values=change(scale.values))})

    monkeypatch.setattr(Dequantized, "_stepped", wrong)
    spoiled = fastbn.fold(data, verify=False)
    assert spoiled.folded
    assert spoiled.to_bytes() != right.to_bytes()
    assert_left_out(data, spoiled, monkeypatch, by_model=False)
    assert_left_out(data, spoiled, monkeypatch, by_model=True)


def assert_left_out(data, wrong, monkeypatch, by_model):
    """Demand that a wrong fold is refused by its own proof, or with that one switched off by the comparison of the whole model."""
    said = []
    with monkeypatch.context() as patch:
        if by_model:
            patch.setattr(job, "check_fold", lambda *_: FoldParity(True))
            recorded(patch, job.Comparison, "check", said)
        else:
            recorded(patch, job, "check_fold", said)
        result = fastbn.fold(data)
    assert not all(each.ok for each in said), wrong
    assert result.to_bytes() != wrong.to_bytes()
    assert result.parity is None or result.parity.ok
    assert_same(onnx.ModelProto.FromString(data), result.model, units=256)
