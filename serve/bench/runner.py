"""``bench``: open the artifacts, time them in turn over all workloads, measure accuracy, write the report."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from export import manifest
from export.manifest import FILE_NAME, Manifest
from pst.data import DataSpec
from pst.errors import ArtifactError, ConfigError
from pst.files import atomic_folder, refuse_existing, resolve_model
from pst.progress import note
from serve.bench.environment import environment
from serve.bench.gpu import open_gpu, others_busy
from serve.bench.memory import Memory, MemoryWatch
from serve.bench.openings import LEAST_OPENINGS, Opening, together, unwatched
from serve.bench.receipt import Receipt, receipts
from serve.bench.report import Accuracy, Report, Subject
from serve.bench.stopping import PRECISION
from serve.bench.workload import (
    Shape,
    Workload,
    check_shapes,
    generation_workloads,
    random_workload,
    text_workload,
)
from serve.describe import ModelFolder, describe, vocab_size
from serve.engines import Engine, Shapes, available_cpus, cache_inputs, open_engine
from serve.evaluate import DataSet, check_data, evaluate
from serve.text import TextEncoder


def bench(
    paths: Sequence[Path],
    *,
    shapes: Sequence[Shape],
    output: Path,
    threads: int = 0,
    warmup: int = 10,
    runs: int = 100,
    data: DataSpec | None = None,
    command: str = "",
    engine: str = "auto",
    precision: float = PRECISION,
    budget_s: float = 120.0,
    receipt: bool = True,
    new_tokens: int = 32,
    spanned: bool = False,
    openings: int = 1,
    overwrite: bool = False,
) -> Report:
    """Measure artifact folders, bare .onnx files or model folders against the first of them, the baseline.

    *shapes*: batch x sequence. *warmup* and *runs*: least inferences per artifact and shape. With several artifacts, a
    shape goes on until every ratio's interval is within *precision* of the ratio; 0 stops after *runs*. *budget_s*:
    most seconds for all shapes together, each having an equal part of what those before it left.
    *data*: also time real texts one by one, and give every artifact's accuracy.
    *receipt*: also profile each layer at each shape, where the engine can (serve/bench/receipt.py).
    Of language models the prompt is timed, and *new_tokens* after it with the cache.
    *spanned*: TensorRT tunes one plan for the range of *shapes*, in place of each of them.
    *openings*: with LEAST_OPENINGS or more, all artifacts are opened so often, *runs* and *budget_s* are shared by the
    openings, *precision* does not count, and each opening is one round of the ratio's interval.
    Writes report.json, report.md and report.html to the folder *output*. Ctrl-C ends the measurement: the report then
    has what was measured before it, and says what is missing (Report.unmeasured). In the first workload, and where
    several *openings* are not all made, nothing is kept, and KeyboardInterrupt is raised.

    Raises ConfigError, RunError where *output* is in the way, and what describe, open_engine and evaluate raise.
    """
    if not paths:
        raise ConfigError("There is nothing to measure; give at least one artifact folder.")
    if warmup < 1 or runs < 1 or budget_s <= 0 or new_tokens < 1:
        raise ConfigError("Give --warmup, --runs and --new-tokens 1 or more, and a time budget above 0 seconds.")
    if not 0 <= precision < 1:
        raise ConfigError(f"--precision {precision} is no share of a ratio; give for example 0.01, or 0 for none.")
    if openings != 1 and openings < LEAST_OPENINGS:
        raise ConfigError(f"--openings {openings} are too few for an interval; give {LEAST_OPENINGS} or more, or 1.")
    refuse_existing(output, overwrite=overwrite, reads=[*paths, None if data is None else data.data])
    threads = threads or available_cpus()
    names = unique_names(paths)
    # Recorded before the work below, so that the load average is not our own.
    machine = environment(command=command, threads=threads)
    gpu = open_gpu()
    machine["gpu_busy_before"] = others_busy(gpu)
    folders = {name: describe_subject(path) for name, path in names.items()}
    texts = None if data is None else DataSet(data)
    if texts is not None:
        for path in names.values():
            _check_data(path, texts)
    memory = MemoryWatch(gpu)
    with contextlib.ExitStack() as stack:
        planned = Shapes(fixed=tuple(shapes), others=data is not None, new_tokens=new_tokens, spanned=spanned)
        taken: list[Opening] = []
        unmeasured: list[str] = []
        for turn in range(openings):
            stack.close()  # what was opened before
            watch = memory.of if turn == 0 else unwatched
            engines: dict[str, Engine] = {}
            for name, path in names.items():
                with watch(name):
                    engines[name] = stack.enter_context(
                        open_engine(path, engine=engine, threads=threads, shapes=planned)
                    )
            if not taken:
                new_tokens = new_tokens if all_generate(engines) else 0
                lengths = {name: opened.max_length for name, opened in engines.items()}
                check_shapes(shapes, lengths, new_tokens=new_tokens)
                workloads = workloads_of(shapes, names, folders, texts, new_tokens=new_tokens)
            one = Opening(
                label="" if openings == 1 else f", opening {turn + 1} of {openings}",
                warmup=warmup,
                runs=math.ceil(runs / openings),
                precision=precision if openings == 1 else 0.0,
            )
            one.measure(
                engines, workloads, watch, gpu if turn == openings - 1 else None, budget_s=budget_s / (openings - turn)
            )
            budget_s = max(0.0, budget_s - one.seconds)
            taken.append(one)
            measured = len(one.timings)
            if measured < len(workloads):  # interrupted
                if openings > 1:
                    raise KeyboardInterrupt  # of openings that differ in what they measured nothing can be said
                workloads, unmeasured = workloads[:measured], [each.name for each in workloads[measured:]]
        measurements, stopped = together(taken, workloads)
        accuracy: dict[str, Accuracy] = {}
        found: tuple[Receipt, ...] = ()
        later = [*(["the accuracy"] if texts is not None else []), *(["the receipts"] if receipt else [])]
        try:
            if texts is not None and not unmeasured:
                # After the times, because it leaves its shapes' buffers and CUDA graphs behind.
                accuracy = {name: _accuracy(path, texts, engines[name]) for name, path in names.items()}
                later.remove("the accuracy")
            if receipt and not unmeasured:
                found = receipts(engines, manifests_of(names), workloads)
                later.remove("the receipts")
        except KeyboardInterrupt:
            note("Interrupted; the times are kept.")
        unmeasured += later
        subjects = tuple(
            _subject(name, path, folders[name], engines[name], accuracy=accuracy.get(name), memory=memory.found(name))
            for name, path in names.items()
        )
    machine["gpu_busy_after"] = others_busy(gpu)
    report = Report(
        environment=machine,
        subjects=subjects,
        measurements=measurements,
        receipts=found,
        stopped=stopped,
        process_peak_bytes=memory.process_peak,
        layers={name: [one.layers[name] for one in taken] for name in taken[0].layers},
        unmeasured=tuple(unmeasured),
    )
    with atomic_folder(output, overwrite=overwrite) as folder:
        report.write(folder)
    return report


def unique_names(paths: Sequence[Path]) -> dict[str, Path]:
    """A short, unique name for each path: as many of its last parts as it takes to tell it from the others."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) != len(resolved):
        raise ConfigError("The same artifact is given twice; a comparison wants different ones.")
    parts = 1
    while len({path.parts[-parts:] for path in resolved}) != len(resolved):
        parts += 1
    return {"/".join(full.parts[-parts:]): path for full, path in zip(resolved, paths, strict=True)}


