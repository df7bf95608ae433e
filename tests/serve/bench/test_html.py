"""report.html: what it says, and that a browser shows it, on a desk and on a phone."""

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pst.data import DataSpec
from serve.bench.charts import Bar, Interval, bars, intervals
from serve.bench.html import page
from serve.bench.report_tables import artifact_table, latency_table
from serve.bench.runner import bench

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
VOID = {"meta", "rect", "path", "circle", "i", "br"}
MEASURE = """<script>addEventListener('load', () => { document.title = JSON.stringify({
  plots: [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().height),
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  ink: getComputedStyle(document.body).color, page: getComputedStyle(document.body).backgroundColor}); });</script>"""


class Balanced(HTMLParser):
    """Counts elements, and fails where an end does not close what was opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(
    bert_artifact: Path, sparse_artifact: Path, reviews_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("bench") / "report"
    bench(
        [bert_artifact, sparse_artifact], shapes=[(1, 8), (2, 8)], output=output, threads=1, warmup=1, runs=12,
        precision=0, data=DataSpec(data=str(reviews_file)),
    )  # fmt: skip
    return output


def test_the_page_has_what_the_report_has(report: Path) -> None:
    content = json.loads((report / "report.json").read_text(encoding="utf-8"))
    text = (report / "report.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.counts["svg"] == 3
    assert parser.counts["rect"] == len(content["measurements"])
    assert parser.counts["details"] == len(content["receipts"]) == 4
    layers = sum(len(receipt["layers"]) for receipt in content["receipts"])
    assert len(re.findall(r'<tr class="(?:zeros|sparse|dense)">', text)) == layers
    for entry in content["measurements"]:
        assert f"{entry['latency']['p50']:.2f} ms" in text
        if entry["speedup"]:
            assert f"{entry['speedup']['ratio']:.2f}×" in text
    assert content["verdicts"][0].replace("'", "&#x27;") in text
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "<script" not in text


def test_the_page_shows_what_report_md_shows(report: Path) -> None:
    """Its columns are some of the same, and their cells are those of the other table."""
    content = json.loads((report / "report.json").read_text(encoding="utf-8"))
    shorter = {"zeros": "sparsity", "MB": "size MB"}
    for table in (artifact_table, latency_table):
        (header, rows), (titles, cells) = table(content), table(content, page=True)
        assert set(titles) < {*header, *shorter}
        for row, shown in zip(rows, cells, strict=True):
            whole = dict(zip(header, row, strict=True))
            for title, cell in zip(titles, shown, strict=True):
                assert whole[shorter.get(title, title)].startswith(cell)
                assert escape(cell) in (report / "report.html").read_text(encoding="utf-8")


def test_a_report_of_an_earlier_version(report: Path) -> None:
    """Without memory, energy, plans and first inferences."""
    content = json.loads((report / "report.json").read_text(encoding="utf-8"))
    for artifact in content["artifacts"]:
        del artifact["memory"], artifact["plan_bytes"]
    for entry in content["measurements"]:
        del entry["energy"], entry["latency"]["first"]
    del content["notes"]
    text = page(content, machine=[])
    assert "p50 ms" in text
    for title in ("host MB", "plan MB", "mJ", "first ms"):
        assert title not in text


def test_names_are_text_and_not_markup(report: Path) -> None:
    content = json.loads((report / "report.json").read_text(encoding="utf-8").replace('"bert"', '"<b>&bert"'))
    text = page(content, machine=[("GPU", "<none>")])
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;bert" in text
    assert "&lt;none&gt;" in text


def test_lengths_and_places_follow_the_values() -> None:
    svg = bars([Bar(group="a", label="x", color="red", value=value, until=8.0) for value in (2.0, 4.0, 8.0)], unit="ms")
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height', svg)]
    assert widths[1] / widths[0] == pytest.approx(2, rel=1e-2)
    assert widths[2] / widths[0] == pytest.approx(4, rel=1e-2)
    marks = [Interval(label="a", color="red", value=value, low=None, high=None) for value in (0.5, 1.0, 2.0)]
    places = [float(place) for place in re.findall(r'cx="([\d.]+)"', intervals(marks))]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert places[0] < places[1]


def browse(file: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """What MEASURE found, and what the browser logged."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, *flags, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, flags=re.DOTALL)
    assert title is not None
    return json.loads(title[1]), done.stderr


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("window", ["1200,900", "390,844"])
def test_a_browser_shows_it(report: Path, window: str, tmp_path: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    file = tmp_path / "report.html"
    file.write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    found, log = browse(file, f"--window-size={window}")
    assert len(found["plots"]) == 3
    assert min(found["plots"]) > 20
    assert found["wide"] <= 0
    assert "CONSOLE" not in log
    dark, _ = browse(file, "--blink-settings=preferredColorScheme=0")
    assert {dark["ink"], dark["page"]}.isdisjoint({found["ink"], found["page"]})
    file.write_text(text.replace("</body>", MEASURE + "<script>nothing.here()</script></body>"), encoding="utf-8")
    assert "CONSOLE" in browse(file)[1]  # what the log says of an error
