"""A BERT in every pattern and linear form on one runtime: where zeros pay, where they do not, and why.

    python -m benchmarks.runtimes --work W --make models        makes the models, then
    python -m benchmarks.runtimes --work W --make artifacts     exports them (torch, onnx)
    python -m benchmarks.runtimes --work W --engine tensorrt
    python -m benchmarks.runtimes --work W --engine onnxruntime-cuda
    python -m benchmarks.runtimes --work W --engine onnxruntime-sparse --threads 1 --artifacts dense unstructured-90
    python -m benchmarks.runtimes --work W --engine tensorrt --tune         chooses among them, as pst bench --tune
    python -m benchmarks.runtimes --work W --engine torch-cuda-fp16-compiled,torch-cuda-sparse-compiled --tune
                                                                            of the models: torch takes no artifacts

Those of the runtimes need the runtime alone, no torch. Weights are random, which cost the same time as trained ones;
magnitude says which of them go. Every artifact has gone through ``pst export``, with its checks; ``pst bench`` measures
them in turn in one process, dense being the baseline, and adds the receipt of each layer.
Writes benchmarks/runtimes_<engine>_<device>_<yyyymm>.json and .md; --tune, tuned_<engine>_<device>_<yyyymm>.json,
where of several engines the first two words of the first stand.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import artifacts
from pst.files import atomic_file
from pst.revision import git_revision
from serve.bench.workload import parse_shapes
from serve.tune.run import tune
from serve.tune.words import render

ARTIFACTS: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({}, "matmul"),
    "2of4-matmul": ({"pattern": "2:4"}, "matmul"),
    "2of4-gemm": ({"pattern": "2:4"}, "gemm"),
    "2of4-conv": ({"pattern": "2:4"}, "conv"),
    "dense-conv": ({}, "conv"),
    "unstructured-50": ({"pattern": "unstructured", "sparsity": 0.5}, "matmul"),
    "unstructured-80": ({"pattern": "unstructured", "sparsity": 0.8}, "matmul"),
    "unstructured-90": ({"pattern": "unstructured", "sparsity": 0.9}, "matmul"),
    "structured-50": ({"pattern": "structured", "sparsity": 0.5}, "matmul"),
}
"""By name: the options of pst prune, none for the dense model, and the linear form."""


def main() -> None:
    """Make the artifacts or measure them."""
    parser = artifacts.options(__doc__, shapes="1x128,8x128,32x128,128x128,32x384", runs=100)
    parser.add_argument("--make", choices=("models", "artifacts"), help="make them in --work, and measure nothing")
    parser.add_argument("--artifacts", nargs="+", default=list(ARTIFACTS), choices=ARTIFACTS, metavar="NAME")
    parser.add_argument("--size", default="base", help="base (12 layers of 768), mini (6 of 384), wide (2 of 4096)")
    parser.add_argument("--precision", default="fp16", help="of the artifacts")
    parser.add_argument("--residual", default="half", help="as of pst export")
    parser.add_argument("--name", help="stands in the report's name, behind the size")
    parser.add_argument("--tune", action="store_true", help="choose what to run, as of pst bench; threads and runs too")
    arguments = parser.parse_args()
    if arguments.work is None:
        parser.error("--work is needed: the folder of the artifacts.")
    if arguments.make:
        make(arguments)
    elif arguments.tune:
        choose(arguments)
    else:
        measure(arguments)


def make(arguments: argparse.Namespace) -> None:
    """What is not there yet of the models, all from one random BERT, or of the artifacts."""
    from benchmarks.structured import save
    from export.pipeline import export
    from pst.prune import prune

    models = arguments.work / "models"
    if not (models / "dense").is_dir():
        save(models / "dense", arguments, pruned=False)
    for name in arguments.artifacts:
        options, form = ARTIFACTS[name]
        model = _model(arguments.work, name)
        if not model.is_dir():
            prune(models / "dense", model, **options)
        if arguments.make == "artifacts" and not (arguments.work / name).is_dir():
            export(
                model,
                arguments.work / name,
                precision=arguments.precision,
                residual=arguments.residual,
                linear_form=form,
            )


def measure(arguments: argparse.Namespace) -> None:
    """Write the report of pst bench."""
    paths = [arguments.work / name for name in arguments.artifacts]
    report = artifacts.measured("runtimes", paths, arguments, warmup=10)
    target = artifacts.write(_name("runtimes", arguments), report, arguments)
    with atomic_file(target.with_suffix(".md")) as partial:
        partial.write_text((paths[0].parent / "report" / "report.md").read_text(encoding="utf-8"), encoding="utf-8")
    print(f"Written to {target} and {target.with_suffix('.md').name}.")


def choose(arguments: argparse.Namespace) -> None:
    """Write what pst bench --tune chooses."""
    folders = [arguments.work / name for name in arguments.artifacts]
    if arguments.engine.startswith("torch"):
        folders = list(dict.fromkeys(_model(arguments.work, name) for name in arguments.artifacts))
    tuned = tune(
        folders,
        shapes=parse_shapes(arguments.shapes),
        output=arguments.work / "tuned",
        engine=arguments.engine,
        threads=arguments.threads,
        runs=arguments.runs,
        budget_s=arguments.seconds,
        spanned=arguments.spanned,
        command=artifacts.command("runtimes", arguments),
        overwrite=True,
    )
    print(render(tuned), file=sys.stderr)
    content = (arguments.work / "tuned" / "tuned.json").read_text(encoding="utf-8")
    for prefix in (arguments.work.resolve(), arguments.work):
        content = content.replace(f"{prefix}/", "")  # where the files were does not belong to it
    report = json.loads(content)
    arguments.engine = "-".join(arguments.engine.partition(",")[0].split("-")[:2])  # of several, what they begin with
    target = artifacts.write(_name("tuned", arguments), report | {"git_revision": git_revision()}, arguments)
    print(f"Written to {target}.")


def _model(work: Path, name: str) -> Path:
    """What the artifact *name* is made of: the linear forms of one model share it."""
    shared = name.partition("-")[0]
    return work / "models" / (shared if shared in ("dense", "2of4") else name)


def _name(kind: str, arguments: argparse.Namespace) -> str:
    return "_".join([kind, *([] if arguments.size == "base" else [arguments.size]), *filter(None, [arguments.name])])


if __name__ == "__main__":
    main()
