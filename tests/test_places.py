"""The places of external tensors: each is checked when the model is read, wherever the tensor stands, before anything is written."""

import os
import resource
import shutil
import socket
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from sketch import assert_same, conv_bn, model, norm, normal

import fastbn
from fastbn.cli import main
from fastbn.graph.model import storage
from fastbn.graph.model.external import external_tensors

# Tensors that no fold touches: in the graph, in a body, in a function, in attributes, sparse.
VALUES = np.arange(1.0, 5.0, dtype=np.float32)


def external(name="k", location="k.data", **entries):
    """Return a tensor of VALUES in a data file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def in_graph(tensor):
    proto = conv_bn()
    proto.graph.initializer.append(tensor)
    proto.graph.node.add(op_type="Mul", input=["k", "k"], output=["z"], name="z")
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [4]))
    return proto


def in_constant(tensor):
    proto = in_graph(numpy_helper.from_array(VALUES, "other"))
    constant = helper.make_node("Constant", [], ["k"], name="k")
    constant.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=tensor))
    proto.graph.node.insert(0, constant)
    return proto


def in_body(tensor):
    text = """(float[N,3,8,8] x, bool flag) => (float[N,4,6,6] y, float[4] z) {
        c = Conv(x, w, b)
        y = BatchNormalization(c, s, t, m, v)
        z = If (flag) <then_branch = yes () => (a) { a = Identity(k) }, else_branch = no () => (e) { e = Neg(k) }>
    }"""
    proto = conv_bn(text)
    for attribute in proto.graph.node[2].attribute:
        attribute.g.initializer.append(tensor)
    return proto


def in_function(tensor):
    proto = in_graph(numpy_helper.from_array(VALUES, "other"))
    constant = helper.make_node("Constant", [], ["r"])
    constant.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=tensor))
    proto.functions.append(helper.make_function("own", "Four", [], ["r"], [constant], [helper.make_opsetid("", 17)]))
    proto.opset_import.append(helper.make_opsetid("own", 1))
    proto.graph.node.insert(0, helper.make_node("Four", [], ["k"], domain="own", name="four"))
    return proto


def in_sparse(tensor):
    proto = in_graph(numpy_helper.from_array(VALUES, "other"))
    constant = helper.make_node("Constant", [], ["k"], name="k")
    indices = numpy_helper.from_array(np.arange(4), "i")
    sparse = onnx.SparseTensorProto(values=tensor, indices=indices, dims=[4])
    constant.attribute.append(onnx.AttributeProto(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse))
    proto.graph.node.insert(0, constant)
    return proto


def in_default(tensor):
    """The value that an attribute of a function has where a call gives none."""
    proto = in_function(numpy_helper.from_array(VALUES, "other"))
    function = proto.functions[0]
    function.attribute_proto.append(onnx.AttributeProto(name="four", type=onnx.AttributeProto.TENSOR, t=tensor))
    function.node[0].attribute[0].CopyFrom(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, ref_attr_name="four"))
    return proto


def in_sparse_initializer(tensor):
    proto = conv_bn()
    indices = numpy_helper.from_array(np.arange(4), "i")
    proto.graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor, indices=indices, dims=[4]))
    return proto


def in_training(tensor):
    proto = conv_bn()
    proto.training_info.add().initialization.initializer.append(tensor)
    return proto


WHERE = {"graph": in_graph, "constant": in_constant, "body": in_body, "function": in_function, "sparse": in_sparse}
WHERE |= {"default": in_default, "sparse initializer": in_sparse_initializer, "training": in_training}

# onnxruntime reads no sparse tensor from a file, and no training graph; the one with a body has two inputs.
NOT_RUN = ("sparse", "body", "sparse initializer", "training")


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    """A folder inside another with a secret, with k.data, empty.data, a folder, a FIFO and links."""
    (tmp_path / "secret.txt").write_bytes(bytes(64))
    here = tmp_path / "here"
    (here / "folder").mkdir(parents=True)
    monkeypatch.chdir(here)
    (here / "k.data").write_bytes(VALUES.tobytes())
    (here / "empty.data").write_bytes(b"")
    os.mkfifo(here / "fifo")
    (here / "out-of-it").symlink_to("../secret.txt")
    (here / "device").symlink_to("/dev/zero")
    (here / "dangling").symlink_to("nowhere")
    (here / "way-out").symlink_to("..")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    (here / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    (here / "*" / "_ORT_MEM_ADDR_" / "*").write_bytes(VALUES.tobytes())
    return here


@pytest.mark.parametrize("where", WHERE)
def test_a_good_place_is_copied_along(where, here):
    inline = WHERE[where](numpy_helper.from_array(VALUES, "k"))
    (here / "in.onnx").write_bytes(WHERE[where](external()).SerializeToString())
    assert main(["fold", "in.onnx", "out.onnx", "-q", "--no-verify"]) == 0
    (here / "k.data").unlink()
    assert (here / "out.onnx.data").read_bytes() == VALUES.tobytes()
    proto = onnx.load("out.onnx", load_external_data=False)
    tensor, *_ = external_tensors(proto)
    assert [entry.value for entry in tensor.external_data if entry.key == "location"] == ["out.onnx.data"]
    source = storage.load("out.onnx")
    assert source.external(tensor).tobytes() == VALUES.tobytes()
    if where not in NOT_RUN:
        feeds = {"x": normal(2, 3, 8, 8)}
        assert_same(inline, onnx.ModelProto.FromString(fastbn.fold("out.onnx", verify=False).to_bytes()), feeds)


BAD = {
    "a file outside": {"location": "../secret.txt"},
    "an absolute file": {"location": "/etc/passwd"},
    "a way out below": {"location": "folder/../../secret.txt"},
    "a link that leads out": {"location": "out-of-it"},
    "a linked folder that leads out": {"location": "way-out/secret.txt"},
    "a link to a device": {"location": "device"},
    "a dangling link": {"location": "dangling"},
    "no location": {"location": None},
    "an empty location": {"location": ""},
    "a NUL": {"location": "k.data\0"},
    "a NUL within": {"location": "k\0.data"},
    "a way out by backslashes": {"location": "folder\\..\\..\\secret.txt"},
    "a way out and back": {"location": "../here/k.data"},
    "a way up and down": {"location": "folder/../k.data"},
    "a drive": {"location": "C:k.data"},
    "another case": {"location": "K.DATA"},
    "a name of a home": {"location": "~/k.data"},
    "an address in memory": {"location": "*/_ORT_MEM_ADDR_/*", "offset": 0, "length": 16},
    "a FIFO": {"location": "fifo"},
    "a socket": {"location": "socket"},
    "a file as a folder": {"location": "k.data/k.data"},
    "a folder": {"location": "folder"},
    "the folder itself": {"location": "."},
    "no such file": {"location": "none.data"},
    "a name too long": {"location": "k" * 300},
    "a path too long": {"location": "k/" * 5000},
    "a negative offset": {"offset": -4},
    "an offset behind the end": {"offset": 4},
    "an offset far away": {"offset": 2**62},
    "an offset of no number": {"offset": "1_0"},
    "an offset of many digits": {"offset": "9" * 400},
    "an offset beyond 64 bits": {"offset": 2**64},
    "an offset and a length that overflow": {"offset": 2**63 - 8, "length": 16},
    "a length of no number": {"length": "16 "},
    "a negative length": {"length": -16},
    "a length behind the end": {"length": 32},
    "a length for other sizes": {"length": 8},
    "an empty file": {"location": "empty.data"},
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("case", BAD)
def test_a_bad_place_stops_everything(case, where, here, capsys):
    (here / "in.onnx").write_bytes(WHERE[where](external(**BAD[case])).SerializeToString())
    before = sorted(os.listdir(here))
    assert main(["fold", "in.onnx", "out.onnx", "--no-verify"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(("fastbn: Expected ", "fastbn: Cannot "))
    assert sorted(os.listdir(here)) == before


def from_memory(name):
    fastbn.fold(onnx.ModelProto.FromString(Path(name).read_bytes()), verify=False)


# Every way to read a model, of which "good.onnx" is one that can be read.
READERS = {
    "verify the first": lambda name: main(["verify", name, "good.onnx"]),
    "verify the second": lambda name: main(["verify", "good.onnx", name]),
    "bench the first": lambda name: main(["bench", name, "--runs", "1"]),
    "bench the second": lambda name: main(["bench", "good.onnx", name, "--runs", "1"]),
    "deploy": lambda name: main(["deploy", name, "out.onnx"]),
    "in place": lambda name: main(["fold", name, "--in-place"]),
    "dry run": lambda name: main(["fold", name, "--dry-run"]),
    "bytes": lambda name: fastbn.fold(Path(name).read_bytes(), verify=False),
    "an object": from_memory,
}


@pytest.mark.parametrize("how", READERS)
@pytest.mark.parametrize("case", BAD)
def test_whatever_reads_a_model_refuses_a_bad_place(case, how, here, capsys):
    (here / "in.onnx").write_bytes(in_graph(external(**BAD[case])).SerializeToString())
    (here / "good.onnx").write_bytes(conv_bn().SerializeToString())
    before = sorted(os.listdir(here))
    if how in ("bytes", "an object"):
        with pytest.raises(fastbn.ModelError, match="Expected a path, for a model with external data"):
            READERS[how]("in.onnx")
    else:
        assert READERS[how]("in.onnx") == 2
        assert capsys.readouterr().err.startswith(("fastbn: Expected ", "fastbn: Cannot "))
    assert sorted(os.listdir(here)) == before


# Names of a data file that lies beside the model.
GOOD = {
    "with a dot": "./k.data",
    "in a folder": "folder/k.data",
    "with two slashes": "folder//k.data",
    "a link beside it": "link",
    "a link in a folder": "folder/link",
    "a hard link": "hard",
    "a name with dots": "..k..data",
    "a name of spaces": " ",
    "a name that looks like an option": "-rf",
    "a name of control characters": "a\n\x1b[31m",
}


@pytest.mark.parametrize("name", GOOD)
def test_a_place_beside_the_model_is_read_and_written_beside_the_result(name, here, tmp_path):
    """Whatever the data file is called, that of the result lies beside the result, by the name of the result."""
    (here / "link").symlink_to("k.data")
    (here / "folder" / "link").symlink_to("../k.data")
    (tmp_path / "outside.data").write_bytes(VALUES.tobytes())
    (here / "hard").hardlink_to(tmp_path / "outside.data")
    place = here / GOOD[name]
    if not place.exists():
        place.write_bytes(VALUES.tobytes())
    (here / "in.onnx").write_bytes(in_graph(external(location=GOOD[name])).SerializeToString())
    (tmp_path / "out").mkdir()
    before = everything(tmp_path)
    assert main(["fold", "in.onnx", str(tmp_path / "out" / "out.onnx"), "-q"]) == 0
    assert {path: data for path, data in everything(tmp_path).items() if path.parent.name != "out"} == before
    assert sorted(os.listdir(tmp_path / "out")) == ["out.onnx", "out.onnx.data"]


def everything(folder):
    """Return path -> bytes of all files of a folder and those below, None for other things."""
    return {path: path.read_bytes() if path.is_file() and not path.is_symlink() else None for path in folder.rglob("*")}


def test_names_in_a_model_are_no_paths(here, tmp_path):
    """Whatever graphs, nodes, values, functions and properties are called, files lie where the command says."""
    proto = in_function(external())
    name = "../../../../../../../../tmp/fastbn-was-here"
    proto.graph.name = proto.producer_name = proto.domain = proto.doc_string = proto.functions[0].doc_string = name
    proto.metadata_props.add(key=name, value=name)
    for node in proto.graph.node:
        node.name = f"{name}/{node.name}"
    proto.graph.output[0].name = proto.graph.node[2].output[0] = name
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    before = everything(tmp_path)
    report = ["--report", "page.html", "--json", "out.json", "--runs", "1"]
    assert main(["deploy", "in.onnx", "out.onnx", "-q", *report]) == 0
    new = sorted(path.relative_to(here).as_posix() for path in everything(tmp_path).keys() - before)
    assert new == ["out.json", "out.onnx", "out.onnx.data", "page.html"]
    assert not os.path.exists("/tmp/fastbn-was-here")


@pytest.mark.parametrize("second", ["k.data", "./k.data", "hard"])
@pytest.mark.parametrize("offset", [0, 64])
def test_weights_that_overlap_do_not_overwrite_each_other(second, offset, here):
    """By one name of the data file, or by two."""
    text = """(float[N,512,2,2] x) => (float[N,600,2,2] y, float[N,600,2,2] z) {
        c = Conv(x, w) y = BatchNormalization(c, s, t, m, v) z = Conv(x, o)
    }"""
    weight, rest = normal(600, 512, 1, 1), normal(16, seed=5)
    proto = conv_bn(text, w=weight, o=weight, b=None, **norm(600))
    places = {"w": ("k.data", 0), "o": (second, offset)}
    (here / "k.data").write_bytes(weight.tobytes() + rest.tobytes())
    (here / "hard").hardlink_to("k.data")
    for tensor in proto.graph.initializer:
        if tensor.name in places:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in zip(("location", "offset"), places[tensor.name], strict=True):
                tensor.external_data.add(key=key, value=str(value))
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    before = (here / "k.data").read_bytes()
    assert main(["fold", "in.onnx", "out.onnx", "-q"]) == 0
    assert main(["verify", "in.onnx", "out.onnx", "-q"]) == 0
    source = storage.load("out.onnx")
    other = next(tensor for tensor in source.proto.graph.initializer if tensor.name == "o")
    assert source.array(other).tobytes() == before[offset : offset + weight.nbytes]
    assert (here / "k.data").read_bytes() == before


@pytest.fixture(name="snapshot")
def _snapshot(here):
    """The cache of Hugging Face: models of a revision are links into the folder of all files, which are called after their contents."""
    cache = here / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123abcd"
    (snapshot / "onnx").mkdir(parents=True)
    (cache / "blobs" / "aa11").write_bytes(in_graph(external(location="model.onnx_data")).SerializeToString())
    (cache / "blobs" / "bb22").write_bytes(VALUES.tobytes())
    for folder, up in ((snapshot, "../.."), (snapshot / "onnx", "../../..")):
        (folder / "model.onnx").symlink_to(f"{up}/blobs/aa11")
        (folder / "model.onnx_data").symlink_to(f"{up}/blobs/bb22")
    return snapshot


@pytest.mark.parametrize("folder", [".", "onnx"])
def test_the_cache_of_hugging_face(folder, snapshot, here):
    name = str(snapshot / folder / "model.onnx")
    assert main(["fold", name, "out.onnx", "-q"]) == 0
    assert main(["verify", name, "out.onnx", "-q"]) == 0
    assert main(["bench", name, "out.onnx", "--runs", "1"]) == 0
    assert main(["deploy", name, "deployed.onnx", "--runs", "1", "-q"]) == 0
    assert fastbn.fold(Path(name)).parity.ok


@pytest.mark.parametrize("target", ["../../../../secret.txt", "/etc/passwd", "../secret.data"])
def test_a_link_of_the_cache_that_leads_elsewhere(target, snapshot, here, capsys):
    (snapshot.parent / "secret.data").write_bytes(VALUES.tobytes())
    (snapshot / "model.onnx_data").unlink()
    (snapshot / "model.onnx_data").symlink_to(target)
    assert main(["fold", str(snapshot / "model.onnx"), "out.onnx"]) == 2
    assert "fastbn: Expected " in capsys.readouterr().err


@pytest.mark.parametrize("key", ["location", "offset", "length"])
def test_a_place_given_twice(key, here, capsys):
    tensor = external(offset=0, length=16)
    tensor.external_data.add(key=key, value="k.data" if key == "location" else "0")
    (here / "in.onnx").write_bytes(in_graph(tensor).SerializeToString())
    assert main(["fold", "in.onnx", "out.onnx"]) == 2
    assert f"Expected one {key} of external data, got several - at `k`" in capsys.readouterr().err


def test_a_file_that_becomes_a_pipe_after_the_check_does_not_hang(here):
    (here / "in.onnx").write_bytes(in_graph(external()).SerializeToString())
    source = storage.load("in.onnx")
    (here / "k.data").unlink()
    os.mkfifo("k.data")
    with pytest.raises(fastbn.StorageError, match="something that is no file"):
        source.external(next(external_tensors(source.proto)))


def test_no_path_no_data_file(here):
    with pytest.raises(fastbn.ModelError, match="Expected a path, for a model with external data, got bytes or an object"):
        fastbn.fold(in_graph(external()), verify=False)


def test_links_inside_the_folder_are_followed(here):
    (here / "folder" / "real.data").write_bytes(VALUES.tobytes())
    (here / "inside").symlink_to("folder/real.data")
    (here / "in.onnx").write_bytes(in_graph(external(location="inside")).SerializeToString())
    assert fastbn.fold("in.onnx").parity.ok


def test_a_linked_model_reads_beside_what_it_means(here):
    """As a cache of links has it; a data file of the link's own folder may not lead elsewhere."""
    blobs = here / "folder"
    (blobs / "b").write_bytes(VALUES.tobytes())
    (blobs / "a").write_bytes(in_graph(external()).SerializeToString())
    (here / "in.onnx").symlink_to("folder/a")
    (here / "k.data").unlink()
    (here / "k.data").symlink_to("folder/b")
    assert fastbn.fold("in.onnx").parity.ok
    shutil.copy("folder/a", "copy.onnx")
    assert fastbn.fold("copy.onnx").parity.ok, "the folder is inside"
    (here / "k.data").unlink()
    (here / "k.data").symlink_to("../secret.txt")
    with pytest.raises(fastbn.ModelError, match=r"got a link to '.*secret\.txt'"):
        fastbn.fold("in.onnx")


