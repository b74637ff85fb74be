"""What a notebook shows of a result: its lines and its drawing, every name escaped."""

import sys
import xml.etree.ElementTree as ET

import pytest
from shell import classifier_folder
from sketch import conv_bn, model, norm, normal

import fastbn

TANH = "(float[2,4] x) => (float[2,4] y) { a = Tanh(x) b = BatchNormalization(a, s, t, m, v) y = Tanh(b) }"


def parts(html):
    """The text of the result, and the SVG as XML."""
    root = ET.fromstring(f"<div>{html}</div>")
    return root.find("pre").text, root.find(".//svg")


def words(svg):
    return [text.text for text in svg.iter("text")]


def test_a_fold():
    result = fastbn.fold(conv_bn())
    text, svg = parts(result._repr_html_())
    assert text == "\n".join(result.lines())
    assert {"Conv", "BatchNormalization"} <= set(words(svg))
    colors = {each.get("fill") for each in svg.iter("rect")}
    assert {"#2e8b57", "#c0392b"} <= colors, "what takes it in and what is gone"
    assert len(list(svg.iter("path"))) >= 2


def test_what_stays_is_named_in_the_legend():
    html = fastbn.fold(model(TANH, **norm(4)))._repr_html_()
    assert '<span style="color:#d68910">stays</span>' in html
    assert "folded away" not in html


def test_names_are_escaped():
    proto = conv_bn()
    proto.graph.node[0].name = "</pre><script>alert(1)</script>"
    html = fastbn.fold(proto)._repr_html_()
    assert "<script" not in html
    text, _ = parts(html)
    assert "</pre><script>alert(1)</script>" in text


def test_a_deployment(tmp_path, monkeypatch):
    classifier_folder(tmp_path, monkeypatch)
    made = fastbn.deploy("in.onnx", data=normal(4, 3, 8, 8), runs=1)
    text, svg = parts(made._repr_html_())
    assert text == "\n".join(made.lines())
    assert "shipped" in text
    assert "Conv" in words(svg)


def test_repr_is_one_line():
    result = fastbn.fold(conv_bn())
    assert repr(result) == "<FoldResult 'model': 1 of 1 BatchNormalization folded, parity ok>"
    assert repr(result.parity).startswith("<Parity ok: worst ")


def test_every_result_gives_its_model_in_the_same_way(tmp_path, monkeypatch):
    """FoldResult, Deployment and Reestimation share what they say of the model that they have made."""
    classifier_folder(tmp_path, monkeypatch)
    data = normal(8, 3, 8, 8)
    results = {
        "fold": fastbn.fold("in.onnx"),
        "folded": fastbn.deploy("in.onnx", data=data, runs=1),
        "quantized": fastbn.deploy("in.onnx", data=data, runs=1, quantize=True, max_drop=1),
        "reestimate": fastbn.reestimate("in.onnx", data),
    }
    assert results["quantized"].shipped == "quantized"
    for name, result in results.items():
        (path,) = result.save(f"{name}.onnx")
        assert path.read_bytes() == result.to_bytes()
        assert result.model == type(result.model).FromString(result.to_bytes())
    made = results["folded"]
    object.__setattr__(made, "shipped", None)
    for read in (made.to_bytes, lambda: made.model, lambda: made.save("none.onnx")):
        with pytest.raises(fastbn.ParityError, match="Cannot save a model: nothing is shipped"):
            read()


def test_a_parity():
    parity = fastbn.fold(conv_bn()).parity
    root = ET.fromstring(parity._repr_html_())
    cells = {row.find("th").text: row.find("td").text for row in root.findall("tr")}
    assert cells["parity"] == "ok"
    assert cells["compared"] == "y"
    assert "optimizer off" in cells["inputs"]
    assert "reason" not in cells
    failed = fastbn.graph.Parity("failed", reason="<b>")
    assert ET.fromstring(failed._repr_html_()).find(".//tr[2]/td").text == "<b>"


def test_a_data_frame():
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = fastbn.fold(conv_bn()).to_dataframe()
    assert frame.to_dict("records")[0].items() >= {"bn": "y", "outcome": "folded", "into": "c", "op": "Conv", "channels": 4}.items()
    kept = fastbn.fold(model(TANH, **norm(4)), rewrite_left="affine").to_dataframe()
    assert kept["outcome"].tolist() == ["rewritten"]
    assert kept["op"].tolist() == ["Mul+Add"]
    assert kept["code"].notna().all()
    assert len(fastbn.fold(model("(float[2] x) => (float[2] y) { y = Relu(x) }")).to_dataframe()) == 0


def test_a_data_frame_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(fastbn.FastbnError, match=r"Cannot make a data frame: pandas is not installed"):
        fastbn.fold(conv_bn()).to_dataframe()
