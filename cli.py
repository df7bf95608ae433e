"""The command line: parses, calls one function, prints. Everything heavy is imported inside the commands.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 something the user can mend, 130 interrupted.
"""

import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pst import __version__
from pst.errors import ConfigError, PSTError, StorageError

app = typer.Typer(
    name="pst",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Sparse transformers from training to serving: learn masks by PST, export 2:4 or unstructured sparse ONNX, "
    "measure honestly, serve. Start with: pst quickstart",
)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the result; must not hold one already.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result that --output already holds.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one option; may be repeated.")]
DataSets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="How to read --data: text_columns, label_column, validation, validation_fraction or limit; "
        "may be repeated.",
    ),
]
Threads = Annotated[int, typer.Option(min=0, help="Processor threads of one inference; 0 = all this process may use.")]
EngineName = Annotated[str, typer.Option(help="Runtime: auto, onnxruntime, onnxruntime-cuda, torch or torch-cuda.")]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="glue/TASK, a hub id, a .jsonl/.csv/.tsv/.parquet file, or a folder."),
]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        _show(__version__)
        raise typer.Exit


def _list_train_options(asked: bool) -> None:
    if not asked:
        return
    from pst.config import TrainConfig
    from pst.settings import describe

    _show("\n".join(f"{row.key} ({row.type}, default {row.default}): {row.help}" for row in describe(TrainConfig)))
    raise typer.Exit


