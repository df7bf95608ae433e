"""Latency of a BERT with half of its encoder's multiply-adds removed, against its dense parent, in ONNX Runtime.

    python -m benchmarks.structured                             writes structured_cpu_<yyyymm>.json
    python -m benchmarks.structured --engine onnxruntime-cuda   on a GPU

Both have random weights, which cost the same time as trained ones. pst/structured removes like shares of heads and
neurons from every layer, and both models go through ``pst export``, with its checks.
``pst bench`` measures them in turn in one process. Models and artifacts are left in --work, if given.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from benchmarks import artifacts
from export.manifest import Manifest
from export.pipeline import export
from pst.files import write_json
from pst.patterns.structured import Structured
from pst.result import sparsity_of
from pst.sparsify import merge_, set_sparsity_, sparsify_
from serve.sample import model_folder

SIZES = {"base": (12, 768), "mini": (6, 384), "wide": (2, 4096)}
"""Layers and width; heads are 64 wide, and neurons four times as many as the width. Wide is where 2:4 may pay."""


def main() -> None:
    """Build, export, measure."""
    parser = artifacts.options(__doc__, shapes="1x128,8x128", runs=40)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--precision", default="fp32")
    artifacts.run("structured", parser.parse_args(), measure, shown=("workload", "artifact", "speedup"))


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of pst bench, with what was removed."""
    for name in ("dense", "structured"):
        if not (work / name).is_dir():
            save(work / f"{name}-model", arguments, pruned=name == "structured")
            export(work / f"{name}-model", work / name, precision=arguments.precision)
    report = artifacts.measured("structured", [work / "dense", work / "structured"], arguments, warmup=5)
    return report | {"structured": Manifest.load(work / "structured").structured, "size": arguments.size}


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
