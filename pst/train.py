"""One training run, readable from top to bottom. ``pst train`` is this with options.

DIR/config.yaml      the resolved options            DIR/checkpoints/   for --resume
DIR/metrics.jsonl    one line a logged step          DIR/model/         the result: plain weights, zeros in place
"""

import json
import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pst import checkpoint, data, methods
from pst.batches import Encoded, encode, training_batches
from pst.config import TrainConfig
from pst.errors import ConfigError, RunError
from pst.evaluate import evaluate
from pst.files import read_json, refuse_existing, storage_errors
from pst.loading import load_classifier, load_config, load_tokenizer, settle_max_length
from pst.progress import note, progress
from pst.result import save_model
from pst.schedule import CubicSchedule
from pst.settings import dump
from pst.sparsify import merge_, set_sparsity_, sparsify_

LOG_EVERY = 10
NOT_COMPARED = {"device", "checkpoint_every"}
"""Options that may differ between a run and its resumption."""


class InterruptedRun(Exception):  # noqa: N818 - not an error: the user asked
    """A signal asked to stop; the checkpoint is written."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run says of itself."""

    model: Path
    metrics: dict[str, float]
    seconds: float
    steps: int


def train(
    config: TrainConfig,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    examples: tuple[data.Examples, data.Examples] | None = None,
) -> TrainResult:
    """Train *config* into the run folder *output*; *examples* (train, validation) stand in for ``config.data``.

    With *resume*, continue from the last checkpoint, or start where there is none. Raises PSTError subclasses for
    what the user can mend, InterruptedRun after SIGINT or SIGTERM, with a checkpoint written.
    """
    config = config.filled()
    if not resume:
        refuse_existing(output, overwrite=overwrite)
    elif finished := _finished(config, output):
        return finished
    device = _device(config.device)
    seed = _given(config.seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

    # The data, the model, the masks
    spec = data_spec(config)
    rows, held_out = examples or (data.load(spec, split="train"), data.load(spec, split="validation"))
    model_config = load_config(config.model)
    max_length = settle_max_length(config.max_length, model_config, source=config.model)
    tokenizer = load_tokenizer(config.model)
    model, rows, held_out = load_classifier(config.model, model_config, rows, held_out)
    encoded, encoded_held_out = (encode(tokenizer, part, max_length=max_length) for part in (rows, held_out))
    method = methods.make(config.method, config)
    if method is not None:
        sparsify_(model, method=method, pattern=config.pattern)
    model.to(device)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "lr": config.lr}]
    groups = method.param_groups(model) if method else groups
    trainable: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    steps = config.steps or max(1, math.ceil(_given(config.epochs) * math.ceil(len(rows) / config.batch_size)))
    schedule = CubicSchedule(
        initial=min(config.sparsity_initial, _given(config.sparsity)),
        final=_given(config.sparsity),
        steps=steps,
        warmup=config.sparsity_warmup,
        cooldown=config.sparsity_cooldown,
    )

    # The run folder, and where to go on
    identity = {name: value for name, value in asdict(config).items() if name not in NOT_COMPARED}
    identity |= {"max_length": max_length, "training rows": rows.fingerprint, "validation rows": held_out.fingerprint}
    state = checkpoint.load_last(output / "checkpoints") if resume else None
    first_step, spent = 0, 0.0
    if state is not None:
        _require_same(state["identity"], identity, output)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        checkpoint.set_random_state(state["random"])
        first_step, spent = state["step"], state["seconds"]
        note(f"Resuming {output} at step {first_step} of {steps}.")
    elif resume:
        note(f"No checkpoint in {output}; starting from the first step.")
    _prepare_folder(output, config, first_step=first_step)

    def save_checkpoint(step: int) -> None:
        content: dict[str, Any] = {"identity": identity, "seconds": spent + time.monotonic() - start}
        content |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        content |= {"random": checkpoint.random_state()}
        checkpoint.save(output / "checkpoints", step=step, content=content)

    # The loop
    start = time.monotonic()
    model.train()
    batches = training_batches(encoded, batch_size=config.batch_size, seed=seed, first_step=first_step, steps=steps)
    with stop_signals() as stopped, _log(output) as log, progress("train", steps, done=first_step) as advance:
        for step, batch in enumerate(batches, first_step):
            sparsity = schedule(step)
            if method is not None:
                set_sparsity_(model, sparsity)
            factor = _rate(step, steps, _given(config.lr_warmup))
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            if not math.isfinite(loss.item()):
                raise RunError(
                    f"The loss is {loss.item()} at step {step}; lower lr, lr_update or lr_scores. "
                    f"The last good checkpoint is kept in {output / 'checkpoints'}."
                )
            optimizer.zero_grad()
            loss.backward()
            if config.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
            optimizer.step()

            done = step + 1
            advance(1, f"loss {loss.item():.3f} sparsity {sparsity:.2f}")
            if done % LOG_EVERY == 0 or done == steps:
                log(step=done, loss=loss.item(), lr_factor=factor, sparsity=sparsity)
            if config.eval_every and done % config.eval_every == 0 and done < steps:
                log(step=done, eval=_evaluate(model, encoded_held_out, config, schedule(done), rows.task, device))
            if stopped() or (config.checkpoint_every and done % config.checkpoint_every == 0 and done < steps):
                save_checkpoint(done)
            if stopped():
                raise InterruptedRun(f"Stopped at step {done} of {steps}; continue with --resume --output {output}.")

        # The result
        metrics = _evaluate(model, encoded_held_out, config, schedule.final, rows.task, device)
        log(step=steps, eval=metrics)
    if method is not None:
        merge_(model)
    seconds = spent + time.monotonic() - start
    with storage_errors(output):
        save_model(
            model.cpu(),
            tokenizer,
            output / "model",
            config=config,
            max_length=max_length,
            metrics=metrics,
            data={"train": _describe(rows), "validation": _describe(held_out)},
            task=rows.task,
            seconds=seconds,
            steps=steps,
        )
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return TrainResult(model=output / "model", metrics=metrics, seconds=seconds, steps=steps)