@app.command(
    short_help="Learn a sparse model from labelled text.",
    epilog="Example: pst train --model DIR --data reviews.csv --pattern 2:4 --output runs/reviews",
)
def train(
    output: Output,
    model: Annotated[str | None, typer.Option(help="Hugging Face folder or hub id to start from.")] = None,
    data: DataOption = None,
    method: Annotated[
        str | None, typer.Option(help="pst (default), magnitude, movement, soft_movement, fixed_mask, or dense.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="unstructured (default), N:M such as 2:4, block:RxC, or structured: heads and neurons are removed."
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of zeros from 0 to below 1, such as 0.9; N:M fixes it.")
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="TOML file that gives each weight a pattern of its own, such as attention dense.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Dense model of the same task to distil from: a folder or hub id.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training rows; default 3.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of --epochs.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random; default 0.")] = None,
    faithful: Annotated[
        bool, typer.Option("--faithful", help="The published PST to the letter, frozen random head included.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of the options that --list-options names.")
    ] = None,
    sets: Sets = None,
    list_options: Annotated[
        bool,
        typer.Option(
            "--list-options",
            is_eager=True,
            callback=_list_train_options,
            help="List every option of --set and --config.",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint of --output.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Learn a sparse model: text classification with one or two sentences, and regression.

    Writes OUTPUT/model, a plain Hugging Face folder with zeros in place. Options override each other in this order:
    defaults, --config, --set, named flags. A run that was stopped goes on with --resume, which needs --output alone.
    """
    from pst.config import TrainConfig
    from pst.settings import resolve

    flags = {"model": model, "data": data, "method": method, "pattern": pattern, "sparsity": sparsity}
    flags |= {
        "plan": plan,
        "teacher": teacher,
        "epochs": epochs,
        "steps": steps,
        "seed": seed,
        "faithful": faithful or None,
    }
    stored = output / "config.yaml"
    if resume and config is None and stored.is_file():
        config = stored
    settings = resolve(TrainConfig, file=config, sets=sets or (), flags=flags)

    from pst.train import InterruptedRun
    from pst.train import train as run

    try:
        result = run(settings, output, resume=resume, overwrite=overwrite)
    except InterruptedRun as stop:
        print(stop, file=sys.stderr)
        raise typer.Exit(130) from None
    if int(os.environ.get("RANK", "0")):  # of several processes, the first one speaks
        return
    shown = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    _show(f"{result.model}: {shown} ({result.steps} steps, {result.seconds:.0f} s)")


@app.command(
    short_help="Train several methods alike and compare them.",
    epilog="Example: pst compare --model DIR --data glue/cola --methods dense,magnitude,pst --output runs/comparison",
)
def compare(
    model: Annotated[str, typer.Option(help="Hugging Face folder or hub id that every run starts from.")],
    data: Annotated[str, typer.Option(help="glue/TASK, a hub id, a .jsonl/.csv/.tsv/.parquet file, or a folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the runs and the report.")],
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; pst-faithful is the published PST.")
    ] = "dense,magnitude,pst",
    patterns: Annotated[str, typer.Option(help="Patterns, separated by commas.")] = "unstructured,2:4",
    sparsities: Annotated[str, typer.Option(help="Fractions of zeros; N:M fixes its own.")] = "0.5,0.9",
    seeds: Annotated[int, typer.Option(help="Runs of each, with the seeds 0, 1, 2, ...")] = 3,
    from_dense: Annotated[
        bool, typer.Option("--from-dense", help="Start the sparse runs from the dense run of their seed.")
    ] = False,
    teacher_from_dense: Annotated[
        bool, typer.Option("--teacher-from-dense", help="Distil the sparse runs from the dense run of their seed.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each in a process of its own.")] = 1,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[METHOD.]KEY=VALUE",
            help="Set one training option for all runs, or for one method's; may be repeated.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train every run again, even if --output holds a comparison.")
    ] = False,
) -> None:
    """Train every method with every pattern, sparsity and seed on the same data for the same steps, and compare.

    Writes report.json, report.md and a plot of the metric against sparsity. What was stopped goes on when the same
    command is given again: finished runs are kept.
    """
    from pst.compare import compare as run
    from pst.compare import parse_names, parse_sparsities
    from pst.train import InterruptedRun

    try:
        report = run(
            model=model,
            data=data,
            methods=parse_names(methods),
            patterns=parse_names(patterns),
            sparsities=parse_sparsities(sparsities),
            seeds=seeds,
            output=output,
            sets=sets or (),
            from_dense=from_dense,
            teacher_from_dense=teacher_from_dense,
            jobs=jobs,
            overwrite=overwrite,
            command=shlex.join(["pst", *sys.argv[1:]]),
        )
    except InterruptedRun as stop:
        print(stop, file=sys.stderr)
        raise typer.Exit(130) from None
    _show(report.render())


@app.command(
    short_help="Prune a model without training it.",
    epilog="Example: pst prune MODEL --pattern 2:4 --data reviews.csv --compensate --output pruned",
)
def prune(
    source: Annotated[str, typer.Argument(help="Run or model folder, or hub id.")],
    output: Output,
    pattern: Annotated[
        str | None, typer.Option(help="unstructured (default), N:M such as 2:4, block:RxC, or structured.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of zeros from 0 to below 1, such as 0.5; N:M fixes it.")
    ] = None,
    plan: Annotated[
        str, typer.Option(help="TOML file that gives each weight a pattern of its own, such as attention dense.")
    ] = "",
    method: Annotated[
        str | None, typer.Option(help="magnitude, or wanda, which looks at inputs too [wanda where --data is given].")
    ] = None,
    compensate: Annotated[
        bool, typer.Option("--compensate", help="Adjust the weights that stay for those that go, as SparseGPT does.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Calibration text: a .txt file, or a table or hub id with a text column."),
    ] = None,
    sets: DataSets = None,
    rows: Annotated[int, typer.Option(help="Rows of calibration text, evenly spaced.")] = 128,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row; default 128 or the model's limit.")] = None,
    budget: Annotated[
        str, typer.Option(help="local: the sparsity holds in each weight; global: over all of them.")
    ] = "local",
    overwrite: Overwrite = False,
) -> None:
    """Prune a model in one go, with the head it has: the quick way to zeros, and what training is to be compared with.

    Writes a plain Hugging Face folder with zeros in place and sparsity.json, which pst export takes. With --data it
    says how much the outputs of each pruned layer change on that text.
    """
    from pst.prune import prune as run

    if budget not in ("local", "global"):
        raise ConfigError(f"Unknown budget {budget!r}; use local or global.")
    result = run(
        source,
        output,
        pattern=pattern,
        sparsity=sparsity,
        plan=plan,
        method=method,
        adjust=compensate,
        data=_data_spec(data, sets),
        rows=rows,
        max_length=max_length,
        budget=budget,  # type: ignore[arg-type]
        overwrite=overwrite,
    )
    share = "removed" if result.pattern == "structured" else "zeros in the pruned weights"
    _show(f"{result.model}: {result.pattern} by {result.method}, {result.sparsity:.1%} {share}")
    if result.errors:
        worst = max(result.errors, key=lambda name: result.errors[name])
        mean, most = sum(result.errors.values()) / len(result.errors), result.errors[worst]
        _show(f"outputs of a pruned layer change by {mean:.1%} on average, at most by {most:.1%} ({worst})")


@app.command(
    short_help="Write a model as ONNX, proven against PyTorch.",
    epilog="Example: pst export runs/reviews --output artifacts/reviews",
)
def export(
    source: Annotated[Path, typer.Argument(help="Run or model folder, or an artifact.")],
    output: Output,
    format: Annotated[  # noqa: A002
        str,
        typer.Option(help="onnx; tensorrt, a plan as well; triton or triton-tensorrt, a model folder of Triton's."),
    ] = "onnx",
    task: Annotated[
        str,
        typer.Option(
            help="What the graph answers: classification, token_classification, question_answering, "
            "feature_extraction, text_generation, or auto for the model's own head."
        ),
    ] = "auto",
    opset: Annotated[int, typer.Option(help="ONNX operator set; 17 is the newest that TensorRT 8.6 reads.")] = 17,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, or products in fp16, bf16 or int8 (calibrated on --data), with norms, softmax and logits in "
            "fp32."
        ),
    ] = "fp32",
    linear_form: Annotated[
        str,
        typer.Option(
            help="Operator of the prunable layers: matmul, gemm (transB, bias inside), conv (1x1, the form with sparse "
            "kernels in TensorRT 8.6), or auto for what torch.onnx writes."
        ),
    ] = "auto",
    activations: Annotated[
        str, typer.Option(help="Of int8: uint8 for ONNX Runtime on a CPU, or int8 (symmetric) for TensorRT.")
    ] = "uint8",
    storage: Annotated[
        str,
        typer.Option(help="dense, or sparse: zeros are left out of the file where that makes it smaller, not faster."),
    ] = "dense",
    data: DataOption = None,
    sets: DataSets = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Shapes of a plan and of Triton's batches, BATCHxTOKENS: smallest, usual, largest "
            "[1x1,8x128,32 x the model's limit]."
        ),
    ] = None,
    compute_capability: Annotated[
        str, typer.Option(help="GPU that TensorRT-RTX builds a plan for, such as SM86 [the one here, else SM80].")
    ] = "",
    atol: Annotated[
        float | None,
        typer.Option(
            help="Largest absolute difference from PyTorch, per unit of root mean square above 1 "
            "[fp32 1e-4, fp16 0.1, bf16 1, int8 2]."
        ),
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option(
            help="Largest difference relative to PyTorch, added to --atol [fp32 1e-3, fp16 2e-2, others 5e-2]."
        ),
    ] = None,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Keep the weights in a file beside model.onnx.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the ONNX graph of a model, zeros in place, once its pattern and its outputs are proven.

    Outputs are compared with PyTorch on random inputs and on real ones: --data, or the validation rows that the model
    was trained with. Nothing is written when the pattern does not hold or the outputs differ. With --data, the metric
    of the model and of the artifact is measured as well, where the rows have labels. A causal language model becomes
    one graph for the prompt and each next token, with its key/value cache. SOURCE may be an artifact already, for a
    plan or a model folder of Triton's.
    """
    from export.formats import check_format, export_as
    from export.pipeline import check_options
    from export.real_inputs import calibration_texts, real_inputs

    check_format(format, output, overwrite=overwrite)
    spec = _data_spec(data, sets)
    check_options(
        output,
        task=task,
        opset=opset,
        precision=precision,
        linear_form=linear_form,
        activations=activations,
        storage=storage,
        overwrite=overwrite,
        atol=atol,
        rtol=rtol,
        calibrated=spec is not None,
    )
    made = (source / "export.json").is_file()
    manifest = export_as(
        format,
        source,
        output,
        profile=profile,
        compute_capability=compute_capability,
        task=task,
        opset=opset,
        precision=precision,
        linear_form=linear_form,
        activations=activations,
        storage=storage,
        examples=None if made else real_inputs(source, spec, task=task),
        calibration=calibration_texts(source, spec) if precision == "int8" and not made else None,
        data=data,
        overwrite=overwrite,
        external_data=external_data,
        atol=atol,
        rtol=rtol,
    )
    share = "removed" if manifest.pattern == "structured" else "zeros"
    _show(f"{output}: {manifest.pattern}, {manifest.sparsity['measured']:.1%} {share}, opset {manifest.opset}")
    if manifest.accuracy is not None:
        found = manifest.accuracy
        _show(
            f"{found.metric} on {found.rows} rows of {data}: {found.pytorch:.4f} in PyTorch (fp32), "
            f"{found.artifact:.4f} in the artifact ({precision})"
        )


def _data_spec(data: str | None, sets: Sequence[str] | None) -> Any:
    """A DataSpec from --data and --set, or None without --data."""
    from pst.data import DataSpec
    from pst.settings import resolve

    if data is None and not sets:
        return None
    return resolve(DataSpec, sets=sets or (), flags={"data": data})


@app.command(
    name="eval",
    short_help="Measure a model's quality.",
    epilog="Example: pst eval artifacts/reviews --data reviews.csv --predictions rows.jsonl",
)
def evaluate(
    path: Annotated[Path, typer.Argument(help="Run, model or artifact folder.")],
    data: Annotated[str, typer.Option(help="A file (used whole), a folder or hub id (its validation rows).")],
    sets: DataSets = None,
    engine: EngineName = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per inference.")] = 32,
    threads: Threads = 0,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Write label, prediction and scores of each row to this .jsonl file."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model's quality with its task's metric, in PyTorch or ONNX Runtime.

    A language model's artifact is measured by its perplexity of text: a .txt file, or a table with a text column.
    """
    from serve.evaluate import evaluate as run

    result = run(
        path,
        _data_spec(data, sets),
        engine=engine,
        batch_size=batch_size,
        predictions=predictions,
        threads=threads,
    )
    _show(_json(result.to_json()) if json else result.render())


@app.command(
    short_help="Compare latencies, several artifacts in turn.",
    epilog="Example: pst bench artifacts/dense artifacts/sparse --shapes 1x32,8x128 --output reports/reviews",
)
def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifacts; the first is the baseline of the ratios.")],
    output: Output,
    shapes: Annotated[str, typer.Option(help="Batch x tokens, separated by commas.")] = "1x32,1x128,8x128",
    runs: Annotated[int, typer.Option(min=1, help="Timed inferences of each artifact at each shape.")] = 100,
    warmup: Annotated[int, typer.Option(min=1, help="Untimed inferences before them.")] = 10,
    budget: Annotated[float, typer.Option(min=0.1, help="Most seconds for all shapes together.")] = 120.0,
    threads: Threads = 0,
    engine: EngineName = "auto",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a language model writes after each prompt.")] = 32,
    data: DataOption = None,
    sets: DataSets = None,
    receipt: Annotated[
        bool, typer.Option("--receipt/--no-receipt", help="Also time each layer, and say why its zeros save nothing.")
    ] = True,
    overwrite: Overwrite = False,
) -> None:
    """Measure latency, several artifacts in turn in one process: p50, p90, p99, mean, throughput, and the ratio.

    Writes report.json, report.md and report.html. With --data, real texts are measured too, and the accuracy stands
    beside. The receipt tells of every layer which kernel ran, for how long, and why it was not a sparse one.
    Of language models the prompt and the tokens after it are measured apart.
    """
    from serve.bench.runner import bench as run
    from serve.bench.workload import parse_shapes

    report = run(
        artifacts,
        shapes=parse_shapes(shapes),
        output=output,
        threads=threads,
        warmup=warmup,
        runs=runs,
        data=_data_spec(data, sets),
        command=shlex.join(["pst", *sys.argv[1:]]),
        engine=engine,
        budget_s=budget,
        receipt=receipt,
        new_tokens=new_tokens,
        overwrite=overwrite,
    )
    _show(report.render())


@app.command(
    short_help="Compare two reports of pst bench.",
    epilog="Example: pst report reports/before reports/after",
)
def report(
    first: Annotated[Path, typer.Argument(help="A report.json, or the folder that holds it.")],
    second: Annotated[Path, typer.Argument(help="Another, of the same artifacts at the same shapes.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two reports of pst bench: two machines, versions or revisions, with each ratio's interval.

    They were not measured in turn, so everything that differs between the two machines is listed beside the ratios.
    """
    from serve.bench.comparison import compare_reports

    found = compare_reports(first, second)
    _show(_json(found.to_json()) if json else found.render())


@app.command(short_help="Say where the zeros of any model are.", epilog="Example: pst inspect model.onnx")
def inspect(
    path: Annotated[Path, typer.Argument(help="Model folder, artifact, .safetensors or .onnx file, anyone's.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where the zeros are: per weight its shape, axis and density, and which patterns hold."""
    from export.inspect import inspect as run

    inspection = run(path)
    _show(_json(inspection.to_json()) if json else inspection.render())


@app.command(
    short_help="Answer texts over HTTP.",
    epilog="Example: pst serve artifacts/reviews --port 8000",
)
def serve(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    threads: Threads = 0,
    engine: EngineName = "auto",
    max_batch_size: Annotated[int, typer.Option(min=1, help="Most texts per inference.")] = 16,
    max_queue_delay_ms: Annotated[
        float,
        typer.Option(min=0, help="Most milliseconds that a text waits for others; with a language model none does."),
    ] = 1.0,
    max_queue_size: Annotated[int, typer.Option(min=1, help="Most texts that wait; then 503 is answered.")] = 512,
) -> None:
    """Serve an artifact over HTTP: POST /v1/classify {"text": "..."}, GET /v2/health/ready. Stops on Ctrl-C.

    A language model is asked at /v1/generate: {"text": "...", "max_new_tokens": 64}, and with "stream": true answers
    token by token; "stop", "temperature", "top_p" and "seed" are there too.
    """
    from serve.http.server import serve as run

    run(
        artifact,
        host=host,
        port=port,
        threads=threads,
        max_batch_size=max_batch_size,
        max_queue_delay_ms=max_queue_delay_ms,
        max_queue_size=max_queue_size,
        engine=engine,
    )


@app.command(
    short_help="All of it on a real model and real reviews.",
    epilog="Example: pst quickstart --sparsity 0.9",
)
def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything it makes.")] = Path(
        "runs/quickstart"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again, even if --output holds trained models.")] = False,
    sparsity: Annotated[float, typer.Option(help="Fraction of zeros of the sparse model.")] = 0.8,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each model.")] = 350,
) -> None:
    """The whole pipeline on a real model and real film reviews: a dense and a sparse MiniLM, side by side.

    Trains both, exports them, proves and measures them, starts the server and asks it one question. Minutes on two
    processor cores. Models that are trained already are kept.
    """
    from serve.quickstart import quickstart as run

    _show(run(output, fresh=fresh, sparsity=sparsity, steps=steps))


def _json(value: object) -> str:
    import json

    return json.dumps(value, indent=2)


def _show(text: str) -> None:
    """Print a result. That its reader has gone (``| head``) is no error; that it cannot be written (``> FILE``) is."""
    try:
        print(text, flush=True)
    except OSError as error:
        # What is left in the buffer would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise StorageError(f"The output cannot be written: {error.strerror}. Send it elsewhere.") from error


def main() -> None:
    """Entry point of ``pst``: user errors become one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 still gets its table
    try:
        app(prog_name="pst")
    except PSTError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