def describe_subject(path: Path) -> ModelFolder | None:
    """None for a bare .onnx file, of which nothing but its inputs is known."""
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; give artifact folders that pst export wrote, or .onnx files.")
    described = any((path / name).is_file() for name in ("config.json", "export.json"))
    if path.is_file() or (not described and (path / "model.onnx").is_file()):
        return None
    return describe(path, verify=True)


def manifests_of(names: Mapping[str, Path]) -> dict[str, Manifest]:
    """What export.json says, of the artifacts that have one."""
    return {name: manifest.load(path, verify=False) for name, path in names.items() if (path / FILE_NAME).is_file()}


def _subject(
    name: str, path: Path, folder: ModelFolder | None, engine: Engine, *, accuracy: Accuracy | None, memory: Memory
) -> Subject:
    file = path if path.is_file() else path / "model.onnx"
    return Subject(
        name=name,
        path=str(path),
        engine=engine.name,
        pattern=folder.pattern if folder else None,
        sparsity=folder.sparsity if folder else None,
        size_bytes=folder.size_bytes if folder else file.stat().st_size,
        load_ms=engine.load_ms,
        accuracy=accuracy,
        plan_bytes=getattr(engine, "plan_bytes", None),
        memory=memory,
    )


def _check_data(path: Path, data: DataSet) -> None:
    if path.is_file():
        raise ConfigError(f"{path} has no tokenizer beside it; give artifact folders together with --data.")
    check_data(path, data)


def _accuracy(path: Path, data: DataSet, engine: Engine) -> Accuracy:
    result = evaluate(path, data, engine=engine)
    return Accuracy(metric=result.metric, value=result.value, rows=result.rows, source=result.source)


def all_generate(engines: Mapping[str, Engine]) -> bool:
    """Whether all of them are language models with a cache. Raises ConfigError where some are."""
    found = [bool(cache_inputs(engine.inputs)) for engine in engines.values()]
    if any(found) and not all(found):
        raise ConfigError(
            f"{list(engines)[found.index(True)]} is a language model, and {list(engines)[found.index(False)]} is not; "
            "measure each kind for itself."
        )
    return any(found)


def workloads_of(
    shapes: Sequence[Shape],
    names: Mapping[str, Path],
    folders: Mapping[str, ModelFolder | None],
    data: DataSet | None,
    *,
    new_tokens: int,
) -> list[Workload]:
    known = [folder for folder in folders.values() if folder is not None]
    sizes = [vocab_size(resolve_model(path.parent if path.is_file() else path)) for path in names.values()]
    # Ids that every one of them knows: all get the same.
    smallest = None if None in sizes else min(size for size in sizes if size is not None)
    if new_tokens:
        pairs = [generation_workloads(shape, vocab_size=smallest, new_tokens=new_tokens) for shape in shapes]
        return [workload for pair in pairs for workload in pair]
    workloads = [random_workload(shape, vocab_size=smallest) for shape in shapes]
    if data is not None:
        # One artifact's tokenizer serves all: the comparison wants the same tokens for each of them.
        encoder = TextEncoder(known[0].path, max_length=min(folder.max_length for folder in known))
        examples = data.examples()
        workloads.append(text_workload(encoder, examples.first, examples.second))
    return workloads
