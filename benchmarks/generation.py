"""Prompt latency and tokens a second of a GPT-2 with its cache: dense, with zeros, and with heads and neurons removed.

    python -m benchmarks.generation --artifacts dense 2of4 structured   writes generation_cpu_<yyyymm>.json
    python -m benchmarks.generation --engine onnxruntime-sparse         zeros skipped on a processor
    python -m benchmarks.generation --work W --make --precision fp16    makes the artifacts alone (torch, onnx), then
    python -m benchmarks.generation --work W --engine onnxruntime-cuda  measures them (no torch), likewise tensorrt

The size is that of GPT-2's smallest, 124 million parameters. Weights are random, which cost the same time as trained
ones; magnitude says which of them go. All go through ``pst export``, with its checks, and ``pst bench`` measures
them in turn in one process. Models and artifacts are left in --work, if given.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import artifacts

ARTIFACTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "2of4": {"pattern": "2:4"},
    "unstructured-80": {"pattern": "unstructured", "sparsity": 0.8},
    "unstructured-90": {"pattern": "unstructured", "sparsity": 0.9},
    "structured": {"pattern": "structured", "sparsity": 0.5},
}


def main() -> None:
    """Build, export, measure."""
    parser = artifacts.options(__doc__, shapes="1x32,8x32,32x32", runs=20)
    parser.add_argument("--make", action="store_true", help="make the artifacts in --work, and measure nothing")
    parser.add_argument("--artifacts", nargs="+", default=list(ARTIFACTS), choices=ARTIFACTS, metavar="NAME")
    parser.add_argument("--layers", type=int, default=12, help="of 768 features (12)")
    parser.add_argument("--precision", default="fp32", help="of the artifacts; below fp32, sums are half as well")
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.work, arguments)
        return
    shown = ("workload", "artifact", "per_token_ms", "tokens_per_s", "speedup")
    artifacts.run("generation", arguments, measure, shown=shown)


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of pst bench."""
    if not all((work / name).is_dir() for name in arguments.artifacts):
        make(work, arguments)
    paths = [work / name for name in arguments.artifacts]
    report = artifacts.measured("generation", paths, arguments, warmup=2, new_tokens=arguments.new_tokens)
    return report | {"layers": arguments.layers}


def make(work: Path, arguments: argparse.Namespace) -> None:
    """The artifacts that are not there yet."""
    from export.pipeline import export
    from pst.prune import prune

    for name in arguments.artifacts:
        options, model = ARTIFACTS[name], work / "model"
        if (work / name).is_dir():
            continue
        if not model.is_dir():
            save(model, layers=arguments.layers)
        if options:
            prune(work / "model", model := work / f"{name}-model", overwrite=True, **options)
        residual = "fp32" if arguments.precision == "fp32" else "half"
        export(model, work / name, precision=arguments.precision, residual=residual)


def save(folder: Path, *, layers: int) -> None:
    """A random GPT-2, the same each time, with GPT-2's vocabulary and a tokenizer that knows the bytes."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from pst.scratch import make_gpt2

    make_gpt2(folder, ["a"], layers=1, width=64, heads=1, vocabulary=300, overwrite=True)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