@pytest.fixture(name="few_open_files")
def _few_open_files():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("few_open_files")
def test_packed_types_and_many_files(here):
    """Two elements share a byte, and there are more files than may be open at once."""
    proto = model("(float[2,4] x) => (float[2,4] y) { y = BatchNormalization(x, s, t, m, v) }", **norm(4))
    packed = TensorProto(name="p", data_type=TensorProto.INT4, dims=[3], data_location=TensorProto.EXTERNAL)
    packed.external_data.add(key="location", value="p.data")
    (here / "p.data").write_bytes(bytes(2))
    proto.graph.initializer.append(packed)
    for number in range(200):
        (here / f"{number}.data").write_bytes(VALUES.tobytes())
        proto.graph.initializer.append(external(f"k{number}", f"{number}.data"))
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    result = fastbn.fold("in.onnx", verify=False)
    assert numpy_helper.to_array(result.model.graph.initializer[-1]).tobytes() == VALUES.tobytes()
    result.save("out.onnx")
    assert storage.load("out.onnx").proto.graph.initializer[-1].name == "k199"


def test_a_location_is_utf_8_and_named_as_it_is(here):
    (here / "gewichte-\u00e4.data").write_bytes(VALUES.tobytes())
    (here / "in.onnx").write_bytes(in_graph(external(location="gewichte-\u00e4.data")).SerializeToString())
    assert fastbn.fold("in.onnx").parity.ok


def test_the_data_of_a_function_that_is_inlined(here):
    proto = in_function(external())
    norm_function = helper.make_function(
        "own", "Norm", ["a"], ["r"],
        [helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values)) for name, values in norm(4).items()]
        + [helper.make_node("BatchNormalization", ["a", *norm(4)], ["r"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    proto.functions.append(norm_function)
    proto.graph.node[2].CopyFrom(helper.make_node("Norm", [proto.graph.node[2].input[0]], ["y"], domain="own", name="norm"))
    (here / "in.onnx").write_bytes(proto.SerializeToString())
    result = fastbn.fold("in.onnx")
    assert (len(result.folded), result.parity.status) == (1, "ok")
    result.save("out.onnx")
    (here / "k.data").unlink()
    assert [each.name for each in onnx.load("out.onnx", load_external_data=False).functions] == ["Four"]
    source = storage.load("out.onnx")
    assert source.external(next(external_tensors(source.proto))).tobytes() == VALUES.tobytes()
