"""One training run, readable from top to bottom. ``pst train`` is this with options.

DIR/config.yaml      the resolved options            DIR/checkpoints/   for --resume
DIR/metrics.jsonl    one line a logged step          DIR/model/         the result: plain weights, zeros in place
"""

import hashlib
import json
import math
import random
import re
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
from pst.errors import ConfigError, ModelError, RunError
from pst.evaluate import evaluate
from pst.files import atomic_file, read_json, refuse_existing, remove, storage_errors
from pst.loading import load_classifier, load_config, load_tokenizer, require_vocabulary, settle_max_length
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
    if resume and (finished := _finished(config, output)):
        return finished
    _refuse_existing(output, resume=resume, overwrite=overwrite)
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
    fingerprint = _fingerprint(model)
    encoded, encoded_held_out = (encode(tokenizer, part, max_length=max_length) for part in (rows, held_out))
    for part in (encoded, encoded_held_out):
        require_vocabulary(model, part.columns["input_ids"], source=config.model)
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
    identity |= {"starting weights": fingerprint}
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
    _prepare_folder(output, config, first_step=first_step, steps=steps)

    def choose_masks(step: int, sparsity: float) -> None:
        try:
            set_sparsity_(model, sparsity)
        except ModelError as error:  # scores that are not finite
            raise _diverged(step, output) from error

    def save_checkpoint(step: int) -> None:
        _require_finite(trainable, step, output)
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
            if method is not None and step % config.mask_every == 0:
                choose_masks(step, sparsity)
            factor = _rate(step, steps, _given(config.lr_warmup))
            for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                group["lr"] = rate * factor
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm or math.inf)
            if not math.isfinite(loss.item() + norm.item()):
                raise _diverged(step, output)
            optimizer.step()

            done = step + 1
            advance(1, f"loss {loss.item():.3f} sparsity {sparsity:.2f}")
            if done % LOG_EVERY == 0 or done == steps:
                log(step=done, loss=loss.item(), lr_factor=factor, sparsity=sparsity)
            if config.eval_every and done % config.eval_every == 0 and done < steps:
                log(step=done, eval=_evaluate(model, encoded_held_out, config, rows.task, device))
            if stopped() or (config.checkpoint_every and done % config.checkpoint_every == 0 and done < steps):
                save_checkpoint(done)
            if stopped():
                raise InterruptedRun(f"Stopped at step {done} of {steps}; continue with --resume --output {output}.")

        # The result
        _require_finite(trainable, steps, output)
        if method is not None:
            choose_masks(steps, schedule.final)
        metrics = _evaluate(model, encoded_held_out, config, rows.task, device)
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
    remove(output / "checkpoints")
    return TrainResult(model=output / "model", metrics=metrics, seconds=seconds, steps=steps)


def _finished(config: TrainConfig, output: Path) -> TrainResult | None:
    """The result that *output* holds already, if its run came to the end. Raises RunError for another run's."""
    report_file = output / "model" / "sparsity.json"
    if not report_file.is_file():
        return None
    remedy = "start again with --overwrite."
    report = read_json(report_file, RunError, remedy)
    now = json.loads(json.dumps(asdict(config)))
    try:
        stored, metrics, seconds, steps = (report[name] for name in ("config", "metrics", "seconds", "steps"))
    except KeyError as error:
        raise RunError(f"{report_file} does not say {error}, so it is not a run of this program; {remedy}") from error
    ignored = dict.fromkeys(NOT_COMPARED)
    _require_same({**stored, **ignored}, {**now, **ignored}, output)
    remove(output / "checkpoints")  # a kill can have come between the result and this
    note(f"{output} is finished already.")
    return TrainResult(model=output / "model", metrics=metrics, seconds=seconds, steps=steps)


