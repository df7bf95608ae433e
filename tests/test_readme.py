"""README's commands run as they stand, and its figures are those of the committed report."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_reviews

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shell_blocks() -> list[list[str]]:
    """The lines of each ```sh block."""
    return [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)]


@pytest.fixture(scope="module")
def desk(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as README's reader has it: ./model and reviews.csv."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(tiny_bert, folder / "model")
    made = write_reviews(folder / "rows.jsonl", rows=120, seed=3).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in made.splitlines()]
    lines = ["text,label", *(f'"{row["sentence"]}",{row["label"]}' for row in rows)]
    (folder / "reviews.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def test_commands_run_as_they_stand(desk: Path) -> None:
    commands, (request,) = shell_blocks()
    assert {line.split()[1] for line in commands} == {"train", "export", "inspect", "eval", "bench", "serve"}
    for line in commands[:-1]:
        command = [sys.executable, "-m", "cli", *shlex.split(line)[1:]]
        done = subprocess.run(command, cwd=desk, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stdout.strip(), f"{line} printed nothing"
    serve, curl = shlex.split(commands[-1]), shlex.split(request)
    port = serve[serve.index("--port") + 1]
    assert f"localhost:{port}/" in request
    server = subprocess.Popen([sys.executable, "-m", "cli", *serve[1:]], cwd=desk, env=environment())
    try:
        answer = _post(f"http://{curl[2]}", curl[-1].encode(), server)
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert answer["predictions"][0]["label"] in {"NEGATIVE", "POSITIVE"}


def _post(url: str, body: bytes, server: "subprocess.Popen[bytes]") -> dict[str, list[dict[str, str]]]:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                answer: dict[str, list[dict[str, str]]] = json.load(response)
                return answer
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError("the server did not answer")


def test_quoted_table_is_the_committed_report() -> None:
    path = re.search(r"\]\((benchmarks/quickstart_\w+\.json)\)", README)
    assert path is not None
    report = json.loads((ROOT / path[1]).read_text(encoding="utf-8"))
    dense, sparse = report["artifacts"]
    first = report["measurements"][0]["workload"]
    latency = {row["artifact"]: row["latency"] for row in report["measurements"] if row["workload"] == first}
    for item in (dense, sparse):
        assert f"{item['accuracy']['value']:.1%}" in README
        assert f"{item['size_bytes'] / 1e6:.1f} MB" in README
        assert f"{latency[item['name']]['p50']:.2f} ms" in README
        assert f"{latency[item['name']]['p99']:.2f} ms" in README
    assert f"{sparse['sparsity']:.1%}" in README
    for verdict in report["verdicts"]:
        assert verdict in " ".join(line.strip() for line in README.splitlines())


def test_training_figures_are_those_of_the_committed_reports() -> None:
    steps = json.loads((ROOT / "benchmarks/train_step_h100_202611.json").read_text(encoding="utf-8"))["rows"]
    found = re.findall(r"([\d.]+) ms, ([\d.]+) GB", README)
    assert len(found) == 10
    measured = {(f"{row['step_ms']['median']:.1f}", f"{row['peak_memory_bytes'] / 1e9:.2f}") for row in steps}
    assert set(found) <= measured
    quoted = re.findall(
        r"^\| (.+?) \| ([\d.]+ ± [\d.]+) \|(?: ([\d.]+ ± [\d.]+) \| ([\d.]+ ± [\d.]+) \|)?", README, re.MULTILINE
    )
    three = accuracies(mean_rows("accuracy_h100_202611"))
    ten = accuracies(ten_seeds())
    assert len(re.findall(r"[\d.]+ ± [\d.]+", README)) == 10
    assert {name: [mean for mean in means if mean] for name, *means in quoted} == {
        "dense": ten["dense"],
        "`pst`": ten["pst"],
        "`magnitude`": ten["magnitude"],
        "`pst --faithful`": three["pst-faithful"],
    }
    taught = re.search(
        r"a step takes ([\d.]+) of a dense one's time with a teacher and ([\d.]+) without", " ".join(README.split())
    )
    assert taught is not None
    rows = json.loads((ROOT / "benchmarks/train_step_cpu_202611.json").read_text(encoding="utf-8"))["rows"]
    ratios = {row["row"]: f"{row['to_dense']['time']:.2f}" for row in rows}
    assert taught.groups() == (ratios["taught-2:4"], ratios["pst-2:4"])
    report = json.loads((ROOT / "benchmarks/gpt2_e2e_h100_202611.json").read_text(encoding="utf-8"))
    bleu = {row["name"]: f"{row['bleu_test']:.1f}" for row in report["results"]}
    sentence = re.search(r"test BLEU ([\d.]+) dense, ([\d.]+) at 50% and ([\d.]+) at 90%", README)
    assert sentence is not None
    assert sentence.groups() == (bleu["dense_longer"], bleu["pst_0.5"], bleu["pst_0.9"])


COLUMNS = ("unstructured", 0.5), ("2:4", 0.5), ("unstructured", 0.9)
"""Of README's table of accuracies."""


def mean_rows(name: str) -> dict[tuple[str, str, float], Any]:
    """The means of a committed table, by method, pattern and sparsity."""
    rows = json.loads((ROOT / f"benchmarks/{name}.json").read_text(encoding="utf-8"))["rows"]
    return {(row["method"], row["pattern"], row["sparsity"]): row["mean"] for row in rows}


def ten_seeds() -> dict[tuple[str, str, float], Any]:
    """The means by ten seeds: 2:4 by the table that was made for it, all else by the one of all patterns."""
    two_of_four = mean_rows("accuracy_2-4_seeds_h100_202611")
    return mean_rows("accuracy_seeds_h100_202611") | {key: two_of_four[key] for key in two_of_four if key[1] == "2:4"}


def accuracies(found: dict[tuple[str, str, float], Any]) -> dict[str, list[str]]:
    """Of each method of ``mean_rows``, its means as README writes them: of dense one, of others by COLUMNS."""
    values = {shape: row["value"] for shape, row in found.items()}
    written = {shape: f"{mean['mean']:.1f} ± {mean['std']:.1f}" for shape, mean in values.items()}
    methods = {method for method, *_ in found} - {"dense"}
    return {"dense": [written["dense", "dense", 0.0]]} | {
        method: [written[method, *shape] for shape in COLUMNS] for method in methods
    }


def test_what_is_lost_and_gained_is_that_of_the_committed_report() -> None:
    means = ten_seeds()
    half, two_of_four, most = COLUMNS
    sentence = " ".join(README.split())
    ahead = re.search(
        r"by ([\d.]+) points at 90% and ([\d.]+) at 2:4, both beyond chance, and by ([\d.]+) at 50%", sentence
    )
    lost = re.search(r"it loses ([\d.]+) points at 50%, ([\d.]+) at 2:4 and ([\d.]+) at 90%", sentence)
    assert ahead is not None
    assert lost is not None
    for shape, gain in zip((most, two_of_four, half), ahead.groups(), strict=True):
        difference = means["pst", *shape]["value"]["mean"] - means["magnitude", *shape]["value"]["mean"]
        assert gain == f"{difference:.1f}"
    for shape, loss in zip((half, two_of_four, most), lost.groups(), strict=True):
        assert loss == f"{-means['pst', *shape]['to_dense']['mean']:.1f}"
    assert f"is {lost[2]} points less accurate than dense, a mean of three tasks" in sentence


def test_the_ratios_of_removed_units_are_those_of_the_committed_report() -> None:
    report = json.loads((ROOT / "benchmarks/structured_cpu_202611.json").read_text(encoding="utf-8"))
    quoted = re.findall(r"([\d.]+)× \(([\d.]+) to ([\d.]+)\) at", " ".join(README.split()))
    ratios = [row["speedup"] for row in report["measurements"] if row["speedup"]]
    assert quoted == [tuple(f"{ratio[name]:.2f}" for name in ("ratio", "low", "high")) for ratio in ratios]
    assert len(quoted) == 2
    macs = report["structured"]["macs"]
    assert 0.49 < macs["kept"] / macs["dense"] <= 0.5


def test_what_removed_units_cost_is_what_was_measured() -> None:
    path = ROOT / "benchmarks/structured_accuracy_cpu_202611.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["method"], row["sparsity"], row["value"]["n"]) for row in rows] == [("dense", 0.0, 3), ("pst", 0.5, 3)]
    dense, sparse = (f"{row['value']['mean']:.1%}" for row in rows)
    assert f"falls from {dense} to {sparse}, means of three seeds" in " ".join(README.split())


ROWS = {
    "onnxruntime-cuda": {"2of4-matmul": "2:4 zeros", "unstructured-90": "90% zeros", "structured-50": "half of the"},
    "tensorrt": {"2of4-matmul": "2:4 zeros", "unstructured-90": "90% zeros", "structured-50": "half of the"},
}


SHAPES = ("1x128", "32x128", "128x128")


@pytest.mark.parametrize(("engine", "title"), [("onnxruntime-cuda", "ONNX Runtime CUDA"), ("tensorrt", "TensorRT 8.6")])
def test_the_table_of_runtimes_is_that_of_the_committed_reports(engine: str, title: str) -> None:
    found = _runtimes(engine)
    table = README[README.index(f"| {title}") :]
    assert _cells(table, title) == found["dense"]
    for artifact, words in ROWS[engine].items():
        assert _cells(table, words) == found[artifact]


def test_zeros_that_are_skipped_take_what_was_measured() -> None:
    report = json.loads((ROOT / "benchmarks/runtimes_onnxruntime-sparse_cpu_202611.json").read_text(encoding="utf-8"))
    table = README[README.index("## Faster on a processor") :]
    names = {
        "dense": "dense",
        "2of4-matmul": "50% zeros, 2:4",
        "unstructured-50": "50% zeros, anywhere",
        "unstructured-80": "80% zeros",
        "unstructured-90": "90% zeros",
    }
    for artifact, begin in names.items():
        rows = [row for row in report["measurements"] if row["artifact"] == artifact]
        assert [row["workload"] for row in rows] == ["1x8", "1x16", "1x32", "1x128", "8x128"]
        ratios = [row["speedup"] and f"{row['speedup']['ratio']:.2f}×" for row in rows]
        assert _cells(table, begin) == [
            ratio or f"{row['latency']['p50']:.2f} ms" for ratio, row in zip(ratios, rows, strict=True)
        ]
    skipped = {each["artifact"]: {layer["sparse_kernel"] for layer in each["layers"]} for each in report["receipts"]}
    assert skipped == {name: {name != "dense"} for name in names}


def test_other_linear_forms_are_what_was_measured() -> None:
    found = _runtimes("forms_tensorrt")
    text = " ".join(README.split())
    assert "makes of MatMul: {}, {} and {}.".format(*found["2of4-gemm"]) in text
    assert "2:4 is {}, {} and {} as fast as dense".format(*found["2of4-conv"]) in text
    assert "as slow, {}, {} and {} (".format(*found["dense-conv"]) in text
    report = json.loads((ROOT / "benchmarks/runtimes_forms_tensorrt_h100_202611.json").read_text(encoding="utf-8"))
    ran = [sum(layer["sparse_kernel"] for layer in each["layers"]) for each in report["receipts"]
           if each["artifact"] == "2of4-conv"]  # fmt: skip
    assert ran == [72] * 5


def test_a_wide_model_in_two_of_four_is_what_was_measured() -> None:
    path = ROOT / "benchmarks/tuned_wide_torch-cuda_h100_202611.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    small, large = report["workloads"]
    assert [(each["workload"], each["speedup"]) for each in (small, large)] == [("8x128", None), ("64x128", None)]
    (beside, every, faster), few = (
        [{row["candidate"]: row["speedup"] for row in each["rows"]}[f"2of4 on torch-cuda-{more}-compiled"]
         for more in ("fp16", "sparse", "sparse-autotune")] for each in (large, small)
    )  # fmt: skip
    text = " ".join(README.split())
    interval = "{:.2f}× ({:.2f} to {:.2f})".format(*(every[name] for name in ("ratio", "low", "high")))
    assert f"at 64 x 128 tokens {interval}, with all" in text
    assert f"{faster['ratio']:.2f}× with those" in text
    assert {f"{each['ratio']:.2f}× at 8 x 128" for each in few[1:]} == {"0.56× at 8 x 128"}
    assert "0.56× at 8 x 128" in text
    assert beside["ratio"] < 1.02
    layers = next(each["layers"] for each in report["candidates"] if each["layers"])
    assert sum(len(layer["weights"]) for layer in layers if layer["is_sparse"]) == 12


def test_the_other_card_took_what_was_measured() -> None:
    dense = [cell.removesuffix(" ms") for cell in _runtimes("other_card_onnxruntime-cuda")["dense"]]
    assert "took [{}, {} and {} ms](".format(*dense) in " ".join(README.split())


def test_steps_beside_another_processor_are_what_was_measured() -> None:
    path = ROOT / "benchmarks/train_step_waiting_h100_202611.json"
    rows = {(row["row"], row["precision"]): row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    dense, literal = (
        [f"{rows[name, precision]['step_ms']['median']:.1f}" for precision in ("tf32", "bf16")]
        for name in ("dense", "literal-2:4")
    )
    text = " ".join(README.split())
    assert "dense took {} and {} ms and published PST {} and {} ".format(*dense, *literal) in text


def test_the_goals_of_a_step_are_met_in_the_committed_report() -> None:
    goals = json.loads((ROOT / "benchmarks/train_step_h100_202611.json").read_text(encoding="utf-8"))["goals"]
    assert [goal["verdict"] for goal in goals] == ["met"] * 12


def _runtimes(name: str) -> dict[str, list[str]]:
    """By artifact its cell for each of SHAPES: milliseconds of the dense one, or the ratio to it."""
    report = json.loads((ROOT / f"benchmarks/runtimes_{name}_h100_202611.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, str]] = {row["artifact"]: {} for row in report["measurements"]}
    for row in report["measurements"]:
        ratio = row["speedup"] and f"{row['speedup']['ratio']:.2f}×"
        found[row["artifact"]][row["workload"]] = ratio or f"{row['latency']['p50']:.2f} ms"
    return {artifact: [cells[shape] for shape in SHAPES] for artifact, cells in found.items()}


def _cells(table: str, begin: str) -> list[str]:
    row = next(line for line in table.splitlines() if line.startswith(f"| {begin}"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_where_two_of_four_pays_is_what_was_measured() -> None:
    path = ROOT / "benchmarks/sparse_products_columns_h100_202611.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    ratios: dict[tuple[int, int], dict[int, float]] = {}
    for row in rows:
        ratios.setdefault((row["outputs"], row["inputs"]), {})[row["tokens"]] = row["speedup"]["ratio"]
    best = {shape: f"{max(each.values()):.2f}×" for shape, each in ratios.items()}
    text = " ".join(README.split())
    assert f"never at 768 x 768 ({best[768, 768]} at most)" in text
    assert f"from 4,096 tokens on at 3072 x 768 ({best[3072, 768]} at most)" in text
    assert f"from 2,048 at 4096 x 1024 ({best[4096, 1024]}), from 128 at 4096 x 4096 ({best[4096, 4096]})" in text
    first = {shape: min(t for t in each if min(each[u] for u in each if u >= t) > 1.02) for shape, each in
             ratios.items() if shape in ((3072, 768), (4096, 1024), (4096, 4096))}  # fmt: skip
    assert first == {(3072, 768): 4096, (4096, 1024): 2048, (4096, 4096): 128}
    most = max(rows, key=lambda row: float(row["speedup"]["ratio"]))
    assert f"the most is {most['speedup']['ratio']:.2f}×, at {most['outputs']} x {most['inputs']}" in text
    assert most["tokens"] == 16384


def test_readme_names_every_command_and_links_to_what_exists() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "cli", "--help"], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    ).stdout
    commands = re.findall(r"^  (\w+)  ", listed.split("Commands:")[1], flags=re.MULTILINE)
    assert commands == re.findall(r"^\| `pst (\w+)` \|", README, flags=re.MULTILINE)
    for target in re.findall(r"\]\(((?!https?:)[^)]+)\)", README):
        assert (ROOT / target).exists(), f"README links to {target}"


@pytest.mark.parametrize("machine", ["cpu", "xeon_cpu"])
def test_int8_figures_are_those_of_the_committed_reports(machine: str) -> None:
    report = json.loads((ROOT / f"benchmarks/int8_{machine}_202611.json").read_text(encoding="utf-8"))
    exact, quantized = report["models"][0]["artifacts"][:2]
    text = " ".join(README.split())
    scores = [f"{row['accuracy']['value']:.1%}" for row in (exact, quantized)]
    assert f"accuracy {' and '.join(scores)}, {quantized['size_bytes'] / 1e6:.1f} MB" in text
    for shape in ("1x32", "8x64", "1x128", "8x128"):
        assert re.search(rf"{quantized['latency'][shape]['speedup']['ratio']:.2f}× (faster )?at {shape}", text)
