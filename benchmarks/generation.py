"""Prompt latency and tokens a second of a GPT-2 with its cache: dense, 2:4, and half of its multiply-adds removed.

    python -m benchmarks.generation --output benchmarks                             writes generation_cpu_<yyyymm>.json
    python -m benchmarks.generation --engine onnxruntime-cuda --output benchmarks   on a GPU

The size is that of GPT-2's smallest, 124 million parameters. Weights are random, which cost the same time as trained
ones; magnitude says which of them go. All three go through ``pst export``, with its checks, and ``pst bench`` measures
them in turn in one process. Models and artifacts are left in --work, if given.
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
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.reports import report_path
from export.pipeline import export
from pst.files import write_json
from pst.prune import prune
from pst.result import git_revision
from pst.scratch import make_gpt2
from serve.bench.runner import bench
from serve.bench.workload import parse_shapes

ARTIFACTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "2of4": {"pattern": "2:4"},
    "structured": {"pattern": "structured", "sparsity": 0.5},
}


def main() -> None:
    """Build, export, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    parser.add_argument("--engine", default="onnxruntime", help="as of pst bench: onnxruntime or onnxruntime-cuda")
    parser.add_argument("--layers", type=int, default=12, help="of 768 features (12)")
    parser.add_argument("--shapes", default="1x32,8x32,32x32")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=240.0, help="seconds after which a workload stops early")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for models and artifacts; artifacts found there are measured")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="generation-"))
    try:
        report = measure(work, arguments)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    cuda = arguments.engine.endswith("cuda")
    path = report_path("generation", report["environment"], device="cuda" if cuda else "cpu")
    write_json(arguments.output / path.name, report)
    shown = ("workload", "artifact", "per_token_ms", "tokens_per_s", "speedup")
    for row in report["measurements"]:
        print(json.dumps({key: row[key] for key in shown}))


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of pst bench."""
    for name, options in ARTIFACTS.items():
        if (work / name).is_dir():
            continue
        if not options:
            save(work / "model", layers=arguments.layers)
        else:
            prune(work / "model", work / f"{name}-model", **options)
        export(work / f"{name}-model" if options else work / "model", work / name)
    result = bench(
        [work / name for name in ARTIFACTS],
        shapes=parse_shapes(arguments.shapes),
        output=work / "report",
        threads=arguments.threads,
        warmup=2,
        runs=arguments.runs,
        new_tokens=arguments.new_tokens,
        command=_command(arguments),
        engine=arguments.engine,
        budget_s=arguments.seconds,
        overwrite=True,
    )
    print(result.render(), file=sys.stderr)
    report: dict[str, Any] = json.loads((work / "report" / "report.json").read_text(encoding="utf-8"))
    for artifact in report["artifacts"]:
        artifact["path"] = artifact["name"]
    return report | {"layers": arguments.layers, "git_revision": git_revision()}


def _command(arguments: argparse.Namespace) -> str:
    """What repeats the measurement; where its files were kept does not belong to it."""
    given = {name: value for name, value in sorted(vars(arguments).items()) if name not in ("work", "output")}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    return shlex.join(["python", "-m", "benchmarks.generation", *flags, "--output", "benchmarks"])


def save(folder: Path, *, layers: int) -> None:
    """A random GPT-2, the same each time, with GPT-2's vocabulary and a tokenizer that knows the bytes."""
    make_gpt2(folder, ["a"], layers=1, width=64, heads=1, vocabulary=300, overwrite=True)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
