"""Where 2:4 pays: cuSPARSELt's product with its algorithm search against cuBLAS's dense one, by shape, on one GPU.

    python -m benchmarks.sparse_products --output benchmarks      writes sparse_products_columns_<gpu>_<yyyymm>.json

For each width h the three products of a transformer's block: h x h, 4h x h and h x 4h (outputs x inputs). The two are
timed in turn by the GPU's own clock, with the L2 cache overwritten before each and launches left out, by
serve/engines/_torch_products.py, as in ``pst predict``. Every sparse product is compared with the dense one of the same
weights first. Its outputs are in columns, which a product can read, but not a norm; with --layout rows, as all layers
read them, where cuSPARSELt can do that (0.8.0 cannot on an H100).
Shapes that --seconds leaves no time for are listed as left out. Prints a table, and from how many tokens on 2:4 pays.
Without a GPU it says so, with exit code 2.
"""

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reports import report_path, text_table
from pst.errors import EngineError, PSTError
from pst.files import write_json
from pst.revision import git_revision
from serve.bench.environment import environment
from serve.bench.gpu import open_gpu
from serve.bench.report_tables import show_ratio
from serve.bench.stopping import StopRule
from serve.bench.timing import Speedup, compare_samples, percentile
from serve.engines._torch_products import (
    GpuTimer,
    TorchDense,
    TorchTwoOfFour,
    fits,
    has_cusparselt,
    load_torch,
    random_pair,
)
from serve.predict.products import rounds

