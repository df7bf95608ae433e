"""int8 against fp32 on this machine's CPU: the task's metric, latency in turn, and which operators run.

    Q=runs/quickstart; python -m benchmarks.int8 $Q/dense $Q/sparse --data $Q/data --output runs/int8

Each model (a run folder) is exported to OUTPUT/NAME: fp32, int8 for ONNX Runtime (activations uint8), and int8 for
TensorRT (activations int8), calibrated on training rows of --data. Then ``pst bench`` measures the three in turn, in
one process, and their metric on the validation rows. The operators are those of the graph as ONNX Runtime optimizes it.

Prints tables, and writes everything to benchmarks/int8_cpu_<yyyymm>.json, or to --report.
"""

import argparse
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from benchmarks.reports import report_path, text_table
from export.pipeline import export
from export.real_inputs import calibration_texts, real_inputs
from pst.data import DataSpec
from pst.files import write_json
from serve.bench.runner import bench
from serve.bench.workload import parse_shapes

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int8": {"precision": "int8", "activations": "uint8"},
    "int8-tensorrt": {"precision": "int8", "activations": "int8"},
}
_VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")
_PRODUCTS = (
    "MatMul",
    "FusedMatMul",
    "Gemm",
    "FusedGemm",
    "MatMulIntegerToFloat",
    "QLinearMatMul",
    "QGemm",
    "Attention",
)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Export what is not there yet, measure, print; returns where the report lies."""
    options = _options(arguments)
    spec = DataSpec(data=str(options.data))
    models, environment = [], {}
    for run in options.models:
        artifacts = {form: options.output / run.name / form for form in FORMS}
        for form, artifact in artifacts.items():
            if not (artifact / "export.json").is_file():
                export(
                    run, artifact, examples=real_inputs(run, spec), calibration=calibration_texts(run, spec),
                    **FORMS[form],
                )  # fmt: skip
        report = bench(
            list(artifacts.values()), shapes=parse_shapes(options.shapes), output=options.output / run.name / "report",
            threads=options.threads, runs=options.runs, data=spec, budget_s=options.budget, overwrite=True,
            command=shlex.join(["python", "-m", "benchmarks.int8", *options.given]),
        )  # fmt: skip
        environment = report.environment
        found = [_row(form, artifact, report.to_json()) for form, artifact in artifacts.items()]
        models.append({"model": run.name, "pattern": report.subjects[0].pattern, "artifacts": found})
        print(f"\n{run.name}, {report.subjects[0].pattern}, {report.environment['threads']} threads")
        print(_table(found))
    vnni = sorted(set(environment["cpu_features"]) & set(_VNNI))
    print(f"\n{environment['cpu']}: {', '.join(vnni) or 'no VNNI'}")
    place = options.report or report_path("int8", environment, device="cpu")
    write_json(place, {"environment": environment, "vnni": vnni, "models": models})
    print(f"Written to {place}.")
    return place


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="run folders of pst train")
    parser.add_argument("--data", type=Path, required=True, help="folder with train and validation rows")
    parser.add_argument("--output", type=Path, required=True, help="folder for the artifacts")
    parser.add_argument("--shapes", default="1x32,8x64,1x128,8x128", help="batch x tokens (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=60, help="timed inferences of each (%(default)s)")
    parser.add_argument("--budget", type=float, default=300.0, help="most seconds for all shapes (%(default)s)")
    parser.add_argument("--report", type=Path, help="JSON file to write, in place of the one in benchmarks/")
    options = parser.parse_args(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    return options


def _row(form: str, artifact: Path, report: dict[str, Any]) -> dict[str, Any]:
    """What the bench report says of one artifact, without the samples, and its operators."""
    subject = next(entry for entry in report["artifacts"] if entry["name"] == artifact.name)
    latency = {
        entry["workload"]: {
            **{name: entry["latency"][name] for name in ("unit", "p50", "p99", "runs")}, "speedup": entry["speedup"],
        }
        for entry in report["measurements"] if entry["artifact"] == artifact.name
    }  # fmt: skip
    return {"form": form, "size_bytes": subject["size_bytes"], "accuracy": subject["accuracy"],
            "products": products(artifact / "model.onnx"), "latency": latency}  # fmt: skip


def products(model: Path) -> dict[str, int]:
    """How many matrix products of each operator ONNX Runtime runs on this CPU, after its optimizations."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        counts = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    return {name: counts[name] for name in _PRODUCTS if counts[name]}


def _table(rows: list[dict[str, Any]]) -> str:
    shapes = list(rows[0]["latency"])
    lines = []
    for row in rows:
        cells = [row["form"], f"{row['size_bytes'] / 1e6:.1f} MB", f"{row['accuracy']['value']:.4f}"]
        for shape in shapes:
            found = row["latency"][shape]
            speedup = found["speedup"]
            ratio = (
                "" if speedup is None else f" {speedup['ratio']:.2f}x ({speedup['low']:.2f} to {speedup['high']:.2f})"
            )
            cells.append(f"{found['p50']:.2f} ms{ratio}")
        lines.append([*cells, " + ".join(f"{count} {name}" for name, count in row["products"].items())])
    metric = rows[0]["accuracy"]["metric"]
    return text_table(["form", "size", metric, *shapes, "products"], lines)


if __name__ == "__main__":
    main()
