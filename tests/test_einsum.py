"""Einsum of data and a constant: what it takes in and lets pass, by the letters of its equation; the oracle is onnxruntime."""

import numpy as np
import pytest
from rows import PER_ELEMENT, affine, case
from sketch import folds, model, norm, normal, refuses
from test_transfers import check_backward, check_forward

import fastbn
from fastbn.errors import ModelError
from fastbn.graph.reasons import Refusal


def einsum(equation, inputs="x, w"):
    return f'Einsum <equation = "{equation}"> ({inputs})'


def scale_of(channels, axis):
    return affine(channels, axis, shift=False)


THREE, NUMBER = (2, 5, 6), affine(1, None, shift=False)

BACKWARD = {
    "the last axis": case(einsum("btc,co->bto"), scale_of(4, 2), x=THREE, w=normal(6, 4)),
    "an axis of the middle": case(einsum("bct,oc->bot"), scale_of(4, 1), x=THREE, w=normal(4, 5)),
    "an axis of the data": case(einsum("btc,co->bto"), scale_of(5, 1), x=THREE, w=normal(6, 4)),
    "an axis that both have": case(einsum("bct,c->bct"), scale_of(5, 1), x=THREE, w=normal(5)),
    "one number": case(einsum("btc,co->bto"), NUMBER, x=THREE, w=normal(6, 4)),
    "a constant that is repeated": case(einsum("bct,c->bct"), scale_of(5, 1), x=THREE, w=normal(1)),
    "the constant first": case(einsum("oc,bct->bto", "w, x"), scale_of(4, 2), x=THREE, w=normal(4, 5), slot=0),
    "heads": case(einsum("btc,hdc->bhtd"), scale_of(3, 1), x=THREE, w=normal(3, 4, 6)),
    "dots": case(einsum("...c,oc->...o"), scale_of(4, -1), x=THREE, w=normal(4, 6)),
    "dots behind": case(einsum("bc...,oc->bo..."), scale_of(4, 1), x=(2, 5, 3, 4), w=normal(4, 5)),
    "dots of the data": case(einsum("...c,oc->...o"), scale_of(5, 1), x=THREE, w=normal(4, 6)),
    "dots of both": case(einsum("b...,...->b..."), scale_of(5, 1), x=THREE, w=normal(5, 6)),
    "no arrow": case(einsum("bta,ac"), scale_of(4, 1), x=THREE, w=normal(6, 4)),
    "no arrow, dots": case(einsum("...a,ac"), scale_of(4, 2), x=THREE, w=normal(6, 4)),
    "blanks": case(einsum(" b t c , c o -> b t o"), scale_of(4, 2), x=THREE, w=normal(6, 4)),
    "of no rank that is known": case(einsum("btc,co->bto"), scale_of(4, -1), x=THREE, w=normal(6, 4), unknown=True),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name):
    check_backward(BACKWARD[name]())


FORWARD = {
    "the last axis": case(einsum("btc,co->bto"), affine(6, 2), x=THREE, w=normal(6, 4)),
    "an axis of the middle": case(einsum("bct,oc->bot"), affine(5, 1), x=THREE, w=normal(4, 5)),
    "an axis of the data": case(einsum("btc,co->bto"), scale_of(5, 1), x=THREE, w=normal(6, 4)),
    "an axis that both have": case(einsum("bct,c->bct"), affine(5, 1), x=THREE, w=normal(5)),
    "one number": case(einsum("btc,co->bto"), PER_ELEMENT, x=THREE, w=normal(6, 4)),
    "to one number": case(einsum("btc,c->bt"), affine(6, 2), x=THREE, w=normal(6)),
    "the constant first": case(einsum("oc,bct->bto", "w, x"), affine(5, 1), x=THREE, w=normal(4, 5), slot=1),
    "one head": case(einsum("btc,hdc->bhtd"), affine(6, 2), x=THREE, w=normal(1, 4, 6)),
    "heads, a scale": case(einsum("btc,hdc->bhtd"), scale_of(6, 2), x=THREE, w=normal(3, 4, 6)),
    "dots": case(einsum("...c,oc->...o"), affine(6, -1), x=THREE, w=normal(4, 6)),
    "dots of the data": case(einsum("b...,oc->b...oc"), scale_of(5, 1), x=THREE, w=normal(4, 6)),
    "no arrow": case(einsum("bta,ac"), affine(6, 2), x=THREE, w=normal(6, 4)),
    "a constant that is repeated": case(einsum("bct,co->bcto"), scale_of(5, 1), x=THREE, w=normal(1, 4)),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name):
    check_forward(FORWARD[name]())