SCHEMA_VERSION = 1
METHOD = (
    "Milliseconds between two CUDA events, dense (cuBLAS) and 2:4 (cuSPARSELt, algorithm from its search) in turn, "
    "with the L2 cache overwritten before each, launches hidden behind a sleep of the GPU, and one untimed product "
    "before each timed one. The ratio is dense over sparse time, median of the rounds, with its 95% interval. TFLOPS "
    "count the dense product's operations, for both."
)
Shape = tuple[int, int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(given)
    try:
        report = measure(options, command=shlex.join(["python", "-m", "benchmarks.sparse_products", *given]))
    except PSTError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    name = f"sparse_products_{options.layout}"
    path = options.output / report_path(name, report["environment"]).name
    write_json(path, report)
    print(render(report))
    print(f"Written to {path}.")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    parser.add_argument("--widths", type=numbers, default=[768, 1024, 2048, 4096, 8192], help="%(default)s")
    parser.add_argument("--tokens", type=numbers, default=[128, 512, 2048, 4096, 8192, 16384], help="%(default)s")
    parser.add_argument("--dtypes", default="float16,bfloat16", help="%(default)s")
    parser.add_argument(
        "--layout", choices=("rows", "columns"), default="columns", help="of sparse outputs (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=45.0, help="after which no shape is begun (%(default)s)")
    parser.add_argument("--budget", type=float, default=0.1, help="most seconds of rounds for a shape (%(default)s)")
    return parser.parse_args(arguments)


def products(widths: Sequence[int]) -> list[Shape]:
    """Outputs x inputs of the three products of each width, each once, the smallest first."""
    found = itertools.chain.from_iterable(((h, h), (4 * h, h), (h, 4 * h)) for h in widths)
    return sorted(dict.fromkeys(found), key=lambda shape: shape[0] * shape[1])


def measure(options: argparse.Namespace, *, command: str) -> dict[str, Any]:
    """The content of the report. Raises EngineError without a GPU that multiplies 2:4."""
    torch = load_torch()
    if not has_cusparselt(torch):
        raise EngineError(
            "This PyTorch or GPU has no cuSPARSELt; it takes an Ampere GPU or newer, and PyTorch for CUDA."
        )
    machine = environment(command=command, threads=1)
    machine["gpus"] = machine["gpus"] or [torch.cuda.get_device_name()]
    gpu, begin = open_gpu(), time.perf_counter()
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    timer = GpuTimer(torch)
    for dtype, shape in itertools.product(options.dtypes.split(","), products(options.widths)):
        late = time.perf_counter() - begin > options.seconds
        if late or not fits(*shape):
            why = "for want of time" if late else "which cuSPARSELt does not take"
            left_out.append(f"{dtype} {shape[0]} x {shape[1]}, {why}")
            continue
        try:
            for row in _of_shape(torch, timer, shape, dtype, options):
                rows.append(row)
                if time.perf_counter() - begin > options.seconds and row["tokens"] != options.tokens[-1]:
                    left_out.append(f"{dtype} {shape[0]} x {shape[1]} beyond {row['tokens']} tokens, for want of time")
                    break
        except EngineError as error:  # one shape that the kernel refuses is a finding, and no end
            left_out.append(f"{dtype} {shape[0]} x {shape[1]}: {error}")
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": machine | {"cuda": torch.version.cuda, "cusparselt": torch.backends.cusparselt.version()},
        "git_revision": git_revision(),
        "method": METHOD,
        "layout": options.layout,
        "sm_clock_mhz_at_the_end": None if gpu is None else gpu.clock_mhz(),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
        "pays": pays(rows),
        "left_out": left_out,
    }


def _of_shape(
    torch: Any, timer: GpuTimer, shape: Shape, dtype: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each number of tokens."""
    outputs, inputs = shape
    full, zeroed = random_pair(torch, outputs, inputs, getattr(torch, dtype))
    dense, sparse = (
        TorchDense(torch, timer, [full]),
        TorchTwoOfFour(torch, timer, [zeroed], rows=options.layout == "rows"),
    )
    for tokens in options.tokens:
        calls = {"dense": dense.at(tokens), "sparse": sparse.at(tokens)}
        samples, _ = rounds(calls, StopRule(runs=100, precision=0, budget_s=options.budget))
        yield row_of(shape, tokens, dtype, samples, kernel=sparse.kernel)


def row_of(
    shape: Shape, tokens: int, dtype: str, samples: Mapping[str, Sequence[float]], *, kernel: str
) -> dict[str, Any]:
    """One row of the report: what the samples, in ms, say."""
    outputs, inputs = shape
    operations = 2 * outputs * inputs * tokens
    dense_ms, sparse_ms = percentile(samples["dense"], 50), percentile(samples["sparse"], 50)
    return {
        "dtype": dtype,
        "outputs": outputs,
        "inputs": inputs,
        "tokens": tokens,
        "dense_ms": dense_ms,
        "sparse_ms": sparse_ms,
        "dense_tflops": operations / dense_ms / 1e9,
        "sparse_tflops": operations / sparse_ms / 1e9,
        "speedup": compare_samples(samples["dense"], samples["sparse"]).to_json(),
        "kernel": kernel,
    }


def pays(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each type and shape: from how many tokens on every row is faster (None for never), and the best ratio."""
    groups: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["outputs"], row["inputs"]), []).append(row)
    found = []
    for (dtype, outputs, inputs), members in groups.items():
        ordered = sorted(members, key=lambda row: -row["tokens"])
        fast = list(itertools.takewhile(lambda row: row["speedup"]["finding"] == "faster", ordered))
        best = max(ordered, key=lambda row: row["speedup"]["ratio"])
        found.append(
            {
                "dtype": dtype,
                "outputs": outputs,
                "inputs": inputs,
                "from_tokens": fast[-1]["tokens"] if fast else None,
                "best_ratio": best["speedup"]["ratio"],
                "best_tokens": best["tokens"],
            }
        )
    return found


def render(report: Mapping[str, Any]) -> str:
    """The two tables, and what was left out."""
    header = ["type", "outputs x inputs", "tokens", "dense ms", "2:4 ms", "dense TFLOPS", "2:4 TFLOPS", "ratio", ""]
    body = [
        [
            row["dtype"],
            f"{row['outputs']} x {row['inputs']}",
            str(row["tokens"]),
            f"{row['dense_ms']:.4f}",
            f"{row['sparse_ms']:.4f}",
            f"{row['dense_tflops']:.0f}",
            f"{row['sparse_tflops']:.0f}",
            show_ratio(_speedup(row["speedup"])),
            row["speedup"]["finding"],
        ]
        for row in report["rows"]
    ]
    lines = [text_table(header, body, left=2), ""]
    for each in report["pays"]:
        since = each["from_tokens"]
        said = "does not pay at the most tokens" if since is None else f"pays from {since} tokens on"
        lines.append(
            f"{each['dtype']} {each['outputs']} x {each['inputs']}: {said}; "
            f"best {each['best_ratio']:.2f}× at {each['best_tokens']}."
        )
    lines += [f"Left out: {each}" for each in report["left_out"]]
    return "\n".join([*lines, report["method"]])


def _speedup(value: Mapping[str, Any]) -> Speedup:
    return Speedup(ratio=value["ratio"], low=value["low"], high=value["high"], rounds=value["rounds"])


if __name__ == "__main__":
    main()