def _finished(config: TrainConfig, output: Path) -> TrainResult | None:
    """The result that *output* holds already, if its run came to the end. Raises RunError for another run's."""
    report_file = output / "model" / "sparsity.json"
    if not report_file.is_file():
        return None
    report = read_json(report_file, RunError, "start again with --overwrite.")
    now = json.loads(json.dumps(asdict(config)))
    _require_same({**report["config"], "device": None}, {**now, "device": None}, output)
    note(f"{output} is finished already.")
    return TrainResult(
        model=output / "model", metrics=report["metrics"], seconds=report["seconds"], steps=report["steps"]
    )


def _given(value: Any) -> Any:
    """A field that ``TrainConfig.filled`` has set."""
    assert value is not None
    return value


def data_spec(config: TrainConfig) -> data.DataSpec:
    """Where the rows of *config* come from."""
    return data.DataSpec(
        data=config.data,
        text_columns=config.text_columns,
        label_column=config.label_column,
        validation=config.validation,
        validation_fraction=config.validation_fraction,
        limit=config.limit,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU here; leave --device out to use the processor.")
    return torch.device(name)


def _rate(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rates: linear up over *warmup* of the steps, then linear to 0."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / max(rising, 1.0)
    return (steps - step) / max(steps - rising, 1.0)


def _evaluate(
    model: nn.Module, encoded: Encoded, config: TrainConfig, sparsity: float, task: str, device: torch.device
) -> dict[str, float]:
    """Metrics with the masks of the present scores. Leaves the random states as they were."""
    if config.method != "dense":
        set_sparsity_(model, sparsity)
    return evaluate(model, encoded, task=task, batch_size=max(config.batch_size, 64), device=device)


def _describe(examples: data.Examples) -> dict[str, Any]:
    return {"source": examples.source, "rows": len(examples), "sha256": examples.fingerprint}


def _require_same(stored: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    different = sorted(name for name in stored.keys() | now.keys() if stored.get(name) != now.get(name))
    if different:
        shown = ", ".join(f"{name} was {stored.get(name)!r}, now {now.get(name)!r}" for name in different[:4])
        raise RunError(
            f"The checkpoint in {output} is from another configuration ({shown}); repeat the options of that run, "
            "give --output and --resume alone, or choose another --output."
        )


def _prepare_folder(output: Path, config: TrainConfig, *, first_step: int) -> None:
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        for leftover in (*output.glob(".*.partial-*"), *output.glob("checkpoints/.*.partial-*")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        shutil.rmtree(output / "model", ignore_errors=True)
        if first_step == 0:
            shutil.rmtree(output / "checkpoints", ignore_errors=True)
        log = output / "metrics.jsonl"
        kept = log.read_text(encoding="utf-8").splitlines(keepends=True) if first_step and log.exists() else []
        # A kill can cut the last line short; what lies after the checkpoint happens again.
        kept = [line for line in kept if line.endswith("}\n") and json.loads(line)["step"] <= first_step]
        log.write_text("".join(kept), encoding="utf-8")
        dump(config, output / "config.yaml")


@contextmanager
def _log(output: Path) -> Iterator[Callable[..., None]]:
    with (output / "metrics.jsonl").open("a", encoding="utf-8") as file:

        def log(**values: Any) -> None:
            file.write(json.dumps(values) + "\n")
            file.flush()

        yield log


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within: SIGINT and SIGTERM only set a flag, which the yielded function reads."""
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        asked = True

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread: whoever owns it handles signals
            break
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
