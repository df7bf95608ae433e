"""A run that looks at steps once the next are started, as on a GPU, says and leaves what a run does that need not."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import pst.train
from pst import checkpoint, kernels
from pst.batches import training_rows
from pst.errors import RunError
from pst.masked_weight import MaskedWeight
from pst.pending import Delayed
from pst.sparsify import sparsify_
from pst.train import InterruptedRun, train
from tests.conftest import write_reviews
from tests.pst.training import checkpoint_steps, log_lines, options, weights

RAMP = {"sparsity_initial": 0.0, "sparsity_warmup": 0.1, "sparsity_cooldown": 0.3}
"""Counts that change at most of the steps."""


@contextmanager
def behind() -> Iterator[None]:
    """Within: steps are looked at one step later, also on the processor."""

    class Behind(Delayed):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.behind = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pst.train, "Delayed", Behind)
        yield


def before_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], None]) -> None:
    """Let runs call *action* with each step that is about to begin, and with the number of steps after the last."""

    def told(*args: Any, first_step: int, **named: Any) -> Iterator[list[int]]:
        step = first_step
        for step, rows in enumerate(training_rows(*args, first_step=first_step, **named), first_step):
            action(step)
            yield rows
        action(step + 1)

    monkeypatch.setattr(pst.train, "training_rows", told)


@pytest.mark.parametrize(
    "changes", [{"method": "dense"}, {}, {"pattern": "2:4", "mask_every": 3, "calibration": 0}, {"accumulate": 2}],
    ids=["dense", "pst", "2:4", "accumulate"],
)  # fmt: skip
def test_log_checkpoints_and_weights_are_the_same(
    changes: dict[str, Any], tiny_bert: Path, reviews_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = options(tiny_bert, reviews_file, **changes, steps=22, eval_every=5, checkpoint_every=4)
    saved: list[list[tuple[int, list[dict[str, Any]]]]] = []
    real = checkpoint.save

    def save(folder: Path, *, step: int, content: Any) -> Path:
        saved[-1].append((step, log_lines(folder.parent)))
        return real(folder, step=step, content=content)

    monkeypatch.setattr(checkpoint, "save", save)
    saved.append([])
    train(config, tmp_path / "at once")
    saved.append([])
    with behind():
        train(config, tmp_path / "later")
    assert [step for step, _ in saved[0]] == [4, 8, 12, 16, 20]
    assert saved[1] == saved[0]  # what is logged by the time of a checkpoint is what would be lost with it
    assert log_lines(tmp_path / "later") == log_lines(tmp_path / "at once")
    assert [line["step"] for line in log_lines(tmp_path / "later")] == [5, 10, 10, 15, 20, 20, 22, 22]
    assert weights(tmp_path / "later") == weights(tmp_path / "at once")


def test_the_time_of_a_checkpoint_is_not_that_of_the_step_before(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What writing takes decides when the next is due; a step that is waited for would make it look slow."""
    known: list[list[int]] = []

    class Watched(checkpoint.Pace):
        @contextmanager
        def measured(self) -> Iterator[None]:
            known.append([line["step"] for line in log_lines(tmp_path / "out")])
            with super().measured():
                yield

    monkeypatch.setattr(checkpoint, "Pace", Watched)
    with behind():
        train(options(tiny_bert, reviews_file, steps=12, checkpoint_every=10), tmp_path / "out")
    assert known == [[10]]


def _stop(at: int, step: int) -> None:
    if step == at - 1:
        signal.raise_signal(signal.SIGINT)


def test_a_run_that_is_stopped_has_looked_at_its_last_step(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, output = options(tiny_bert, reviews_file), tmp_path / "stopped"
    train(config, tmp_path / "whole")
    with behind():
        for at in (10, 12):
            with monkeypatch.context() as patch:
                before_step(patch, partial(_stop, at))
                with pytest.raises(InterruptedRun, match=f"Stopped at step {at} "):
                    train(config, output, resume=at > 10)
            assert log_lines(output)[-1]["step"] == checkpoint_steps(output)[-1] == at
        train(config, output, resume=True)
    assert log_lines(output) == log_lines(tmp_path / "whole")
    assert weights(output) == weights(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{"method": "dense"}, {}, {"pattern": "2:4"}, {"budget": "global"}], ids=str)
