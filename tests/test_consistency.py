"""The check of written models: a fault of the writer that makes a wrong or invalid model is an error, and nothing is written."""

import pytest
from onnx import helper
from sketch import classifier, conv_bn, model, norm, normal

import fastbn
from fastbn.graph.rewrite import writer

RESIDUAL = """(float[N,4,8,8] x) => (float[N,4,8,8] y) {
    c = Conv(x, w)
    n = BatchNormalization(c, s, t, m, v)
    d = Conv(n, w)
    e = Add(d, k)
    y = Add(e, x)
}"""


def residual():
    return model(RESIDUAL, w=normal(4, 4, 1, 1), k=normal(4, 1, 1), **norm(4))


def body():
    text = """(float[N,3,8,8] x, bool cond) => (float[N,4,6,6] y) {
        c = Conv(x, w, b)
        h = BatchNormalization(c, s, t, m, v)
        y = If (cond) <
            then_branch = g1 () => (float[N,4,6,6] p) { z = Conv(h, w2) p = BatchNormalization(z, s, t, m, v) },
            else_branch = g2 () => (float[N,4,6,6] q) { q = Identity(h) }
        >
    }"""
    return conv_bn(text, w2=normal(4, 4, 1, 1))


def _rebuilt(self, order):
    ordered = order(list(enumerate(self.graphs)))
    gone = {(node.scope.number, node.position) for node in self.unwritten}
    for number, graph in ordered:
        nodes = [node for position, node in enumerate(graph.node) if (number, position) not in gone]
        del graph.node[:]
        graph.node.extend(nodes)


def misnamed(self):
    """Leave the names as they are: the readers of the norm then read a value that no node gives."""


def unwritten(self, node, slot, constant):
    """Return the name of the old constant without writing the new one."""
    return node.input(slot).name if node.input(slot) is not None else node.inputs[1].name


def unshared(original):
    """Write over a weight that another node reads too."""

    def write(self, node, slot, constant):
        old = node.input(slot)
        if old is None or old.initializer is None:
            return original(self, node, slot, constant)
        self._fill(0, self.tensors[0][old.name], constant)
        return old.name

    return write


def misdirected(original):
    """Let the reader of a removed node read another value."""

    def names(self):
        original(self)
        self.proto.graph.node[2].input[0] = "x"

    return names


def dropped(original):
    """Leave out a node that no plan removes."""

    def rebuild(self):
        original(self)
        del self.proto.graph.node[-1]

    return rebuild


def doubled(original):
    """Write a name twice."""

    def rebuild(self):
        original(self)
        self.proto.graph.node[-2].output[0] = self.proto.graph.node[-1].output[0]

    return rebuild


def without_attributes(original):
    """Forget an attribute that a plan sets."""
    return lambda proto, constants, attributes: original(proto, constants, {})


FAULTS = {
    "bodies are copied before they are edited": (body, "_rebuild_graphs", lambda _: lambda self: _rebuilt(self, list), "planned are"),
    "names are not taken over": (residual, "_take_over_names", lambda _: misnamed, "nothing gives the value|has two sources"),
    "a constant is not written": (classifier, "_write_constant", lambda _: unwritten, "Cannot write the model"),
    "a shared weight is written over": (residual, "_write_constant", unshared, "has 2 readers"),
    "a node reads another value": (residual, "_take_over_names", misdirected, "is not the value that is planned"),
    "a node is lost": (residual, "_rebuild_graphs", dropped, "planned are"),
    "a name is given twice": (residual, "_rebuild_graphs", doubled, "two sources"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_writer_is_said(fault, monkeypatch, tmp_path):
    make, name, change, message = FAULTS[fault]
    assert fastbn.fold(make(), verify=False).folded
    monkeypatch.setattr(writer._Writer, name, change(getattr(writer._Writer, name)))
    with pytest.raises(fastbn.ModelError, match=message) as error:
        fastbn.fold(make(), verify=False).save(tmp_path / "out.onnx")
    assert str(error.value).startswith("Cannot write the model: ")
    assert not list(tmp_path.iterdir())


def test_a_forgotten_attribute_is_said(monkeypatch):
    text = "(float[5,3] x) => (float[5,4] y) { c = Gemm<beta = 0.5>(x, w, b) y = BatchNormalization(c, s, t, m, v) }"
    proto = model(text, w=normal(3, 4), b=normal(4), **norm(4))
    monkeypatch.setattr(writer, "edited", without_attributes(writer.edited))
    with pytest.raises(fastbn.ModelError, match=r"attribute 'beta' of Gemm 'c' is not 1.0"):
        fastbn.fold(proto, verify=False)


def test_a_lost_norm_is_said(monkeypatch):
    """A norm that stays although its affine has gone into the weights."""
    proto = conv_bn()

    def kept(self):
        self.proto.graph.node[1].output[0] = "y"
        self.proto.graph.node[0].output[0] = "c"

    monkeypatch.setattr(writer._Writer, "_rebuild_graphs", kept)
    with pytest.raises(fastbn.ModelError, match="it has 1 BatchNormalization, planned are 0"):
        fastbn.fold(proto, verify=False)


def test_names_that_bodies_have_in_common_are_no_fault():
    """Two branches may use one name each for itself."""
    proto = body()
    for attribute in proto.graph.node[2].attribute:
        if attribute.name == "else_branch":
            del attribute.g.node[:]
            attribute.g.node.extend([helper.make_node("Tanh", ["h"], ["z"]), helper.make_node("Identity", ["z"], ["q"])])
    assert len(fastbn.fold(proto, verify=False).folded) == 2
