"""Random graphs of the operators that the folds know, with inputs for them: the same for the same seed."""

import os

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from random_blocks import Blocks
from random_operators import Operators

GRAPHS = int(os.environ.get("FASTBN_GRAPHS", "400"))
FIRST = int(os.environ.get("FASTBN_SEED", "0"))
CHUNK = 50

OPSETS = (9, 10, 11, 12, 13, 17, 18, 19, 21, 23)


class Graph(Blocks, Operators):
    """A random graph under construction: every value has a known shape.

    `narrow` graphs are of float16 throughout; with `half` False such a graph is the same in float32. `singles` names each
    InstanceNormalization of one element per channel.
    """

    narrow, dtype, type = False, np.float32, TensorProto.FLOAT

    def __init__(self, seed, half=True):
        self.rng = np.random.default_rng(seed)
        self.expressions = np.random.default_rng([seed, 1])
        self.opset = int(self.rng.choice(OPSETS))
        self.narrow = self.opset >= 13 and self.expressions.random() < 0.2
        if self.narrow and half:
            self.dtype, self.type = np.float16, TensorProto.FLOAT16
        self.nodes, self.constants, self.shapes, self.singles = [], [], {}, set()
        shape = [(2, 4, 6, 6), (2, 6, 5, 5), (2, 4, 8), (2, 3, 8), (3, 8), (4, 4, 4), (2, 2, 4, 4), (2, 8, 4, 4)][self.rng.integers(8)]
        self.shapes["x"] = shape
        self.latest = "x"
        for _ in range(self.rng.integers(1, 5)):
            self.motif()
        self.finish(shape)

    # Choices.
    def one(self, options):
        return options[int(self.rng.integers(len(options)))]

    def chance(self, part):
        return self.rng.random() < part

    def value(self):
        return self.latest if self.chance(0.95) else self.one(list(self.shapes))

    def alike(self, shape, but=None):
        """Return another value of this shape, or one that broadcasts to it."""
        fits = [
            name
            for name, other in self.shapes.items()
            if name != but and len(other) <= len(shape) and all(a in (1, b) for a, b in zip(other[::-1], shape[::-1], strict=False))
        ]
        return self.one(fits) if fits else None

    # Pieces.
    def constant(self, values, kept=False):
        """Add a constant; float32 ones get the type of the graph unless they are kept."""
        name, values = f"k{len(self.constants)}", np.asarray(values)
        if values.dtype == np.float32 and not kept:
            values = values.astype(self.dtype)
        self.constants.append(numpy_helper.from_array(values, name))
        if self.chance(0.1):
            return self.node("Identity", [name], None)
        return name

    def weight(self, *shape, fan_in=1):
        values = (self.rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
        kinds = ["computed", "quantized", "quantizer"] if self.opset >= (19 if self.narrow else 13) and len(shape) > 1 else ["computed"]
        if self.expressions.random() < 0.75:
            return self.constant(values)
        return getattr(self, kinds[int(self.expressions.integers(len(kinds)))])(values)

    def computed(self, values):
        """Return a weight that nodes compute from constants."""
        rng = self.expressions
        other = rng.uniform(0.5, 2, (values.shape[0], *[1] * (values.ndim - 1))).astype(np.float32)
        kind = int(rng.integers(4))
        if kind == 0:  # weight normalization
            return self.node(
                "Mul", [self.node("Div", [self.constant(values * other), self.constant(other)], None), self.constant(other)], None
            )
        if kind == 1:  # an update of low rank
            first, second = rng.normal(size=(values.shape[0], 2)), rng.normal(size=(2, values.size // values.shape[0]))
            product = self.node("MatMul", [self.constant(each.astype(np.float32) / 8) for each in (first, second)], None)
            update = self.node("Reshape", [product, self.ints(*values.shape)], None)
            return self.node("Add", [self.constant(values), update], None)
        if kind == 2:
            return self.node("Cast", [self.constant(values.astype(np.float64))], None, to=self.type)
        return self.node(
            "Where", [self.constant(rng.random(values.shape) < 0.9), self.constant(values), self.constant(np.float32(0))], None
        )

    def steps(self, values):
        """Return (inputs behind the first of a QuantizeLinear of these values, its attributes, integers)."""
        rng = self.expressions
        dtype = [np.int8, np.uint8][int(rng.integers(2))]
        axis = int(rng.integers(values.ndim)) if rng.random() < 0.6 else None
        along = tuple(at for at in range(values.ndim) if at != axis)
        largest = np.abs(values).max() if axis is None else np.abs(values).max(along)
        scale = np.asarray(np.maximum(largest, 0.01) / 110, np.float32)
        zero = np.full(scale.shape, 128 if dtype == np.uint8 else rng.integers(-2, 3), dtype)
        full = [1] * values.ndim if axis is None else [-1 if at == axis else 1 for at in range(values.ndim)]
        integers = np.clip(
            np.rint(values / scale.reshape(full)) + zero.reshape(full).astype(int),
            -128 + 128 * (dtype == np.uint8),
            255 * (dtype == np.uint8) or 127,
        )
        return [self.constant(scale), self.constant(zero)], {} if axis is None else {"axis": axis}, integers.astype(dtype)

    def quantized(self, values):
        inputs, attributes, integers = self.steps(values)
        return self.node("DequantizeLinear", [self.constant(integers), *inputs], None, **attributes)

    def quantizer(self, values):
        inputs, attributes, _ = self.steps(values)
        quantized = self.node("QuantizeLinear", [self.constant(values), *inputs], None, **attributes)
        return self.node("DequantizeLinear", [quantized, *inputs], None, **attributes)

    def factor_values(self, *shape):
        sign = 1 if self.chance(0.6) else self.rng.choice([-1, 1], shape)
        return np.asarray(self.rng.uniform(0.5, 2, shape) * sign)

    def factor(self, *shape):
        return self.constant(self.factor_values(*shape).astype(np.float32))

    def ints(self, *values):
        return self.constant(np.array(values, np.int64))

    def node(self, op, inputs, shape, outputs=1, **attributes):
        names = [f"v{len(self.nodes)}" + (f"_{number}" if number else "") for number in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"n{len(self.nodes)}", **attributes))
        if shape is not None:
            for name, each in zip(names, shape if outputs > 1 else [shape], strict=True):
                self.shapes[name] = tuple(int(size) for size in each)
            self.latest = self.one(names)
        return names[0]

    def by_opset(self, first, op, x, name, values, shape, **attributes):
        """Add a node whose list of integers is an input from opset `first` on, and an attribute before."""
        if self.opset >= first:
            self.node(op, [x, self.ints(*values)], shape, **attributes)
        else:
            self.node(op, [x], shape, **{name: list(values)}, **attributes)

    def settled(self, model):
        """Return a model, this one or what became of it, in which each of `singles` reads zeros, so that it gives its bias.

        It gives that in exact arithmetic whatever it reads, and onnxruntime rounds it to the steps of x / sqrt(eps).
        """
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        del copy.graph.node[:]
        copy.graph.initializer.append(numpy_helper.from_array(np.array(0, self.dtype), "zero"))
        for node in model.graph.node:
            added = copy.graph.node.add()
            if node.name in self.singles:
                added.CopyFrom(helper.make_node("Mul", [node.input[0], "zero"], [f"{node.name}/zeros"]))
                added = copy.graph.node.add()
            added.CopyFrom(node)
            if node.name in self.singles:
                added.input[0] = f"{node.name}/zeros"
        return copy

    def motif(self):
        """Add an absorber and an affine, in either order, with carriers between them; or any few nodes.

        Most carriers in a row leave nothing to fold: a pair around one carrier, without other readers, reaches more.
        """
        between = [self.one(CARRY) for _ in range(self.rng.integers(0, 4))]
        absorb, affine = self.one(ABSORB), self.one(AFFINE)
        kind = self.one(["backward", "forward", "forward", "any", "pair", "pair"])
        if kind == "pair":
            pair = [self.one(ABSORB), self.one([*between, self.one(CARRY)]), affine]
            for step in pair if self.chance(0.6) else ["block", *pair[::-1]]:
                getattr(self, step)(self.latest)
            return
        if kind == "backward":
            steps = [absorb, *between, affine]
        elif kind == "forward":
            steps = [*self.one([["block"], [], ["activation"]]), affine, *between, absorb]
        else:
            steps = [*between, *between, absorb, affine]
            self.rng.shuffle(steps)
        for step in steps:
            getattr(self, step)(self.value())

    # One method per operator.

    def finish(self, shape):
        read = {name for node in self.nodes for name in node.input}
        results = [name for name in self.shapes if name != "x" and (name not in read or self.chance(0.03))]
        results = results or ["x"]
        kind = self.one(["fixed"] * 6 + ["batch", "batch", "any", "any"])
        named = self.one(["d{at}", "s{size}"])  # one name per axis, or per size
        free = [
            named.format(at=at, size=size) if kind != "fixed" and self.chance(0.6) and (kind == "any" or at == 0) else size
            for at, size in enumerate(shape)
        ]
        inputs = [helper.make_tensor_value_info("x", self.type, free)]
        outputs = [helper.make_tensor_value_info(name, self.type, [None] * len(self.shapes[name])) for name in results]
        graph = helper.make_graph(self.nodes, "random", inputs, outputs, self.constants)
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8 if self.opset < 23 else 11)
        self.feed = {"x": self.rng.standard_normal(shape).astype(self.dtype)}


ABSORB = ["conv", "conv", "conv_transpose", "gemm", "matmul", "matmul", "recurrent", "batch_norm", "repvgg", "repvit"]
ABSORB += ["norm_by_data", "norm_by_data", "deform_conv"]
AFFINE = [*["batch_norm", "batch_norm", "elementwise"] * 3, "ghost_norm", "norm_in_wider_type"]
CARRY = [
    *["combine", "concat", "reshape", "reshape", "activation", "transpose", "pool", "reduce", "split", "choose"] * 2,
    *["dropout", "resize", "depth_to_space", "space_to_depth", "expand", "pad", "elementwise"],
    *["join", "join", "tile", "reverse", "lp_pool", "lp_pool", "gather_elements", "gather_blocks", "norm_in_wider_type"],
    *["meet", "reduce", "depth_to_space", "space_to_depth"] * 2,
]


def worst_difference(before, after):
    """Return the largest difference of two lists of outputs, each relative to the largest element of its output.

    An output that is next to nothing is the difference of larger numbers, or the flat end of a sigmoid.
    """
    worst = 0.0
    for one, other in zip(before, after, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        one, other = one.astype(np.float64), other.astype(np.float64)
        assert np.isfinite(one).all()
        assert np.isfinite(other).all()
        worst = max(worst, float(np.abs(one - other).max(initial=0) / max(np.abs(one).max(initial=0), 0.05)))
    return worst