@pytest.mark.parametrize("every", [0, 1])
def test_divergence_is_told_of_the_same_step(
    changes: dict[str, Any], every: int, tiny_bert: Path, reviews_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pst.train, "_rate", lambda step, steps, warmup: 1.0 if step < 7 else 1e38)
    config = options(tiny_bert, reviews_file, **changes, checkpoint_every=every)
    with pytest.raises(RunError, match="diverged") as at_once:
        train(config, tmp_path / "out")
    kept = checkpoint_steps(tmp_path / "out")
    with behind(), pytest.raises(RunError, match="diverged") as later:
        train(config, tmp_path / "out", overwrite=True)
    assert str(later.value) == str(at_once.value)
    assert checkpoint_steps(tmp_path / "out") == kept
    assert len(kept) == 2 * every
    assert not (tmp_path / "out" / "model").exists()


def test_divergence_at_the_last_step_gives_no_result(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pst.train, "_rate", lambda step, steps, warmup: 1.0 if step < 11 else math.inf)
    with behind(), pytest.raises(RunError, match="at step 12"):
        train(options(tiny_bert, reviews_file, method="dense"), tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("at", [2, 4])
def test_scores_alone_that_are_not_finite_end_the_run(
    at: int, every: int, tiny_bert: Path, reviews_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Loss and gradients stay finite, since the weights are; the masks of step *at* (the last ones: 4) mean nothing."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    models = []

    def kept(model: Any, **named: Any) -> Any:
        models.append(model)
        return sparsify_(model, **named)

    def poison(step: int) -> None:
        if step == at:
            part = next(part for part in models[-1].modules() if isinstance(part, MaskedWeight))
            part.get_buffer("Q")[0] = math.nan  # no parameter, so that the weights' own check does not see it

    monkeypatch.setattr(pst.train, "sparsify_", kept)
    before_step(monkeypatch, poison)
    given: dict[str, Any] = {"steps": 4, "batch_size": 2, "calibration": 0, "checkpoint_every": every}
    given |= {"device": "cuda" if torch.cuda.is_available() else "cpu"}  # where there is a GPU, nothing is interpreted
    config = options(tiny_bert, reviews_file, **(RAMP | given))
    with kernels.forced(True), behind(), pytest.raises(RunError, match=f"at step {at}\\."):
        train(config, tmp_path / "out")
    assert checkpoint_steps(tmp_path / "out") == ([at - 1, at][-2:] if at < 4 else [2, 3]) * every
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
@pytest.mark.parametrize(
    "changes",
    [{}, {"pattern": "2:4"}, {"pattern": "block:4x4"}, {"method": "magnitude"}, {"method": "dense"}],
    ids=str,
)
def test_the_processor_never_waits_for_the_gpu(
    changes: dict[str, Any], tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are started to their end while the GPU sleeps before their beginning."""
    gpu: Any = torch.cuda
    slept: list[Any] = []
    first, last = 10, 15  # before, steps are recorded and memory is taken; these include one that is logged

    def watch(step: int) -> None:
        if first < step <= last:
            assert not slept[-1].query(), f"step {step - 1} waited"
        if first - 3 <= step < last:  # memory for steps that are under way together, too
            slept.append(gpu.Event())
            gpu._sleep(1_000_000_000)
            slept[-1].record()
        gpu.set_sync_debug_mode("error" if first <= step < last else "default")

    held_out = write_reviews(tmp_path / "held_out.jsonl", rows=16, seed=4)
    sparsity = {} if changes.get("method") == "dense" or changes.get("pattern") == "2:4" else {"sparsity": 0.5}
    given = {"steps": 24, "validation": str(held_out), "device": "cuda", "checkpoint_every": 0, "calibration": 0}
    config = options(tiny_bert, reviews_file, **(RAMP | given | sparsity | changes))
    train(config, tmp_path / "before")  # kernels are compiled and loaded on their first use, which may wait
    before_step(monkeypatch, watch)
    try:
        train(config, tmp_path / "out")
    finally:
        gpu.set_sync_debug_mode("default")
    assert len(slept) == last - first + 3
    logged = [line["step"] for line in log_lines(tmp_path / "out")]
    assert logged == [10, 20, 24, 24]
