"""A BERT in every pattern and linear form on one runtime: where zeros pay, where they do not, and why.

    python -m benchmarks.runtimes --work W --make models        makes the models, then
    python -m benchmarks.runtimes --work W --make artifacts     exports them (torch, onnx)
    python -m benchmarks.runtimes --work W --engine tensorrt
    python -m benchmarks.runtimes --work W --engine onnxruntime-cuda

The last two need the runtime alone, no torch. Weights are random, which cost the same time as trained ones;
magnitude says which of them go. Every artifact has gone through ``pst export``, with its checks; ``pst bench`` measures
them in turn in one process, dense being the baseline, and adds the receipt of each layer.
Writes benchmarks/runtimes_<engine>_<device>_<yyyymm>.json and .md.
"""

import argparse
from typing import Any

from benchmarks import artifacts
from pst.files import atomic_file

ARTIFACTS: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({}, "matmul"),
    "2of4-matmul": ({"pattern": "2:4"}, "matmul"),
    "2of4-gemm": ({"pattern": "2:4"}, "gemm"),
    "2of4-conv": ({"pattern": "2:4"}, "conv"),
    "dense-conv": ({}, "conv"),
    "unstructured-90": ({"pattern": "unstructured", "sparsity": 0.9}, "matmul"),
    "structured-50": ({"pattern": "structured", "sparsity": 0.5}, "matmul"),
}
"""By name: the options of pst prune, none for the dense model, and the linear form."""


def main() -> None:
    """Make the artifacts or measure them."""
    parser = artifacts.options(__doc__, shapes="1x128,8x128,32x128,128x128,32x384", runs=100)
    parser.add_argument("--make", choices=("models", "artifacts"), help="make them in --work, and measure nothing")
    parser.add_argument("--artifacts", nargs="+", default=list(ARTIFACTS), choices=ARTIFACTS, metavar="NAME")
    parser.add_argument("--size", default="base", help="base (12 layers of 768) or mini (6 of 384)")
    parser.add_argument("--precision", default="fp16", help="of the artifacts")
    parser.add_argument("--residual", default="half", help="as of pst export")
    arguments = parser.parse_args()
    if arguments.work is None:
        parser.error("--work is needed: the folder of the artifacts.")
    if arguments.make:
        make(arguments)
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
        model = models / (name.partition("-")[0])
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
    target = artifacts.write("runtimes", report, arguments)
    with atomic_file(target.with_suffix(".md")) as partial:
        partial.write_text((paths[0].parent / "report" / "report.md").read_text(encoding="utf-8"), encoding="utf-8")
    print(f"Written to {target} and {target.with_suffix('.md').name}.")


if __name__ == "__main__":
    main()
