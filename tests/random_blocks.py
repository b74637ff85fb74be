"""The blocks of random graphs: each adds nodes behind a value that the folds of fastbn may change, or pass."""

import numpy as np

# Elements of one value: small, so that a graph runs in a millisecond.
LARGEST = 4000


class Blocks:
    """What `random_graphs.Graph` chooses from."""

    def batch_norm(self, x, positive=False):
        shape = self.shapes[x]
        if len(shape) < 2:
            return
        c = shape[1]
        shift = 0 if self.chance(0.35) else 1
        sign = 1 if positive or self.chance(0.6) else self.rng.choice([-1, 1], c)
        parameters = [self.rng.uniform(0.5, 2, c) * sign, shift * self.rng.normal(size=c), shift * self.rng.normal(size=c)]
        parameters.append(self.rng.uniform(0.3, 3, c))
        self.node("BatchNormalization", [x, *(self.constant(p.astype(np.float32)) for p in parameters)], shape)

    def elementwise(self, x):
        shape = self.shapes[x]
        axis = int(self.rng.integers(len(shape))) if len(shape) < 2 or self.chance(0.4) else 1
        kind = [1] * (len(shape) - axis)
        if not self.chance(0.2):
            kind[0] = shape[axis]
        if self.chance(0.1):
            kind = [] if self.chance(0.5) else [1] * (len(shape) - axis)
        elif self.chance(0.3):
            kind = [1] * axis + kind
        k = self.factor(*kind)
        op = self.one(["Add", "Sub", "Mul", "Div"])
        turned = self.chance(0.3) and op != "Div"
        self.node(op, [k, x] if turned else [x, k], shape)

    def conv(self, x):
        shape = self.shapes[x]
        count = len(shape) - 2
        if count < 1:
            return
        c = shape[1]
        groups = self.one([g for g in (1, 1, 2, c) if c % g == 0])
        out = groups * self.one([1, 2]) if groups > 2 else self.one([2, 4, 6])
        if self.chance(0.3):
            out = c
        kernel = [self.one([1, 2, 3]) for _ in range(count)]
        attributes, sizes = {"group": groups}, []
        strides, dilations = [self.one([1, 1, 2]) for _ in range(count)], [self.one([1, 1, 2]) for _ in range(count)]
        pads = [0] * 2 * count
        mode = self.one(["none", "none", "pads", "same", "auto", "valid"])
        if mode == "pads":
            pads = self.rng.integers(0, 2, 2 * count).tolist()
        elif mode == "same":
            kernel, strides = [self.one([1, 3])] * count, [1] * count
            pads = [d * (k - 1) // 2 for d, k in zip(dilations, kernel, strict=True)] * 2
            out = c if self.chance(0.7) else out
        elif mode == "auto":
            dilations = [1] * count
            attributes["auto_pad"] = self.one(["SAME_UPPER", "SAME_LOWER"])
        elif mode == "valid":
            attributes["auto_pad"] = "VALID"
        if out % groups:
            out = groups
        for at, size in enumerate(shape[2:]):
            reach = dilations[at] * (kernel[at] - 1) + 1
            sizes.append(-(-size // strides[at]) if mode == "auto" else (size + pads[at] + pads[at + count] - reach) // strides[at] + 1)
        if min(sizes) < 1:
            return
        if mode in ("pads", "same"):
            attributes["pads"] = pads
        inputs = [x, self.weight(out, c // groups, *kernel, fan_in=c // groups * np.prod(kernel))]
        if self.chance(0.6):
            inputs.append(self.weight(out))
        self.node("Conv", inputs, (shape[0], out, *sizes), strides=strides, dilations=dilations, **attributes)

    def conv_transpose(self, x):
        shape = self.shapes[x]
        count = len(shape) - 2
        if count < 1:
            return
        c = shape[1]
        groups = self.one([g for g in (1, 2, c) if c % g == 0])
        per_group, kernel, stride = self.one([1, 2]), self.one([1, 2, 3]), self.one([1, 1, 2])
        pad = self.one([0, 0, kernel - 1])
        sizes = [stride * (size - 1) + kernel - 2 * pad for size in shape[2:]]
        if min(sizes) < 1 or shape[0] * per_group * groups * np.prod(sizes) > LARGEST:
            return
        inputs = [x, self.weight(c, per_group, *[kernel] * count, fan_in=c // groups * kernel)]
        if self.chance(0.5):
            inputs.append(self.weight(per_group * groups))
        attributes = {"group": groups, "strides": [stride] * count, "pads": [pad] * 2 * count}
        self.node("ConvTranspose", inputs, (shape[0], per_group * groups, *sizes), **attributes)

    def gemm(self, x):
        shape = self.shapes[x]
        if len(shape) != 2:
            return
        a, b, out = self.chance(0.3), self.chance(0.5), self.one([2, 4, 6, shape[0]])
        rows, inner = shape[::-1] if a else shape
        inputs = [x, self.weight(*((out, inner) if b else (inner, out)), fan_in=inner)]
        if self.chance(0.7) or self.opset < 11:
            inputs.append(self.weight(*self.one([(out,), (1,), (rows, 1), (rows, out), (1, out)])))
        attributes = {"alpha": self.one([1.0, 0.5, -2.0]), "beta": self.one([1.0, 0.5, 0.0])}
        self.node("Gemm", inputs, (rows, out), transA=int(a), transB=int(b), **attributes)

    def matmul(self, x):
        shape = self.shapes[x]
        out = self.one([2, 4, shape[-1]])
        kind = self.one(["right", "right", "right", "left", "vector", "left vector", "batch"])
        if kind == "right" and self.opset >= 12 and self.expressions.random() < 0.4:
            weight = self.weight(out, shape[-1], fan_in=shape[-1])
            first = self.expressions.random() < 0.5
            equation = "oi,...i->...o" if first else "...i,oi->...o"
            self.node("Einsum", [weight, x] if first else [x, weight], (*shape[:-1], out), equation=equation)
        elif kind == "right" and self.opset >= 12 and len(shape) > 2 and self.expressions.random() < 0.4:
            weight = self.weight(out, shape[1], fan_in=shape[1])
            self.node("Einsum", [x, weight], (shape[0], out, *shape[2:]), equation="bc...,oc->bo...")
        elif kind == "right":
            self.node("MatMul", [x, self.weight(shape[-1], out, fan_in=shape[-1])], (*shape[:-1], out))
        elif kind == "vector" and len(shape) > 1:
            self.node("MatMul", [x, self.weight(shape[-1], fan_in=shape[-1])], shape[:-1])
        elif kind == "left":
            inner = shape[-2] if len(shape) > 1 else shape[0]
            out = self.one([4, inner])
            self.node("MatMul", [self.weight(out, inner, fan_in=inner), x], (*shape[:-2], out, *shape[-1:]) if len(shape) > 1 else (out,))
        elif kind == "left vector" and len(shape) > 1:
            self.node("MatMul", [self.weight(shape[-2], fan_in=shape[-2]), x], (*shape[:-2], shape[-1]))
        elif kind == "batch" and len(shape) == 3:
            self.node("MatMul", [x, self.weight(shape[0], shape[-1], out, fan_in=shape[-1])], (*shape[:-1], out))

    def recurrent(self, x):
        shape = self.shapes[x]
        if len(shape) != 3:
            return
        if self.chance(0.4):  # its features stand on the last axis, a norm's channels on axis 1
            self.batch_norm(x)
            x, shape = self.latest, (shape[0], shape[2], shape[1])
            x = self.node("Transpose", [x], shape, perm=[0, 2, 1])
        op = self.one(["LSTM", "GRU", "RNN"])
        gates, hidden, directions = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 3, self.one([1, 2])
        inner = shape[2]
        inputs = [x, self.weight(directions, gates * hidden, inner, fan_in=inner)]
        inputs.append(self.weight(directions, gates * hidden, hidden, fan_in=hidden))
        if self.chance(0.6):
            inputs.append(self.weight(directions, 2 * gates * hidden))
        direction = "bidirectional" if directions == 2 else self.one(["forward", "reverse"])
        extra = {"linear_before_reset": self.one([0, 1])} if op == "GRU" else {}
        self.node(op, inputs, (shape[0], directions, shape[1], hidden), hidden_size=hidden, direction=direction, **extra)

    def activation(self, x):
        op = self.one(["Relu", "Relu", "LeakyRelu", "PRelu", "Neg", "Identity", "Abs"])
        inputs = [x]
        if op == "PRelu":
            shape = self.shapes[x]
            inputs.append(
                self.constant(self.rng.uniform(0.1, 0.5, (shape[1], *[1] * (len(shape) - 2)) if len(shape) > 1 else ()).astype("f"))
            )
        self.node(op, inputs, self.shapes[x], **({"alpha": 0.3} if op == "LeakyRelu" else {}))

    def block(self, x):
        self.node("Tanh", [x], self.shapes[x])

    def dropout(self, x):
        if self.one([0, 0, 1]):
            self.node("Cast", [x], self.shapes[x], to=self.type)
        elif self.opset < 12:
            self.node("Dropout", [x], self.shapes[x], ratio=0.4)
        else:
            self.node("Dropout", [x, self.constant(np.float32(0.4))][: self.one([1, 2])], self.shapes[x])

    def pool(self, x):
        shape = self.shapes[x]
        count = len(shape) - 2
        if count < 1:
            return
        op = self.one(["MaxPool", "AveragePool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"])
        if op.startswith("Global"):
            self.node(op, [x], (*shape[:2], *[1] * count))
            return
        kernel, stride, pad = self.one([2, 3]), self.one([1, 2]), self.one([0, 0, 1])
        ceil = self.opset >= 10 and self.chance(0.3)
        attributes = {"ceil_mode": 1} if ceil else {}
        if op == "AveragePool":
            attributes["count_include_pad"] = self.one([0, 1])
        sizes = []
        for size in shape[2:]:
            room = size + 2 * pad - kernel
            steps = -(-room // stride) if ceil else room // stride
            if room < 0 or (ceil and steps * stride >= size + pad):
                return
            sizes.append(steps + 1)
        self.node(
            op, [x], (*shape[:2], *sizes), kernel_shape=[kernel] * count, strides=[stride] * count, pads=[pad] * 2 * count, **attributes
        )

    def reduce(self, x):
        shape = self.shapes[x]
        op = self.one(["ReduceMean", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"])
        axes = sorted(self.rng.choice(len(shape), size=self.rng.integers(1, len(shape)), replace=False).tolist()) if len(shape) > 1 else [0]
        keep = self.one([0, 1])
        after = [1 if at in axes else size for at, size in enumerate(shape) if keep or at not in axes]
        named = [at - len(shape) if self.chance(0.3) and self.opset >= 11 else at for at in axes]
        if after:
            self.by_opset(13 if op == "ReduceSum" else 18, op, x, "axes", named, after, keepdims=keep)

    def concat(self, x):
        shape = self.shapes[x]
        axis = int(self.rng.integers(len(shape))) if self.chance(0.3) or len(shape) < 2 else 1
        others = [
            name
            for name, other in self.shapes.items()
            if len(other) == len(shape) and all(a == b for at, (a, b) in enumerate(zip(other, shape, strict=True)) if at != axis)
        ]
        parts = [x, *(self.one(others) for _ in range(self.one([1, 1, 2])))]
        if self.chance(0.15):
            parts.append(self.weight(*shape))
        self.rng.shuffle(parts)
        total = sum(self.shapes.get(name, shape)[axis] for name in parts)
        after = (*shape[:axis], total, *shape[axis + 1 :])
        if np.prod(after) <= LARGEST:
            self.node("Concat", parts, after, axis=axis - len(shape) if self.opset >= 11 and self.chance(0.3) else axis)

    def split(self, x):
        shape = self.shapes[x]
        axis = self.one([at for at, size in enumerate(shape) if size > 1] or [None])
        if axis is None:
            return
        first = int(self.rng.integers(1, shape[axis]))
        parts = [first, shape[axis] - first]
        self.by_opset(13, "Split", x, "split", parts, [(*shape[:axis], part, *shape[axis + 1 :]) for part in parts], axis=axis, outputs=2)

    def choose(self, x):
        shape = self.shapes[x]
        axis = self.one([at for at, size in enumerate(shape) if size > 1] or [None])
        if axis is None:
            return
        size = shape[axis]
        if self.chance(0.5):
            chosen = self.rng.permutation(size)[: self.rng.integers(1, size + 1)] - (size if self.chance(0.3) else 0)
            if self.chance(0.2):
                chosen = np.append(chosen, chosen[0])
            self.node("Gather", [x, self.ints(*chosen)], (*shape[:axis], len(chosen), *shape[axis + 1 :]), axis=axis)
            return
        step = self.one([1, 2, -1]) if self.opset >= 10 else 1
        start, end = (0, size - 1) if self.chance(0.5) else (1, 2**31)
        if step < 0:
            start, end = size - 1, -(2**31) if self.chance(0.5) else 0
        length = len(range(size)[slice(start, None if end < 0 else end, step)])
        after = (*shape[:axis], length, *shape[axis + 1 :])
        if self.opset < 10:
            self.node("Slice", [x], after, starts=[start], ends=[end], axes=[axis])
        else:
            self.node("Slice", [x, *(self.ints(number) for number in (start, end, axis, step))], after)

    def transpose(self, x):
        perm = self.rng.permutation(len(self.shapes[x])).tolist()
        if self.chance(0.15):
            self.node("Transpose", [x], self.shapes[x][::-1])
        else:
            self.node("Transpose", [x], [self.shapes[x][at] for at in perm], perm=perm)

    def reshape(self, x):
        shape = self.shapes[x]
        kind = self.one(["flatten", "merge", "split", "unsqueeze", "squeeze", "reshape"])
        if kind == "flatten":
            axis = int(self.rng.integers(len(shape) + 1)) if self.chance(0.3) else 1
            self.node("Flatten", [x], (np.prod(shape[:axis], dtype=int), np.prod(shape[axis:], dtype=int)), axis=axis)
        elif kind == "merge" and len(shape) > 2:
            at = int(self.rng.integers(len(shape) - 1))
            after = (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
            self.node("Reshape", [x, self.ints(*(0 if i < at and self.chance(0.5) else size for i, size in enumerate(after)))], after)
        elif kind == "split" and len(shape) < 5:
            at = self.one([at for at, size in enumerate(shape) if size % 2 == 0 and size > 2] or [None])
            if at is not None:
                after = (*shape[:at], *self.one([(2, shape[at] // 2), (shape[at] // 2, 2)]), *shape[at + 1 :])
                self.node("Reshape", [x, self.ints(*(-1 if i == len(after) - 1 else size for i, size in enumerate(after)))], after)
        elif kind == "unsqueeze" and len(shape) < 5:
            at = int(self.rng.integers(len(shape) + 1))
            self.by_opset(13, "Unsqueeze", x, "axes", [at], (*shape[:at], 1, *shape[at:]))
        elif kind == "squeeze" and 1 in shape and len(shape) > 1:
            at = self.one([at for at, size in enumerate(shape) if size == 1])
            if self.opset >= 13 and self.chance(0.3):
                after = [size for size in shape if size != 1]
                if after:
                    self.node("Squeeze", [x], after)
            else:
                self.by_opset(13, "Squeeze", x, "axes", [at], (*shape[:at], *shape[at + 1 :]))
        elif kind == "reshape":
            size = int(np.prod(shape))
            first = self.one([n for n in (1, 2, 3, 4, 6, 8) if size % n == 0])
            self.node("Reshape", [x, self.ints(first, -1)], (first, size // first))

    def resize(self, x):
        shape = self.shapes[x]
        if len(shape) != 4 or np.prod(shape) > LARGEST // 4:
            return
        factors = [1, 1, self.one([1, 2]), 2] if self.chance(0.8) else [1, 2, 2, 1]
        after = [size * factor for size, factor in zip(shape, factors, strict=True)]
        mode = "nearest" if factors[1] != 1 else self.one(["nearest", "linear"])
        scales = np.array(factors, np.float32)
        if self.opset < 10:
            self.node("Upsample", [x, self.constant(scales, kept=True)], after, mode=mode)
        elif self.opset < 11:
            self.node("Resize", [x, self.constant(scales, kept=True)], after, mode=mode)
        elif self.opset >= 18 and self.chance(0.5):
            axes = [at for at, factor in enumerate(factors) if factor != 1]
            self.node("Resize", [x, "", self.constant(scales[axes], kept=True)], after, mode=mode, axes=axes)
        else:
            none = "" if self.opset >= 13 else self.constant(np.zeros(0, np.float32), kept=True)
            self.node(
                "Resize", self.one([[x, none, self.constant(scales, kept=True)], [x, none, none, self.ints(*after)]]), after, mode=mode
            )

    def depth_to_space(self, x):
        shape = self.shapes[x]
        if len(shape) != 4 or shape[1] % 4:
            return
        attributes = {"mode": self.one(["DCR", "CRD"])} if self.opset >= 11 else {}
        self.node("DepthToSpace", [x], (shape[0], shape[1] // 4, 2 * shape[2], 2 * shape[3]), blocksize=2, **attributes)

    def space_to_depth(self, x):
        shape = self.shapes[x]
        if len(shape) == 4 and shape[2] % 2 == 0 and shape[3] % 2 == 0:
            self.node("SpaceToDepth", [x], (shape[0], shape[1] * 4, shape[2] // 2, shape[3] // 2), blocksize=2)

    def expand(self, x):
        shape = self.shapes[x]
        after = [2 if size == 1 else size for size in shape]
        if self.chance(0.4) and len(after) < 5:
            after = [2, *after]
        if np.prod(after) <= LARGEST:
            self.node("Expand", [x, self.ints(*after)], after)

    def pad(self, x):
        shape = self.shapes[x]
        pads = [0] * 2 * len(shape)
        for at in range(len(shape)):
            if shape[at] > 2 and self.chance(0.4):
                pads[at], pads[at + len(shape)] = self.one([0, 1]), self.one([1, 2])
        after = [size + pads[at] + pads[at + len(shape)] for at, size in enumerate(shape)]
        mode = self.one(["constant", "edge", "reflect"])
        if np.prod(after) > LARGEST or (mode != "constant" and len(shape) < 3):
            return
        if self.opset >= 18 and self.chance(0.5):
            axes = [at for at in range(len(shape)) if pads[at] or pads[at + len(shape)]] or [0]
            short = [pads[at] for at in axes] + [pads[at + len(shape)] for at in axes]
            self.node("Pad", [x, self.ints(*short), "", self.ints(*axes)], after, mode=mode)
        else:
            self.by_opset(11, "Pad", x, "pads", pads, after, mode=mode)

    def combine(self, x):
        shape = self.shapes[x]
        other = self.alike(shape, but=None if self.chance(0.1) else x)
        if other is None:
            return
        op = self.one(["Add", "Add", "Add", "Sub", "Mul", "Div", "Sum"])
        if op == "Div":
            bounded = self.node("Sigmoid", [other], self.shapes[other])
            other = self.node("Add", [bounded, self.constant(np.float32(0.5))], self.shapes[other])
        pair = [x, other]
        if op != "Div":
            self.rng.shuffle(pair)
        self.node(op, pair, shape)

    def repvgg(self, x):
        """Two convolutions and the identity, each with or without its norm, added."""
        shape = self.shapes[x]
        if len(shape) != 4:
            return
        branches = []
        for kernel in (3, 1, 0):
            self.latest = x
            if kernel:
                groups = self.one([g for g in (1, 2) if shape[1] % g == 0])
                weight = self.weight(shape[1], shape[1] // groups, kernel, kernel, fan_in=shape[1] * kernel * kernel)
                self.node("Conv", [x, weight], shape, pads=[kernel // 2] * 4, group=groups)
            if self.chance(0.8) or not kernel:
                self.batch_norm(self.latest)
            branches.append(self.latest)
        self.rng.shuffle(branches)
        self.node("Add", branches[1:], shape)
        self.node("Add", [self.latest, branches[0]], shape)
