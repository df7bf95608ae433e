"""The commands predict, eval, bench, report, serve and quickstart. What is heavy is imported inside them."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from pst.command_line import DataOption, DataSets, EngineName, Output, Overwrite, Threads, as_json, data_spec, show
from pst.errors import ConfigError

app = typer.Typer()


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
        data_spec(data, sets),
        engine=engine,
        batch_size=batch_size,
        predictions=predictions,
        threads=threads,
    )
    show(as_json(result.to_json()) if json else result.render())


@app.command(
    short_help="Compare latencies, several artifacts in turn.",
    epilog="Example: pst bench artifacts/dense artifacts/sparse --shapes 1x32,8x128 --output reports/reviews",
)
def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifacts; the first is the baseline of the ratios.")],
    output: Output,
    shapes: Annotated[str, typer.Option(help="Batch x tokens, separated by commas.")] = "1x32,1x128,8x128",
    runs: Annotated[int, typer.Option(min=1, help="Least timed inferences of each artifact at each shape.")] = 100,
    warmup: Annotated[int, typer.Option(min=1, help="Untimed inferences before them.")] = 10,
    precision: Annotated[
        float,
        typer.Option(
            help="Half width of a ratio's interval, relative to the ratio, that ends a shape; 0 ends it after --runs."
        ),
    ] = 0.01,
    budget: Annotated[float, typer.Option(min=0.1, help="Most seconds for all shapes together.")] = 120.0,
    threads: Threads = 0,
    engine: Annotated[
        str,
        typer.Option(
            help="Runtime: auto, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx, torch or torch-cuda; with "
            "--tune several, separated by commas."
        ),
    ] = "auto",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a language model writes after each prompt.")] = 32,
    spanned: Annotated[
        bool,
        typer.Option("--spanned", help="TensorRT: one plan for the range of shapes, built faster; not one for each."),
    ] = False,
    data: DataOption = None,
    sets: DataSets = None,
    openings: Annotated[
        int,
        typer.Option(
            min=1, help="How often all artifacts are opened: 6 or more also tell how sessions of one file differ."
        ),
    ] = 1,
    receipt: Annotated[
        bool, typer.Option("--receipt/--no-receipt", help="Also time each layer, and say why its zeros save nothing.")
    ] = True,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose the fastest artifact and engine, never slower than dense.")
    ] = False,
    traffic: Annotated[
        Path | None,
        typer.Option(help="With --tune: a .csv of SHAPE,COUNT lines in place of --shapes; total time then decides."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure latency, several artifacts in turn in one process: p50, p90, p99, mean, throughput, and the ratio.

    Writes report.json, report.md and report.html. With --data, real texts are measured too, and the accuracy stands
    beside. A shape is measured until the interval of every ratio is narrow enough (--precision), or --budget is spent;
    the report says which, and how narrow it is.
    The receipt tells of every layer which kernel ran, for how long, and why it was not a sparse one.
    Ctrl-C ends the measurement, and the report has the shapes that were measured until then.
    Of language models the prompt and the tokens after it are measured apart.

    --tune takes a dense artifact and sparse versions of it, tries each in each engine, and drops early what is clearly
    slower. It writes tuned.json: for each shape and for all of them what to run, what lost, and why. Where sparse does
    not pay it keeps dense, and says so. pst serve takes the folder that holds tuned.json.
    Example: pst bench artifacts/dense artifacts/sparse --tune --engine onnxruntime,torch-cpu --output reports/tuned
    """
    from serve.bench.runner import bench as run
    from serve.bench.workload import parse_shapes

    if tune:
        if data is not None or sets:
            raise ConfigError("--tune measures no accuracy; leave --data out, and measure the choice with pst eval.")
        if openings != 1:
            raise ConfigError(
                "--tune opens everything once; leave --openings out, and check the choice with pst bench."
            )
        from serve.tune.run import tune as tune_run
        from serve.tune.traffic import read_traffic
        from serve.tune.words import render

        counts = None if traffic is None else read_traffic(traffic)
        tuned = tune_run(
            artifacts,
            shapes=parse_shapes(shapes) if counts is None else list(counts),
            output=output,
            engine=engine,
            counts=counts,
            threads=threads,
            warmup=warmup,
            runs=runs,
            precision=precision,
            budget_s=budget,
            new_tokens=new_tokens,
            spanned=spanned,
            receipt=receipt,
            command=shlex.join(["pst", *sys.argv[1:]]),
            overwrite=overwrite,
        )
        show(render(tuned))
        return
    if traffic is not None:
        raise ConfigError("--traffic weighs the shapes of --tune; add --tune, or give --shapes.")

    report = run(
        artifacts,
        shapes=parse_shapes(shapes),
        output=output,
        threads=threads,
        warmup=warmup,
        runs=runs,
        data=data_spec(data, sets),
        command=shlex.join(["pst", *sys.argv[1:]]),
        engine=engine,
        precision=precision,
        budget_s=budget,
        receipt=receipt,
        new_tokens=new_tokens,
        spanned=spanned,
        openings=openings,
        overwrite=overwrite,
    )
    show(report.render())
    if report.unmeasured:
        raise typer.Exit(130)


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
    show(as_json(found.to_json()) if json else found.render())


