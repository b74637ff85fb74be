"""Which outputs hold the scores of a classifier, of which only the place of the largest matters.

The output of a Softmax does. A last linear layer may as well give coordinates, an embedding or a reconstruction: there the names decide, of
the output first, then of the layer and its weights. Where they say nothing, the shapes must allow it. In doubt an output holds no scores:
it is then judged by its error, which is the stricter of the two.
"""

import math
import re

from onnx import TensorProto

from fastbn.graph.model.index import Index
from fastbn.graph.model.node import Node, Value

__all__ = ["row_outputs", "score_outputs"]

# Operators between the scores of a classifier and its output.
PASSING = ("Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Dropout", "QuantizeLinear", "DequantizeLinear")
PROBABILITIES = ("Softmax", "LogSoftmax")
LINEAR = ("Gemm", "MatMul", "GlobalAveragePool", "ReduceMean")

# How many scores an output may have where no name tells that they are scores. Fewer may be a box, a pose or a steering angle.
FEWEST_CLASSES, MOST_CLASSES = 5, 100_000

# Powers of two from here on are the sizes of embeddings.
SMALLEST_EMBEDDING = 64

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)

# Words in names, matched from their beginning to their end.
SAYS_SCORES = re.compile(r"logits?|prob\w*|scores?|class\w*|cls|softmax|policy|categor\w*|labels?")
SAYS_OTHERWISE = re.compile(
    r"recon\w*|(auto)?(en|de)cod\w*|emb\w*|feat\w*|latents?|mu|logvar|sigma|hidden|states?|cache|reg|regress\w*"
    r"|b?box(es)?|rois?|anchors?|landmarks?|lmks?|keypoints?|kpts?|points?|joints?|coord\w*|xyz?|poses?|position\w*|locations?|vert(ex|ices)"
    r"|rot|rotation\w*|quat\w*|angles?|yaw|pitch|offsets?|deltas?|values?|prices?|mos|steer\w*|throttle|velocit\w*|depth|flow|heatmaps?"
    r"|images?|audio|waveforms?|masks?|noise"
)


def row_outputs(index: Index) -> list[str]:
    """Return the names of the outputs in which a row has a largest entry: [N, C] or [N, C, 1, 1] with C > 1."""
    return [info.name for info in index.proto.graph.output if _classes(index, index.main.values[info.name])]


def score_outputs(index: Index) -> list[str]:
    """Return the names of the outputs that look like the scores of a classifier."""
    names = []
    alone = len(index.proto.graph.output) == 1
    for name in row_outputs(index):
        value = index.main.values[name]
        node = value.producer
        while node is not None and node.inputs and (node.is_op(*PASSING) or _adds_bias(node, index)):
            node = next((read.producer for read in node.inputs if read is not None and index.constant(read) is None), None)
        if node is not None and (_is_softmax(node) or (alone and node.is_op(*LINEAR) and _linear_scores(index, value, node))):
            names.append(name)
    return names


def _classes(index: Index, value: Value) -> int | None:
    """Return how many entries a row of an output has, None where it has no rows or one entry, or nobody knows."""
    shape = index.shape(value)
    if shape is None or len(shape) < 2 or shape[1] == 1 or any(size != 1 for size in shape[2:]):
        return None
    return shape[1] or MOST_CLASSES + 1


def _adds_bias(node: Node, index: Index) -> bool:
    return node.is_op("Add") and any(read is not None and index.constant(read) is not None for read in node.inputs)


def _is_softmax(node: Node) -> bool:
    """A Softmax over the batch gives no scores of a row."""
    return node.is_op(*PROBABILITIES) and node.attribute("axis", -1) != 0


def _linear_scores(index: Index, output: Value, node: Node) -> bool:
    """Say whether the only output, which the linear layer `node` gives, holds scores."""
    named = _says_scores([output.name])
    if named is None:
        constants = [read.name for read in node.inputs if read is not None and index.constant(read) is not None]
        named = _says_scores([node.label, *constants])
    if named is not None:
        return named
    count = _classes(index, output) or 0
    embedding = count >= SMALLEST_EMBEDDING and count & (count - 1) == 0
    return FEWEST_CLASSES <= count <= MOST_CLASSES and not embedding and count < _input_size(index)


def _says_scores(names: list[str]) -> bool | None:
    """Return True where names speak of scores, False where of something else, None where of neither."""
    words = [word.lower() for name in names for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    if any(SAYS_OTHERWISE.fullmatch(word) for word in words):
        return False
    return True if any(SAYS_SCORES.fullmatch(word) for word in words) else None


def _input_size(index: Index) -> float:
    """Return how many numbers a row of the inputs has, Inf where that is open or they are no floats: a classifier has fewer classes, a
    decoder gives more."""
    constants = {tensor.name for tensor in index.proto.graph.initializer}
    total = 0
    for info in index.proto.graph.input:
        if info.name in constants:
            continue
        shape = index.input_shapes.get(info.name) or index.declared_shape(index.main.values[info.name])
        sizes = None if shape is None else shape[1:] or shape
        if info.type.tensor_type.elem_type not in FLOATS or sizes is None or None in sizes:
            return math.inf
        total += math.prod(size or 0 for size in sizes)
    return total
