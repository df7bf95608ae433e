"""The commands train, compare and prune. Everything heavy is imported inside them, so that ``--help`` is quick."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from pst.command_line import DataOption, DataSets, Output, Overwrite, Sets, data_spec, show
from pst.errors import ConfigError, RunError

app = typer.Typer()


def _list_train_options(asked: bool) -> None:
    if not asked:
        return
    from pst.config import TrainConfig
    from pst.settings import describe

    show("\n".join(f"{row.key} ({row.type}, default {row.default}): {row.help}" for row in describe(TrainConfig)))
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
        str | None,
        typer.Option(help="Dense model to distil from: a folder, a hub id, start for --model itself, or off."),
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
    if epochs is not None and steps is None:
        flags["steps"] = 0  # those of --config, which would win over epochs
    stored = output / "config.yaml"
    if resume and config is None and stored.is_file():
        config = stored
    if resume and config is None and model is None and not sets:
        raise RunError(f"{output} holds no run to go on with; give the --output of one, or all options to begin one.")
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
    show(f"{result.model}: {shown} ({result.steps} steps, {result.seconds:.0f} s)")


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
    show(report.render())
    if lost := [f"{row.method} {row.pattern} {row.sparsity:.0%}" for row in report.rows if row.value is None]:
        raise RunError(
            f"Without a result, since every run failed: {', '.join(lost)}. The report says why; the same command tries "
            "them again."
        )


@app.command(
    short_help="Prune a model without training it.",
    epilog="Example: pst prune MODEL --pattern 2:4 --data reviews.csv --method alps --output pruned",
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
        str | None,
        typer.Option(
            help="magnitude; wanda, which looks at inputs too; or alps, which fits masks and weights to what each "
            "layer does, the nearest to dense [wanda where --data is given]."
        ),
    ] = None,
    compensate: Annotated[
        bool, typer.Option("--compensate", help="Adjust the weights that stay for those that go, by least squares.")
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
        data=data_spec(data, sets),
        rows=rows,
        max_length=max_length,
        budget=budget,  # type: ignore[arg-type]
        overwrite=overwrite,
    )
    share = "removed" if result.pattern == "structured" else "zeros in the pruned weights"
    show(f"{result.model}: {result.pattern} by {result.method}, {result.sparsity:.1%} {share}")
    if result.errors:
        worst = max(result.errors, key=lambda name: result.errors[name])
        mean, most = sum(result.errors.values()) / len(result.errors), result.errors[worst]
        show(f"outputs of a pruned layer change by {mean:.1%} on average, at most by {most:.1%} ({worst})")
