"""Latency of a BERT with half of its encoder's multiply-adds removed, against its dense parent, in ONNX Runtime.

    python -m benchmarks.structured --output benchmarks                             writes structured_cpu_<yyyymm>.json
    python -m benchmarks.structured --engine onnxruntime-cuda --output benchmarks   on a GPU

Both have random weights, which cost the same time as trained ones. pst/structured removes like shares of heads and
neurons from every layer, and both models go through ``pst export``, with its checks.
``pst bench`` measures them in turn in one process. Models and artifacts are left in --work, if given.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from benchmarks.reports import report_path
from export.pipeline import export
from pst.files import write_json
from pst.patterns.structured import Structured
from pst.result import git_revision, sparsity_of
from pst.sparsify import merge_, set_sparsity_, sparsify_
from serve.bench.runner import bench
from serve.bench.workload import parse_shapes
from serve.sample import model_folder

SIZES = {"base": (12, 768), "mini": (6, 384)}
"""Layers and width; heads are 64 wide, and neurons four times as many as the width."""


def main() -> None:
    """Build, export, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    parser.add_argument("--engine", default="onnxruntime", help="as of pst bench: onnxruntime or onnxruntime-cuda")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--shapes", default="1x128,8x128")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=240.0, help="most seconds for all shapes together")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for models and artifacts; artifacts found there are measured")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="structured-"))
    try:
        report = measure(work, arguments)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    cuda = arguments.engine.endswith("cuda")
    path = report_path("structured", report["environment"], device="cuda" if cuda else "cpu")
    write_json(arguments.output / path.name, report)
    for row in report["measurements"]:
        print(json.dumps({key: row[key] for key in ("workload", "artifact", "speedup")}))


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of pst bench, with what was removed."""
    removed = {}
    for name in ("dense", "structured"):
        if not (work / name).is_dir():
            pruned = name == "structured"
            save(work / f"{name}-model", arguments, pruned=pruned)
            export(work / f"{name}-model", work / name, precision=arguments.precision)
        if name == "structured":
            removed = json.loads((work / name / "export.json").read_text(encoding="utf-8"))["structured"]
    result = bench(
        [work / "dense", work / "structured"],
        shapes=parse_shapes(arguments.shapes),
        output=work / "report",
        threads=arguments.threads,
        warmup=5,
        runs=arguments.runs,
        command=_command(arguments),
        engine=arguments.engine,
        budget_s=arguments.seconds,
        overwrite=True,
    )
    print(result.render(), file=sys.stderr)
    report: dict[str, Any] = json.loads((work / "report" / "report.json").read_text(encoding="utf-8"))
    for artifact in report["artifacts"]:
        artifact["path"] = artifact["name"]
    return report | {"structured": removed, "size": arguments.size, "git_revision": git_revision()}


def _command(arguments: argparse.Namespace) -> str:
    """What repeats the measurement; where its files were kept does not belong to it."""
    given = [f"--{name}={value}" for name, value in sorted(vars(arguments).items()) if name not in ("work", "output")]
    return shlex.join(["python", "-m", "benchmarks.structured", *given, "--output", "benchmarks"])


def save(folder: Path, arguments: argparse.Namespace, *, pruned: bool) -> None:
    """A random BERT, the same each time, with units removed if *pruned*, with MiniLM's tokenizer."""
    layers, width = SIZES[arguments.size]
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    if pruned:
        sparsify_(model, pattern=Structured())
        set_sparsity_(model, arguments.sparsity, budget="local")
        merge_(model)
    model.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    if pruned:
        report = sparsity_of(model, method="pst", pattern="structured", requested=arguments.sparsity)
        write_json(folder / "sparsity.json", report)


if __name__ == "__main__":
    main()
