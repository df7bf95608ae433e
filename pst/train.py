"""One training run, readable from top to bottom: ``pst train`` is this with options, pst/run_folder.py what it leaves.

Several processes (``torchrun``, ``accelerate launch``) run this same code; see pst/distributed.py.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pst import checkpoint, memory, methods, tasks
from pst.batches import training_rows
from pst.calibration import Calibration
from pst.config import START, TrainConfig
from pst.device import named_device
from pst.distributed import Processes, processes
from pst.dropout import set_dropout_
from pst.errors import ModelError, RunError
from pst.files import remove, storage_errors
from pst.graphs import RecordedSteps, padded_length
from pst.loading import fingerprint_of
from pst.objective import Objective
from pst.patterns import parse_pattern
from pst.pending import Delayed, Pending, moved
from pst.plan import read_plan
from pst.progress import note, progress, silence
from pst.result import save_model
from pst.run_folder import (
    NOT_COMPARED,
    finished_report,
    open_log,
    prepare_folder,
    refuse_other_run,
    require_same,
)
from pst.schedule import CubicSchedule
from pst.signals import stop_signals
from pst.sparsify import MaskCheck, merge_, set_sparsity_, sparsify_
from pst.structured.calibration import UnitCalibration
from pst.structured.choose import require_reachable
from pst.teacher import find_teacher, settle, teach_parts

LOG_EVERY = 10


class InterruptedRun(Exception):  # noqa: N818 - not an error: the user asked
    """A signal asked to stop; the checkpoint is written."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run says of itself."""

    model: Path
    metrics: dict[str, float]
    seconds: float
    steps: int
    peak_memory_bytes: int | None = None
    """Of the process that held most: a GPU's tensors, or all of a process on the processor; None where unknown."""
    trainable_parameters: int | None = None


def train(
    config: TrainConfig, output: Path, *, resume: bool = False, overwrite: bool = False, **given: Any
) -> TrainResult:
    """Train *config* into the run folder *output*; *given* goes to the task's ``prepare`` (``examples=``, say).

    With *resume*, continue from the last checkpoint, or start where there is none. Raises PSTError subclasses for
    what the user can mend, InterruptedRun after SIGINT or SIGTERM, with a checkpoint written.
    """
    config = config.filled()
    with processes(config.device) as group:
        if not group.first:
            silence()
        return _train(config, output, group, resume=resume, overwrite=overwrite, given=given)