def _refuse_existing(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise RunError where *output* holds what this run must not touch: any run, or, to resume, anything but a run."""
    interrupted = any(output.glob("checkpoints/*.pt"))
    if interrupted and not resume and not overwrite:
        raise RunError(
            f"{output} holds a run that is not finished, which is kept; continue it with --resume, replace it with "
            "--overwrite, or choose another --output."
        )
    if resume and (interrupted or (output / "metrics.jsonl").exists() or not _visible(output)):
        return
    refuse_existing(output, overwrite=overwrite)


def _visible(folder: Path) -> bool:
    return any(not path.name.startswith(".") for path in folder.glob("*"))


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
        raise ConfigError("device is cuda, but torch sees no GPU here; use --set device=auto, or cpu.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; use auto, cpu, cuda, or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but the GPUs here are numbered 0 to {torch.cuda.device_count() - 1}.")
    return device


def _fingerprint(model: nn.Module) -> str:
    """SHA-256 of all tensors of *model*, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()


def _diverged(step: int, output: Path) -> RunError:
    kept = (
        f" Checkpoints from before are kept in {output / 'checkpoints'}." if any(output.glob("checkpoints/*")) else ""
    )
    return RunError(
        f"Training diverged: a loss, gradient or weight is not a finite number at step {step}. "
        f"Start again with a lower lr, lr_update or lr_scores.{kept}"
    )


def _require_finite(parameters: list[nn.Parameter], step: int, output: Path) -> None:
    """Raise RunError where a weight is NaN or infinite, so that no checkpoint and no result ever holds one."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise _diverged(step, output)


def _rate(step: int, steps: int, warmup: float) -> float:
    """Factor of the learning rates: linear up over *warmup* of the steps, then linear to 0."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / max(rising, 1.0)
    return (steps - step) / max(steps - rising, 1.0)


def _evaluate(
    model: nn.Module, encoded: Encoded, config: TrainConfig, task: str, device: torch.device
) -> dict[str, float]:
    """Metrics under the present masks. Changes nothing that training depends on."""
    return evaluate(model, encoded, task=task, batch_size=max(config.batch_size, 64), device=device)


def _describe(examples: data.Examples) -> dict[str, Any]:
    return {"source": examples.source, "rows": len(examples), "sha256": examples.fingerprint}


def _require_same(stored: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    different = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    if different:
        shown = ", ".join(
            f"{name} was {_short(stored.get(name))}, now {_short(now.get(name))}" for name in different[:4]
        )
        raise RunError(
            f"The run in {output} is from another configuration ({shown}); repeat the options of that run, "
            "give --output and --resume alone, or choose another --output."
        )


def _short(value: Any) -> str:
    """A value for a message: of a digest, its first digits."""
    return f"{value[:8]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else repr(value)


def _prepare_folder(output: Path, config: TrainConfig, *, first_step: int, steps: int) -> None:
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        for leftover in (*output.glob(".*.partial-*"), *output.glob("checkpoints/.*.partial-*")):
            remove(leftover)
        remove(output / "model" / "sparsity.json")  # first, so that a kill here leaves nothing that looks finished
        remove(output / "model")
        if first_step == 0:
            remove(output / "checkpoints")
        path = output / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if first_step and path.exists() else []
        with atomic_file(path) as partial:
            kept = (line for line in lines if _lies_before(line, first_step, steps))
            partial.write_text("".join(kept), encoding="utf-8")
        dump(config, output / "config.yaml")


def _lies_before(line: str, first_step: int, steps: int) -> bool:
    """Whether a logged line stays on resuming at *first_step*: a later one, and the final metrics, happen again."""
    try:
        values = json.loads(line)
    except ValueError:  # a kill cut it short
        return False
    final = "eval" in values and values["step"] == steps
    return bool(values["step"] <= first_step and not final)


@contextmanager
def _log(output: Path) -> Iterator[Callable[..., None]]:
    with storage_errors(output), (output / "metrics.jsonl").open("a", encoding="utf-8") as file:

        def log(**values: Any) -> None:
            with storage_errors(output):
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
