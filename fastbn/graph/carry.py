"""Table two: the operators that let a per-channel affine pass, one row per operator.

A row answers: the value that this node gives must become S * value + T; what is then asked of its inputs? It returns Taken with nothing
but onward affines, or raises Refusal.
"""

from fastbn.graph.absorb import Row, Taken
from fastbn.graph.report import Refusal

__all__ = ["CARRIERS"]


# Identity:  S*x + T asked of the output is S*x + T asked of the input.
def _identity(node, affine, site):
    return Taken(onward=[(0, affine)])


# Dropout in inference is Identity; the ways to say "inference" changed with the opset.
def _dropout(node, affine, site):
    opset, mode = site.index.opset, node.input(2)
    training = None if mode is None else site.index.constant(mode)
    if opset < 7 and not node.attribute("is_test", 0):
        raise Refusal("training-dropout", f"Dropout '{node.label}' drops at random (opset {opset} without is_test=1)")
    if mode is not None and (training is None or training.array().any()):
        raise Refusal("training-dropout", f"Dropout '{node.label}' may drop at random: its training_mode is not a constant false")
    return Taken(onward=[(0, affine)])


def _no_terms(node, site):
    return 0


def _same_sample(node, site):
    return {0: site.small_shape(node.inputs[0]) or (2, 3)}


CARRIERS = {
    "Identity": Row(_identity, _no_terms, _same_sample),
    "Dropout": Row(_dropout, _no_terms, _same_sample),
}