REFUSED = {
    "a shift": ("backward", "shift-cannot-pass", case(einsum("btc,co->bto"), affine(4, 2), x=THREE, w=normal(6, 4))),
    "a shift elsewhere": ("forward", "shift-cannot-pass", case(einsum("btc,co->bto"), affine(5, 1), x=THREE, w=normal(6, 4))),
    "a shift of heads": ("forward", "shift-cannot-pass", case(einsum("btc,hdc->bhtd"), affine(6, 2), x=THREE, w=normal(3, 4, 6))),
    "no constant": ("backward", "no-absorber", case(einsum("btc,bto->bco", "x, x"), scale_of(6, 1), x=THREE)),
    "one operand": ("backward", "no-absorber", case(einsum("btc->bct", "x"), scale_of(6, 1), x=THREE)),
    "three operands": ("backward", "no-absorber", case(einsum("btc,co,o->bto", "x, w, v"), NUMBER, x=THREE, w=normal(6, 4), v=normal(4))),
    "a diagonal": ("backward", "axis", case(einsum("bcc,co->bo"), scale_of(4, 1), x=(2, 5, 5), w=normal(5, 4))),
    "a sum of the data": ("backward", "axis", case(einsum("btc,co->bo"), scale_of(4, 1), x=THREE, w=normal(6, 4))),
    "other channels": ("forward", "axis", case(einsum("btc,co->bto"), affine(5, 2), x=THREE, w=normal(6, 4))),
    "a constant that is repeated in a sum": ("forward", "axis", case(einsum("bct,ct->bt"), affine(5, 1), x=THREE, w=normal(1, 6))),
    "dots of no rank that is known": (
        "backward",
        "axis-unknown",
        case(einsum("...c,oc->...o"), scale_of(4, -1), x=THREE, w=normal(4, 6), unknown=True),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    direction, code, setting = REFUSED[name]
    with pytest.raises(Refusal) as caught:
        setting().answers(direction)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("equation", "part"),
    [("btc->bct", "1 operands, as the equation says"), ("btc,co->btz", "a result of axes"), ("btc,cod->bto", "a constant of 3 axes")],
)
def test_an_equation_that_does_not_fit(equation, part):
    with pytest.raises(ModelError, match=part):
        case(einsum(equation), scale_of(4, 2), x=THREE, w=normal(6, 4))().answers("backward")


def test_a_norm_behind_an_einsum_leaves_its_shift():
    text = f"(float[N,T,5] x) => (float y) {{ c = {einsum('btc,oc->bot')} n = BatchNormalization(c, s, t, m, v) y = Tanh(n) }}"
    result = folds(model(text, w=normal(4, 5), **norm(4)), "Einsum Add Tanh")
    assert [fold.into for fold in result.folded] == ["c"]
    folds(
        model(text.replace("n = Batch", "d = Add(c, k) n = Batch").replace("(c, s", "(d, s"), w=normal(4, 5), k=normal(4, 1), **norm(4)),
        "Einsum Add Tanh",
    )


def test_a_norm_before_an_einsum_and_a_sum():
    nodes = f"r = Tanh(x) n = BatchNormalization(r, s, t, m, v) c = {einsum('bct,oc->bto', 'n, w')} y = Add(c, k)"
    folds(model(f"(float[N,5,T] x) => (float y) {{ {nodes} }}", w=normal(4, 5), k=normal(4), **norm(5)), "Tanh Einsum Add")


def test_sizes_behind_an_einsum():
    nodes = f"r = Tanh(x) n = BatchNormalization(r, s, t, m, v) c = {einsum('nchw,oc->nohw', 'n, w')} h = Shape(c)"
    nodes = f"{nodes} b = Slice(h, zero, one) k = Concat <axis = 0> (b, rest) f = Reshape(c, k) y = MatMul(f, g)"
    constants = {"zero": np.array([0]), "one": np.array([1]), "rest": np.array([-1]), "g": normal(12, 2), "w": normal(3, 4)}
    result = fastbn.fold(model(f"(float[N,4,2,2] x) => (float y) {{ {nodes} }}", **constants, **norm(4)))
    assert [fold.into for fold in result.folded] == ["c"]


def test_a_shift_that_cannot_stay_refuses():
    text = f"(float[N,T,5] x) => (float y) {{ c = {einsum('btc,oc->bo')} y = BatchNormalization(c, s, t, m, v) }}"
    assert "sums an axis that its constant does not have" in refuses(model(text, w=normal(4, 5), **norm(4)))