def _train(
    config: TrainConfig, output: Path, group: Processes, *, resume: bool, overwrite: bool, given: dict[str, Any]
) -> TrainResult:
    # What is there already
    def already() -> dict[str, Any] | None:
        found = finished_report(config, output) if resume else None
        if found is None:
            refuse_other_run(config, output, resume=resume, overwrite=overwrite)
        return found

    report = group.first_does(already)
    if report is not None:
        note(f"{output} is finished already.")
        return _result(output, report)
    device = named_device(config.device, group)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where graphs are recorded and kernels are started
    memory.reset_peak(device)
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    seed = _given(config.seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

    # The data, the model, the masks
    prepared = tasks.prepare(config, **given)
    model, rows = prepared.model, prepared.train
    fingerprint = fingerprint_of(model, config.model)
    teacher, taught_by = find_teacher(config, prepared)
    shape = replace(config, **methods.shape_of(config.method, model, config))
    method = methods.make(config.method, config)
    if method is not None:
        plan = read_plan(config.plan) if config.plan else None
        pattern = parse_pattern("unstructured") if plan else shape.parsed_pattern()
        require_reachable(model, pattern, _given(shape.sparsity))
        weights = sparsify_(model, method=method, pattern=pattern, plan=plan)
        for line in plan.overview({item.name: item.weight.numel() for item in weights}) if plan else ():
            note(line)
    model.to(device)
    teacher = settle(teacher, config, prepared, device, group)
    if config.dropout is not None and (teacher is not None or config.teacher != START):
        set_dropout_(model, config.dropout)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "lr": config.lr}]
    groups = method.param_groups(model) if method else groups
    trainable: list[nn.Parameter] = [parameter for one in groups for parameter in one["params"]]
    recording = config.graphs == "auto" and device.type == "cuda" and group.count == 1 and config.accumulate == 1
    base_rates = [one["lr"] for one in groups]
    settings: dict[str, Any] = {"weight_decay": config.weight_decay, "fused": True, "capturable": recording}
    optimizer = torch.optim.AdamW(groups, **settings)
    objective = Objective(
        label_smoothing=config.label_smoothing,
        teacher=teacher,
        weight=_given(config.distill_weight),
        temperature=config.distill_temperature,
        hidden=_given(config.distill_hidden),
    )
    steps = config.steps or max(1, math.ceil(_given(config.epochs) * math.ceil(len(rows) / config.batch_size)))
    schedule = CubicSchedule(
        initial=min(_given(shape.sparsity_initial), _given(shape.sparsity)),
        final=_given(shape.sparsity),
        steps=steps,
        warmup=_given(config.sparsity_warmup),
        cooldown=_given(config.sparsity_cooldown),
    )
    calibration = None
    if config.calibration and method is not None:
        calibration = (UnitCalibration if shape.pattern == "structured" else Calibration)(
            rows=rows,
            count=config.calibration,
            batch_size=config.batch_size,
            seed=seed,
            budget=config.budget,
            final=schedule.final,
        )
    if group.rank:  # dropout differs between processes; everything up to here was drawn alike
        torch.manual_seed(seed + 1_000_003 * group.rank)

    # The run folder, and where to go on
    identity = {name: value for name, value in asdict(config).items() if name not in NOT_COMPARED}
    identity |= {"max_length": prepared.max_length, **prepared.fingerprints, "starting weights": fingerprint}
    identity |= taught_by
    state = checkpoint.load_last(output / "checkpoints") if resume else None
    first_step, spent, training = 0, 0.0, 0.0
    if state is not None:
        require_same(state["identity"], identity, output)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for one in optimizer.param_groups:  # a run may go on on another device
            one |= settings
        if group.rank < len(state["random"]):
            checkpoint.set_random_state(state["random"][group.rank])
        if group.count != len(state["random"]):
            note(f"{len(state['random'])} processes made the checkpoint, {group.count} go on: dropout will differ.")
        first_step, spent, training = state["step"], state["seconds"], state["train_seconds"]
        if calibration is not None:
            calibration.level = state["level"]
        note(f"Resuming {output} at step {first_step} of {steps}.")
    elif resume:
        note(f"No checkpoint in {output}; starting from the first step.")
    group.wait()  # nobody reads the folder any more
    group.first_does(partial(prepare_folder, output, config, first_step=first_step, steps=steps))

    looks = Delayed(device)  # at what each step came to, once the next is started: the GPU has work meanwhile

    def catch_up() -> None:
        """Look at all steps so far, before what needs to know how they went."""
        nonlocal training
        began = time.monotonic()
        looks.finish()
        training += time.monotonic() - began

    def choose_masks(step: int, sparsity: float) -> MaskCheck:
        """Masks for the schedule's *sparsity*, which a calibrated run follows in stages."""
        try:
            if calibration is not None and calibration.due(sparsity):
                looks.finish()
                calibration(model, sparsity, step=step, device=device, group=group)
            level = sparsity if calibration is None else calibration.level
            check = set_sparsity_(model, level, budget=config.budget, wait=False)
        except ModelError as error:  # scores that are not finite
            looks.finish()  # if the step before went wrong, that comes first
            raise _diverged(step, output) from error
        group.share_masks_(model)
        return check

    def require_finite_scores(check: MaskCheck, step: int) -> None:
        try:
            check.check()
        except ModelError as error:
            raise _diverged(step, output) from error

    def evaluate(*, final: bool) -> dict[str, float]:
        catch_up()
        size = max(config.batch_size, 64)
        return prepared.evaluate(model, batch_size=size, device=device, processes=group, final=final)

    def save_checkpoint(step: int) -> None:
        _require_finite(trainable, step, output)
        content: dict[str, Any] = {"identity": identity, "seconds": spent + time.monotonic() - start}
        content |= {"train_seconds": training, "level": None if calibration is None else calibration.level}
        content |= {"random": group.gather(checkpoint.random_state())}
        if group.first:
            content |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(output / "checkpoints", step=step, content=content)

    arithmetic = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def backward(batch: dict[str, torch.Tensor], share: float, **taught: Any) -> torch.Tensor:
        """Add to the gradients those of a batch on the device, whose loss counts by *share*; that part of the loss."""
        with arithmetic():
            portion = objective(model, batch, **taught) * share
        portion.backward()  # type: ignore[no-untyped-call]
        return portion.detach()

    def update(loss: torch.Tensor) -> torch.Tensor:
        """Make the step that the gradients call for; (2,) the loss and the gradients' norm."""
        norm = torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm or math.inf)
        optimizer.step()
        return torch.stack([loss.float(), norm])

    def step_alone(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """One step on a batch that is not shared out."""
        optimizer.zero_grad()
        return update(backward(batch, 1.0))

    recorded = RecordedSteps(step_alone) if recording else None

    def take_step(chosen: list[int]) -> torch.Tensor:
        """One step on these rows; (2,) the mean loss over them and the gradients' norm."""
        if recorded is not None:
            length = padded_length(int(lengths[chosen].max()), prepared.max_length)
            batch = {name: moved(value, device) for name, value in rows.batch(chosen, length=length).items()}
            return recorded(batch)
        total, loss = rows.weight(chosen), torch.zeros((), device=device)
        share = group.share(chosen)
        parts = [list(share[i :: config.accumulate]) for i in range(min(config.accumulate, len(share)))]
        batches = [{name: moved(value, device) for name, value in rows.batch(part).items()} for part in parts]
        counts = [rows.weight(part) / total for part in parts]
        optimizer.zero_grad()
        with arithmetic():
            lessons = teach_parts(objective, batches, counts, group, device)
        for batch, count, lesson in zip(batches, counts, lessons, strict=True):
            loss += backward(batch, count, **lesson)
        group.sum_gradients_(trainable)
        return update(group.sum_(loss))

    # The loop
    start = time.monotonic()
    pace = checkpoint.Pace(config.checkpoint_every, group)
    model.train()
    lengths = rows.lengths()
    batches = training_rows(lengths, batch_size=config.batch_size, seed=seed, first_step=first_step, steps=steps)
    with (
        stop_signals() as stopped,
        _log(output, group, first_step) as log,
        progress("train", steps, done=first_step) as advance,
    ):

        def look(step: int, check: MaskCheck | None, result: Pending, *, factor: float, sparsity: float) -> None:
            """What the step came to: RunError where it diverged, else progress and the log."""
            if check is not None:
                require_finite_scores(check, step)
            loss, norm = result.get()
            if not math.isfinite(loss + norm):
                raise _diverged(step, output)
            advance(1, f"loss {loss:.3f} sparsity {sparsity:.2f}")
            if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
                log(step=step + 1, loss=loss, lr_factor=factor, sparsity=sparsity)

        for step, chosen in enumerate(batches, first_step):
            began = time.monotonic()
            chosen_at = step - step % config.mask_every
            check = choose_masks(step, schedule(step)) if method is not None and step == chosen_at else None
            sparsity = calibration.level if calibration is not None else schedule(chosen_at)
            factor = _rate(step, steps, _given(config.lr_warmup))
            for one, rate in zip(optimizer.param_groups, base_rates, strict=True):
                _set_rate(one, rate * factor, device=device if recording else None)
            result = Pending(take_step(chosen))
            looks.add(partial(look, step, check, result, factor=factor, sparsity=sparsity))
            training += time.monotonic() - began

            done = step + 1
            if config.eval_every and done % config.eval_every == 0 and done < steps:
                log(step=done, eval=evaluate(final=False))
            stopping = group.any(stopped(), device)
            if stopping or (done < steps and pace.is_due(done)):
                catch_up()  # before the clock of the writing starts: a step that is waited for is no part of that
                with pace.measured():
                    save_checkpoint(done)
                stopping = group.any(stopped(), device)  # the signal may have come just now
            if stopping:
                raise InterruptedRun(f"Stopped at step {done} of {steps}; continue with --resume --output {output}.")

        # The result
        catch_up()
        _require_finite(trainable, steps, output)
        if method is not None:
            require_finite_scores(choose_masks(steps, schedule.final), steps)
        metrics = evaluate(final=True)
        log(step=steps, eval=metrics)
    if method is not None:
        merge_(model)
    report = {
        "metrics": metrics,
        "seconds": round(spent + time.monotonic() - start, 3),
        "train_seconds": round(training, 3),
        "steps": steps,
        "peak_memory_bytes": max((peak for peak in group.gather(memory.peak(device)) if peak), default=None),
        "trainable_parameters": sum(parameter.numel() for parameter in trainable),
        "teacher": config.teacher if teacher is not None else "",
        "processes": group.count,
    }
    if group.first:
        with storage_errors(output):
            save_model(model.cpu(), prepared, output / "model", config=config, shape=shape, report=report)
        remove(output / "checkpoints")
    group.wait()
    return _result(output, report)


def _result(output: Path, report: dict[str, Any]) -> TrainResult:
    names = ("metrics", "seconds", "steps", "peak_memory_bytes", "trainable_parameters")
    return TrainResult(model=output / "model", **{name: report.get(name) for name in names})  # type: ignore[arg-type]


def _given(value: Any) -> Any:
    """A field that ``TrainConfig.filled`` has set."""
    assert value is not None
    return value


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


def _set_rate(one: dict[str, Any], rate: float, *, device: torch.device | None) -> None:
    """The learning rate of an optimizer's group; for recorded steps a tensor on *device*, always the same one."""
    if device is None:
        one["lr"] = rate
    elif isinstance(one["lr"], torch.Tensor) and one["lr"].device.type == device.type:
        one["lr"].fill_(rate)
    else:
        one["lr"] = torch.tensor(rate, device=device)


@contextmanager
def _log(output: Path, group: Processes, first_step: int) -> Iterator[Callable[..., None]]:
    """The first process's log; the others' goes nowhere."""
    if not group.first:
        yield lambda **_: None
        return
    with open_log(output, first_step=first_step) as log:
        yield log
