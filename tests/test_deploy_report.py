"""The HTML report: everything is in it, names are text and nothing else, the contrast is enough, and a browser shows it."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import make_models
import pytest
from shell import files, losing, taking, weighing
from sketch import classifier, conv_bn, model, norm, normal

import fastbn
from fastbn.cli import main
from fastbn.deployment import report
from fastbn.graph import drawing
from fastbn.graph.fold_result import planning_of

jinja2 = pytest.importorskip("jinja2", reason="the HTML report needs jinja2")

FOLDER = Path(report.__file__).parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

EVIL = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e\x07"


class Page(HTMLParser):
    """What a page is made of; refuses tags that are not closed in order."""

    VOID = frozenset(["meta", "link", "br"])

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.ids, self.open, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(name="quick", autouse=True)
def _quick(monkeypatch):
    weighing(monkeypatch, original=12.5, folded=12.5, quantized=12.5)
    taking(monkeypatch, original=1, folded=1, quantized=0.5)


def rendered(proto, **options):
    return report.render(fastbn.deploy(proto, runs=1, **options))


@pytest.fixture(scope="module", name="whole")
def _whole(small_cnn):
    """The report of the model that ships, with everything in it."""
    return report.render(fastbn.deploy(small_cnn, quantize=True, runs=2, goal="size"))


def test_everything_is_in_it(whole):
    page = Page(whole)
    for words in (
        "small_cnn.onnx",
        "Quantized model shipped",
        "Batch norms 7 \u2192 1",
        "Nodes 25 \u2192 19",
        "no --data: compared and calibrated on random numbers",
        "Latency, 1 thread",
        "Size on disk",
        "SQNR",
        "Memory when loaded",
        "2 kernels, after onnxruntime's own pre-processing",
        "7 kernels, without it",
        "into Conv /block1/depthwise/Conv, 16 channels",
        "mixed-sign-through-relu a scale that is not positive in every channel cannot pass a Relu",
        "it is not positive in channels 10, 20",
        f"fastbn {fastbn.__version__}",
        "onnxruntime",
    ):
        assert words in page.text, words
    assert re.search(r"error \d\.\de-\d\d of \d\.\de-\d\d allowed \(\d+ %\)", page.text)
    assert page.tags.count("svg") == 2 * 6 + 1 + 4 + 5, "each fold before and after, the whole model, two legends"


def test_it_is_one_file_that_asks_for_no_other(whole):
    page = Page(whole)
    assert not {"img", "iframe", "object", "embed"} & set(page.tags)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "xlink:href")]
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", whole)
    assert "@import" not in whole
    assert "url(" not in whole
    assert len(whole) < 100_000


def test_it_is_accessible(whole):
    page = Page(whole)
    assert '<html lang="en">' in whole
    assert len(page.ids) == len(set(page.ids))
    for drawn in re.findall(r"<svg\b[^>]*>", whole):
        assert 'aria-hidden="true"' in drawn or re.search(r'role="img" aria-labelledby="(\S+) (\S+)"', drawn)
    referred = {part for name, value in page.attributes if name == "aria-labelledby" for part in value.split()}
    referred |= {value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")}
    assert referred <= set(page.ids)
    assert page.tags.count("h1") == 1
    assert all(re.search(r'scope="(col|row)"', tag) for tag in re.findall(r"<th\b[^>]*>", whole))
    assert 'name="viewport" content="width=device-width' in whole
    assert "@media print" in whole


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(
        w * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
        for w, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
    )


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_is_that_of_wcag_aa_in_every_scheme():
    schemes = re.findall(r":root \{(.*?)\}", (FOLDER / "report.css").read_text(encoding="utf-8"), re.DOTALL)
    assert len(schemes) == 3, "light, dark, print"
    for scheme in schemes:
        colors = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", scheme))
        fills = [name for name in colors if name.endswith("-fill")]
        pairs = [(text, ground) for text in ("text", "muted", "blue") for ground in ("page", "card")]
        pairs += [("text", fill) for fill in fills] + [(fill.removesuffix("-fill"), fill) for fill in fills]
        for text, ground in pairs:
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
        for bar in ("bar-original", "bar-folded", "bar-quantized"):
            assert contrast(colors[bar], colors["card"]) >= 3, bar


def evil_model():
    proto = classifier()
    proto.graph.name = EVIL
    for node in proto.graph.node:
        node.name = f"{EVIL} {node.output[0]}"
    for node in proto.graph.node:
        node.input[:] = [f"in {EVIL}" if name == "x" else f"out {EVIL}" if name == "y" else name for name in node.input]
        node.output[:] = [f"out {EVIL}" if name == "y" else name for name in node.output]
    proto.graph.input[0].name, proto.graph.output[0].name = f"in {EVIL}", f"out {EVIL}"
    return proto


def test_names_of_a_model_are_text_and_nothing_else(tmp_path):
    plain, page = Page(rendered(classifier())), Page(rendered(evil_model()))
    assert set(page.tags) == set(plain.tags)
    assert page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text, "shown as text"
    assert "\u202e" not in page.text
    assert "\x07" not in page.text
    assert r"\u202e\x07" in page.text
    folder = tmp_path / "<b>&"
    folder.mkdir()
    path = folder / "<script>x<.onnx"
    path.write_bytes(classifier().SerializeToString())
    assert Page(rendered(path)).tags.count("script") == 1


def test_the_policy_allows_the_one_script_only(whole):
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', whole)
    assert policy.startswith("default-src 'none'; ")
    assert "script-src 'sha256-" in policy
    assert "'unsafe-inline'" not in re.search(r"script-src[^;]*", policy)[0]


def test_reports_of_every_outcome(monkeypatch):
    assert "the model has no batch normalization" in Page(rendered(model("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }"))).text
    stuck = "(float[2,4] x) => (float[2,4] y) { a = Tanh(x) b = BatchNormalization(a, s, t, m, v) y = Tanh(b) }"
    text = Page(rendered(model(stuck, **norm(4)))).text
    assert "every batch normalization stays" in text
    custom = conv_bn(
        "(float[N,3,8,8] x) => (float z) { c = Conv(x, w, b) y = BatchNormalization(c, s, t, m, v) z = maker.Op(y) }", imports=["maker"]
    )
    text = Page(rendered(custom, quantize=True)).text
    assert "Folded model shipped, with a reservation" in text
    assert "nothing was measured: onnxruntime cannot load the original" in text
    losing(monkeypatch, 0, 0.4)
    text = Page(rendered(classifier())).text
    assert "Nothing shipped" in text
    assert "Not shipped:" in text


def test_a_large_model_gives_a_small_report_that_says_what_it_leaves_out():
    made = fastbn.deploy(make_models.long(150), only=[f"/layers/{number}/*" for number in range(60)], runs=1)
    text = report.render(made)
    page = Page(text)
    assert len(text) < 400_000
    assert "40 of 60 folds are drawn; the table has all, the JSON report every one." in page.text
    drawn = drawing.draw_model(planning_of(made.fold))
    assert len(drawn.boxes) <= drawing.MODEL_BOXES + 2
    assert drawn.hidden == 0
    assert drawn.text == "450 nodes: 60 taken out, 60 that took them in, 90 that stayed"


def test_a_graph_of_many_long_edges_is_drawn_in_little_space():
    chain = "".join(f" v{number} = Relu(v{number - 1})" for number in range(1, 400))
    names = ", ".join(f"v{number}" for number in range(400))
    text = f"(float[2,4] x) => (float[2,1600] y) {{ v0 = Relu(x){chain} y = Concat<axis=1>({names}) }}"
    made = fastbn.deploy(model(text), runs=1)
    drawn = drawing.draw_model(planning_of(made.fold))
    assert drawn.hidden == 401 - drawing.MODEL_BOXES, "no node of it stands in a chain"
    page = report.render(made)
    assert f"The last {drawn.hidden} nodes are not drawn." in Page(page).text
    assert len(page) < 300_000


def boxes_of(drawn):
    return [(box.kind, box.lines[0]) for box in drawn.boxes if not box.is_bend]


def test_a_fold_before_and_after():
    result = fastbn.fold(
        conv_bn("(float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, w) n = BatchNormalization(c, s, t, m, v) y = Relu(n) }")
    )
    planning = planning_of(result)
    (plan,) = planning.plans
    before, after = drawing.draw_fold(plan, planning)
    assert boxes_of(before) == [("absorber", "Conv"), ("removed", "BatchNormalization"), ("near", "x"), ("near", "Relu")]
    assert boxes_of(after) == [("absorber", "Conv"), ("near", "x"), ("near", "Relu")]
    assert after.boxes[0].lines == ["Conv", "c", "new W and B"]
    assert before.text == "Conv then BatchNormalization; n is taken out"
    assert len(before.paths) == 3
    assert len(after.paths) == 2


def test_a_shift_that_stays_is_drawn_as_an_add():
    text = "(float[N,4] x) => (float[N,3] y) { r = Relu(x) m1 = MatMul(r, w) n = BatchNormalization(m1, s, t, m, v) y = Tanh(n) }"
    result = fastbn.fold(model(text, w=normal(4, 3), **norm(3)))
    planning = planning_of(result)
    (plan,) = planning.plans
    _, after = drawing.draw_fold(plan, planning)
    assert [lines[0] for _, *lines in boxes_of(after)][:2] == ["MatMul", "Add"]


def test_boxes_do_not_overlap_and_stay_inside():
    for name in ("densenet_like", "levit_like", "unet"):
        drawn = drawing.draw_model(planning_of(fastbn.fold(make_models.MODELS[name](), verify=False)))
        rows = {}
        for box in drawn.boxes:
            assert box.x >= 0
            assert box.x + box.width <= drawn.width
            assert box.y + box.height <= drawn.height
            rows.setdefault(box.rank, []).append(box)
        for row in rows.values():
            row.sort(key=lambda box: box.x)
            for left, right in pairwise(row):
                assert left.x + left.width <= right.x


def test_edges_go_down_and_past_no_rank():
    drawn = drawing.draw_model(planning_of(fastbn.fold(make_models.MODELS["unet"](), verify=False)))
    for path in drawn.paths:
        heights = [float(y) for y in re.findall(r"[-\d.]+ ([-\d.]+)(?=[CV]|$)", path)]
        assert heights == sorted(heights)


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.onnx").write_bytes(classifier().SerializeToString())
    return tmp_path


def deploy(*options):
    return main(["deploy", "in.onnx", "out.onnx", "--runs", "1", "-q", *options])


def test_the_command_writes_it_and_replaces_only_when_forced(here, capsys):
    assert deploy("--report", "report.html") == 0
    assert files(here) == ["in.onnx", "out.onnx", "report.html"]
    (here / "report.html").write_text("mine")
    (here / "out.onnx").unlink()
    assert deploy("--report", "report.html") == 2
    message = "Cannot write the report to 'report.html': it exists; --force replaces it"
    assert capsys.readouterr().err == f"fastbn: {message}\n"
    assert files(here) == ["in.onnx", "report.html"]
    assert (here / "report.html").read_text() == "mine"
    assert deploy("--report", "report.html", "--force") == 0
    text = (here / "report.html").read_text(encoding="utf-8")
    assert "fastbn deploy in.onnx out.onnx --runs 1 -q --report report.html --force" in text
    with pytest.raises(fastbn.StorageError, match="force=True replaces it"):
        fastbn.deploy("in.onnx", "out.onnx", report="report.html")
    fastbn.deploy("in.onnx", "out.onnx", report="report.html", force=True, runs=1)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("in.onnx", "Cannot write the report to 'in.onnx': that is the input or the output"),
        ("out.onnx", "Cannot write the report to 'out.onnx': that is the input or the output"),
        (".", "Expected an output file, got a folder"),
        ("none/report.html", "Cannot write 'none/report.html': there is no folder 'none'"),
    ],
)
def test_a_report_that_cannot_be_written_is_known_before_any_work(where, message, here, capsys):
    assert deploy("--report", where, "--force") == 2
    assert capsys.readouterr().err.startswith(f"fastbn: {message}")
    assert files(here) == ["in.onnx"]


def test_without_jinja2_one_line_says_what_to_install(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert deploy("--report", "report.html") == 2
    assert capsys.readouterr().err == "fastbn: Cannot make a report: jinja2 is not installed (pip install jinja2)\n"
    assert deploy() == 0


def test_a_report_is_written_even_when_nothing_is_shipped(here, monkeypatch):
    losing(monkeypatch, 0, 0.4)
    assert deploy("--report", "report.html") == 1
    assert files(here) == ["in.onnx", "report.html"]


def chromium(folder, *arguments):
    """Run the browser without a network and a profile of its own; return what it says."""
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    switches += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    # A proxy that is nobody: what asks for a network fails, and says so on the console.
    switches += ["--proxy-server=127.0.0.1:9", "--virtual-time-budget=2000"]
    done = subprocess.run([CHROMIUM, *switches, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("kind", ["whole", "evil"])
def test_a_browser_shows_it_without_a_complaint(kind, whole, tmp_path):
    text = whole if kind == "whole" else rendered(evil_model())
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    address = (tmp_path / "report.html").as_uri()
    done = chromium(tmp_path, "--dump-dom", address)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert done.stdout.count('class="zoom"') == 1, "the script ran"
    assert done.stdout.count("<button") == 4
    assert done.stdout.count("<script") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_complaint_would_be_seen(tmp_path, whole):
    bad = whole.replace("<script>", "<script>undefinedName();").replace("default-src 'none';", "default-src 'none'; img-src x:;")
    (tmp_path / "report.html").write_text(bad, encoding="utf-8")
    done = chromium(tmp_path, "--dump-dom", (tmp_path / "report.html").as_uri())
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line], "the changed script breaks the policy"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_screen(width, whole, tmp_path):
    # Headless windows have a least width, so the page is framed at the width of a phone.
    (tmp_path / "report.html").write_text(whole, encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="report.html" width="{width}" height="800"></iframe><p id="found"></p><script>onload = () => {{'
        "const inside = document.querySelector('iframe').contentDocument.documentElement;"
        "document.getElementById('found').textContent = inside.scrollWidth + ' of ' + inside.clientWidth; };</script>"
    )
    done = chromium(tmp_path, "--dump-dom", "--allow-file-access-from-files", frame.as_uri())
    found = re.search(r'id="found">(\d+) of (\d+)<', done.stdout)
    assert found, done.stdout[-500:]
    assert int(found[1]) <= int(found[2]) <= width