@app.command(
    short_help="Say what speed-up to expect, before training.",
    epilog="Example: pst predict --model DIR --pattern 2:4 --shapes 1x128,32x128",
)
def predict(
    model: Annotated[Path, typer.Option(help="Hugging Face model folder, trained or not, or artifact folder.")],
    pattern: Annotated[str, typer.Option(help="Pattern: 2:4 or another N:M, unstructured, block:RxC, structured.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of zeros, or of what is removed; an N:M fixes it, else 0.5.")
    ] = None,
    shapes: Annotated[str, typer.Option(help="Batch x tokens, separated by commas.")] = "1x32,1x128,8x128",
    engine: Annotated[
        str, typer.Option(help="Runtime: onnxruntime (CPU), torch-cuda, or auto: the GPU where PyTorch sees one.")
    ] = "auto",
    threads: Threads = 0,
    precision: Annotated[
        float, typer.Option(help="Half width of a speed-up's interval, relative to it, that ends a shape.")
    ] = 0.02,
    budget: Annotated[float, typer.Option(min=0.1, help="Most seconds for all shapes together.")] = 60.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what speed-up a pattern would bring to a model on this machine, before any training.

    Times each of the model's linears with random weights, dense and with zeros of the pattern, in turn with the whole
    dense model, and adds up. Where the machine has no sparse kernel, it says so, and what would help.
    """
    from serve.bench.workload import parse_shapes
    from serve.predict.run import predict as run

    found = run(
        model,
        pattern=pattern,
        sparsity=sparsity,
        shapes=parse_shapes(shapes),
        engine=engine,
        threads=threads,
        precision=precision,
        budget_s=budget,
        command=shlex.join(["pst", *sys.argv[1:]]),
    )
    show(as_json(found.to_json()) if json else found.render())


@app.command(
    short_help="Answer texts over HTTP.",
    epilog="Example: pst serve artifacts/reviews --port 8000",
)
def serve(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder, or what pst bench --tune wrote.")],
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
    The folder of a tuned.json names artifact, engine and threads itself, and the engine is opened as it was measured:
    batches are filled up to the measured shapes where it has kernels of their own for them.
    """
    from serve.http.server import serve as run
    from serve.tune.serving import serving

    found = serving(artifact, engine=engine, threads=threads)
    run(
        found.path,
        host=host,
        port=port,
        threads=found.threads,
        max_batch_size=max_batch_size,
        max_queue_delay_ms=max_queue_delay_ms,
        max_queue_size=max_queue_size,
        engine=found.engine,
        shapes=found.shapes,
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

    show(run(output, fresh=fresh, sparsity=sparsity, steps=steps))
