"""More blocks of random graphs: other normalizations, joins, selections, and patterns that exporters write around a norm."""

import numpy as np
from onnx import TensorProto
from random_blocks import LARGEST


class Operators:
    """What `random_graphs.Graph` chooses from, beside `random_blocks.Blocks`."""

    # Whether a Cast up may stand before a Cast down.
    bare_casts = True

    # Absorbers.
    def norm_by_data(self, x):
        """A normalization by the statistics of the data, large eps: next to no variance would make noise large."""
        shape = self.shapes[x]
        ops = ["InstanceNormalization"] * (len(shape) > 2) + ["LayerNormalization"] * (self.opset >= 17)
        ops += ["GroupNormalization"] * (len(shape) > 2 and self.opset >= 21) + ["RMSNormalization"] * 2 * (self.opset >= 23)
        if not ops:
            return
        op, attributes = self.one(ops), {"epsilon": 0.1}
        if op in ("InstanceNormalization", "GroupNormalization"):
            size = shape[1:2]
        else:
            attributes["axis"] = self.one([-1, -1, len(shape) - 1, int(self.rng.integers(len(shape)))])
            size = shape[attributes["axis"] :]
            if self.chance(0.2):
                size = (*[1] * (len(size) - 1), size[-1])
        if op == "GroupNormalization":
            attributes["num_groups"] = self.one([groups for groups in (1, 2, 3, shape[1]) if shape[1] % groups == 0])
        inputs = [x, self.factor(*size)]
        if op in ("InstanceNormalization", "GroupNormalization") or (op == "LayerNormalization" and self.chance(0.7)):
            inputs.append(self.weight(*size))
        self.node(op, inputs, shape, **attributes)
        if op == "InstanceNormalization" and set(shape[2:]) == {1}:
            self.singles.add(self.nodes[-1].name)

    def deform_conv(self, x):
        shape = self.shapes[x]
        if len(shape) != 4 or self.opset < 19 or min(shape[2:]) < 2:
            return
        n, c, *sizes = shape
        groups = self.one([g for g in (1, 2) if c % g == 0])
        out, kernel, pad = groups * self.one([1, 2]), self.one([1, 2]), self.one([0, 0, 1])
        after = [size + 2 * pad - kernel + 1 for size in sizes]
        inside = self.chance(0.5)
        taps = kernel * kernel
        offset = np.zeros((n, 2 * taps, *after)) if inside else self.rng.normal(size=(n, 2 * taps, *after)) * 0.5
        inputs = [x, self.weight(out, c // groups, kernel, kernel, fan_in=c // groups * taps), self.constant(offset.astype(np.float32))]
        inputs.append(self.weight(out) if self.chance(0.6) else "")
        if self.chance(0.4):
            inputs.append(self.constant(self.rng.uniform(0.2, 1, (n, taps, *after)).astype(np.float32)))
        attributes = {"group": groups, "pads": [pad] * 4, "kernel_shape": [kernel] * 2}
        self.node("DeformConv", inputs if inputs[-1] else inputs[:-1], (n, out, *after), **attributes)

    def repvit(self, x):
        """A convolution of its own input, which is added as it is or scaled, and a norm behind them; or parts of them in a Concat."""
        shape = self.shapes[x]
        if len(shape) != 4:
            return
        c, branches = shape[1], [x]
        groups = self.one([g for g in (1, 2, c, c) if c % g == 0])
        for kernel in self.one([[3], [1], [3, 1]]):
            inputs = [x, self.weight(c, c // groups, kernel, kernel, fan_in=c // groups * kernel * kernel)]
            if self.chance(0.4):
                inputs.append(self.weight(c))
            self.node("Conv", inputs, shape, pads=[kernel // 2] * 4, group=groups)
            branches.append(self.latest)
        if self.chance(0.3):
            self.node("Mul", [x, self.factor(*self.one([(), (c, 1, 1), (1, c, 1, 1)]))], shape)
            branches[0] = self.latest
        elif self.expressions.random() < 0.5:
            branches[0] = self.multiple(x, shape)
        self.rng.shuffle(branches)
        self.node("Add", branches[:2], shape)
        if branches[2:]:
            self.node("Add", [self.latest, branches[2]], shape)
        if self.chance(0.2):
            both = [self.latest, x]
            if np.prod(shape) * 2 <= LARGEST:
                self.node("Concat", both, (shape[0], 2 * c, *shape[2:]), axis=1)
        self.batch_norm(self.latest)

    def multiple(self, x, shape):
        """The same value by another name, its negative, its double or a part of it."""
        inputs = {"Identity": [x], "Neg": [x], "Add": [x, x], "Mul": [x, self.constant(np.float32(0.5))]}
        op = list(inputs)[self.expressions.integers(len(inputs))]
        return self.node(op, inputs[op], shape)

    # Affines.
    def ghost_norm(self, x):
        """The same norm in each part of the batch, or (seldom) another one in each."""
        shape = self.shapes[x]
        if len(shape) < 2 or shape[0] % 2:
            return
        half, c = shape[0] // 2, shape[1]
        part = (half, *shape[1:])
        if self.expressions.random() < 0.3 and self.opset >= 10:
            name = [self.node("Slice", [x, self.ints(at), self.ints(at + half), self.ints(0)], part) for at in (0, half)]
        else:
            self.by_opset(13, "Split", x, "split", [half, half], [part, part], axis=0, outputs=2)
            name = self.nodes[-1].output
        parameters, normed, same = None, [], self.chance(0.8)
        for each in name:
            if parameters is None or not same:
                parameters = [self.rng.uniform(0.5, 2, c), self.rng.normal(size=c), self.rng.normal(size=c), self.rng.uniform(0.3, 3, c)]
                shared = [self.constant(values.astype(np.float32)) for values in parameters]
            if self.chance(0.5):
                shared = [self.constant(values.astype(np.float32)) for values in parameters]
            normed.append(self.node("BatchNormalization", [each, *shared], part))
        self.node("Concat", normed, shape, axis=0)

    def norm_in_wider_type(self, x):
        """Cast up, a norm, or a sign, or nothing, and Cast down."""
        shape = self.shapes[x]
        wide, dtype = (TensorProto.FLOAT, np.float32) if self.narrow else (TensorProto.DOUBLE, np.float64)
        up = self.node("Cast", [x], None, to=wide)
        if len(shape) > 1 and self.chance(0.7):
            c = shape[1]
            parameters = [self.factor_values(c), self.rng.normal(size=c), self.rng.normal(size=c), self.rng.uniform(0.3, 3, c)]
            up = self.node("BatchNormalization", [up, *(self.constant(each.astype(dtype), kept=True) for each in parameters)], None)
        elif not self.bare_casts or self.chance(0.5):
            up = self.node("Neg", [up], None)
        self.node("Cast", [up], shape, to=self.type)

    # Carriers.
    def mixed(self, x):
        """Return x times a square matrix: a value of the same shape that takes an affine."""
        shape = self.shapes[x]
        if len(shape) > 2:
            return self.node("Conv", [x, self.weight(shape[1], shape[1], *[1] * (len(shape) - 2), fan_in=shape[1])], shape)
        return self.node("MatMul", [x, self.weight(shape[-1], shape[-1], fan_in=shape[-1])], shape)

    def join(self, x):
        shape = self.shapes[x]
        op = self.one(["Mean", "Max", "Min", "Where", "Where", "Sum"])
        kind = self.one(["factor", "mixed", "mixed", "any", "any"])
        if kind == "mixed":
            pair = [self.mixed(x), self.mixed(x)]
        elif kind == "factor":  # all operands through the same factor
            other = self.node("Tanh", [x], shape)
            k = self.constant(np.float32(self.rng.uniform(0.5, 2)))
            pair = [self.node("Mul", [each, k], shape) for each in (x, other)]
        else:
            other = self.alike(shape, but=x)
            if other is None or self.chance(0.3):
                other = self.constant(self.rng.standard_normal(self.one([(), (1,), shape[-1:]])).astype(np.float32))
            pair = [x, other]
        self.rng.shuffle(pair)
        if op == "Where":
            size = [size if self.chance(0.7) else 1 for size in shape]
            pair.insert(0, self.constant(self.rng.random(size) < 0.6))
        elif self.chance(0.1):
            pair.append(x)
        self.node(op, [str(name) for name in pair], shape)
        if kind == "mixed" and self.chance(0.5):  # Max and Min pass no other
            self.batch_norm(self.latest, positive=True)

    def parts(self, x, axis, at):
        """Return the two parts of a value before and behind a place along an axis, by two Slices, by a Split or from a sequence."""
        shape, size = self.shapes[x], self.shapes[x][axis]
        halves = [(*shape[:axis], length, *shape[axis + 1 :]) for length in (at, size - at)]
        if self.opset >= 10 and self.chance(0.5):
            bounds = ((0, at, halves[0]), (at, self.one([size, 2**40]), halves[1]))
            return [self.node("Slice", [x, self.ints(start), self.ints(end), self.ints(axis)], half) for start, end, half in bounds]
        if self.opset >= 11 and not self.narrow and self.expressions.random() < 0.4:
            cut = self.node("SplitToSequence", [x, self.ints(at, size - at)], None, axis=axis)
            return [self.node("SequenceAt", [cut, self.constant(np.int64(number))], half) for number, half in enumerate(halves)]
        self.by_opset(13, "Split", x, "split", [at, size - at], halves, axis=axis, outputs=2)
        return list(self.nodes[-1].output)

    def meet(self, x):
        """Ways that come from one value and meet again: rolled, padded with its own other end, its halves or its pools combined."""
        shape = self.shapes[x]
        axes = [axis for axis, size in enumerate(shape) if size > 1]
        if not axes:
            return
        axis = self.one(axes)
        size = shape[axis]
        kind = self.one(["roll", "roll", "ring", "halves", "pools", "itself"])
        if kind == "roll":
            parts = self.parts(x, axis, int(self.rng.integers(1, size)))
            if self.chance(0.3):
                parts[1] = self.node("Neg", [self.node("Neg", [parts[1]], self.shapes[parts[1]])], self.shapes[parts[1]])
            self.node("Concat", parts[::-1], shape, axis=axis)
            if self.chance(0.3):
                self.node(self.one(["Add", "Sum", "Mean", "Max", "Sub"]), [x, self.latest], shape)
        elif kind == "ring" and np.prod(shape) // size * (size + 2) <= LARGEST:
            first, last = self.parts(x, axis, 1)[0], self.parts(x, axis, size - 1)[1]
            self.node("Concat", [last, x, first], (*shape[:axis], size + 2, *shape[axis + 1 :]), axis=axis)
        elif kind == "halves" and size % 2 == 0:
            pair = self.parts(x, axis, size // 2)
            self.node(self.one(["Add", "Max", "Min", "Mean", "Sum", "Sub"]), pair, self.shapes[pair[0]])
        elif kind == "pools" and len(shape) > 2:
            attributes = {"kernel_shape": [3] * (len(shape) - 2), "pads": [1] * 2 * (len(shape) - 2)}
            pair = [self.node(op, [x], shape, **attributes) for op in ("MaxPool", "AveragePool")]
            self.node(self.one(["Add", "Max", "Mean"]), pair, shape)
        elif kind == "itself":
            self.node(self.one(["Add", "Sum", "Mean", "Max"]), [x, x], shape)
        if len(self.shapes[self.latest]) > 1 and self.chance(0.5):
            self.batch_norm(self.latest, positive=self.chance(0.5))

    def tile(self, x):
        shape = self.shapes[x]
        repeats = [self.one([1, 1, 2]) for _ in shape]
        after = [size * times for size, times in zip(shape, repeats, strict=True)]
        if np.prod(after) <= LARGEST:
            self.node("Tile", [x, self.ints(*repeats)], after)

    def reverse(self, x):
        shape = self.shapes[x]
        if len(shape) < 2 or self.opset < 10:
            return
        time = self.one([0, 1])
        lengths = self.rng.integers(1, shape[time] + 1, shape[1 - time])
        self.node("ReverseSequence", [x, self.ints(*lengths)], shape, time_axis=time, batch_axis=1 - time)

    def lp_pool(self, x):
        shape = self.shapes[x]
        count = len(shape) - 2
        if count < 1:
            return
        p = self.one([1, 2, 3])
        if self.chance(0.4) and self.opset < 22:  # onnxruntime has no kernel of opset 22
            self.node("GlobalLpPool", [x], (*shape[:2], *[1] * count), p=p)
            return
        kernel, stride, pad = self.one([2, 3]), self.one([1, 2]), self.one([0, 0, 1])
        sizes = [(size + 2 * pad - kernel) // stride + 1 for size in shape[2:]]
        if min(sizes) < 1 or min(shape[2:]) + 2 * pad < kernel:
            return
        attributes = {"kernel_shape": [kernel] * count, "strides": [stride] * count, "pads": [pad] * 2 * count}
        self.node("LpPool", [x], (*shape[:2], *sizes), p=p, **attributes)

    def gather_elements(self, x):
        shape = self.shapes[x]
        if self.opset < 11:
            return
        axis = int(self.rng.integers(len(shape)))
        after = list(shape)
        after[axis] = int(self.rng.integers(1, shape[axis] + 2))
        if self.chance(0.1):
            after = [int(self.rng.integers(1, size + 1)) for size in after]
        indices = self.rng.integers(-shape[axis] if self.chance(0.3) else 0, shape[axis], after)
        if np.prod(after) <= LARGEST:
            self.node("GatherElements", [x, self.constant(indices)], after, axis=axis)

    def gather_blocks(self, x):
        shape = self.shapes[x]
        if self.opset < 12:
            return
        batch = int(self.rng.integers(min(2, len(shape) - 1) + 1)) if len(shape) > 1 else 0
        depth = 2 if len(shape) > batch + 1 and self.chance(0.2) else 1
        count = int(self.rng.integers(1, shape[batch] + 2))
        indices = np.stack([self.rng.integers(0, shape[batch + at], (*shape[:batch], count)) for at in range(depth)], -1)
        after = (*shape[:batch], count, *shape[batch + depth :])
        if np.prod(after) <= LARGEST:
            self.node("GatherND", [x, self.constant(indices)], after, batch_dims=batch)
