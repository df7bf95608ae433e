"""Sparse training for people who keep their own transformers.Trainer.

pst = PSTCallback(model, pattern="2:4")
trainer = Trainer(model, args, train_dataset=rows, callbacks=[pst], optimizers=(pst.optimizer, None))
trainer.train()                  # afterwards the model is plain again, zeros in place
pst.save("sparse", tokenizer)    # or trainer.save_model, which leaves out sparsity.json

The optimizer has to be the callback's, because scores, updates and the rest have learning rates of their own, which the
Trainer's scheduler scales; ``learning_rate`` of the TrainingArguments is not used. The Trainer's checkpoints hold masks
and low-rank tensors, and ``resume_from_checkpoint`` goes on with them. The calibration of ``pst train`` is
not part of it.

Masks are chosen without waiting for a GPU, but for a global budget and pattern structured. The Trainer itself waits at
every step by default, to copy a batch and to look at its loss: ``accelerator_config={"non_blocking": True}`` and
``logging_nan_inf_filter=False`` leave that out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from pst.distributed import Processes
from pst.errors import ConfigError, ModelError
from pst.files import atomic_folder, write_json
from pst.methods import Method
from pst.methods.pst import PST
from pst.patterns import parse_pattern
from pst.result import sparsity_of, versions
from pst.schedule import CubicSchedule
from pst.sparsify import MaskCheck, merge_, set_sparsity_, sparsify_
from pst.structured.choose import require_reachable


class PSTCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches masks to a model at once, tightens them at every optimizer step, and folds them away at the end."""

    optimizer: torch.optim.Optimizer
    """AdamW over what the method trains; give it to the Trainer: ``optimizers=(pst.optimizer, None)``."""

    def __init__(
        self,
        model: nn.Module,
        *,
        pattern: str = "unstructured",
        sparsity: float | None = None,
        method: Method | None = None,
        sparsity_initial: float = 0.0,
        sparsity_warmup: float = 0.1,
        sparsity_cooldown: float = 0.3,
        mask_every: int = 1,
        weight_decay: float = 0.0,
    ) -> None:
        """For a plain *model*, which is changed in place.

        pattern, sparsity: as of ``pst train``; N:M fixes its sparsity. method: an object of pst/methods, PST() when
        None. sparsity_*: the cubic schedule, fractions of the Trainer's steps. mask_every: steps between two choices
        of the masks. Raises ConfigError, PatternError or ModelError for what cannot be.
        """
        fixed = parse_pattern(pattern).sparsity
        if fixed is None and sparsity is None:
            raise ConfigError(f"Pattern {pattern} needs a sparsity, for example sparsity=0.9.")
        if fixed is not None and sparsity not in (None, fixed):
            raise ConfigError(f"Pattern {pattern} has sparsity {fixed:g}, not {sparsity:g}; leave sparsity out.")
        if mask_every < 1:
            raise ConfigError(f"mask_every is {mask_every}; it must be at least 1.")
        self.model, self.pattern, self.mask_every = model, pattern, mask_every
        self.sparsity = float(sparsity if fixed is None else fixed)  # type: ignore[arg-type]
        self.method = method or PST()
        self._shape = {"initial": min(sparsity_initial, self.sparsity), "final": self.sparsity}
        self._shape |= {"warmup": sparsity_warmup, "cooldown": sparsity_cooldown}
        CubicSchedule(**self._shape, steps=1)  # raises for what no run could use
        require_reachable(model, parse_pattern(pattern), self.sparsity)
        sparsify_(model, method=self.method, pattern=pattern)
        self.optimizer = torch.optim.AdamW(self.method.param_groups(model), weight_decay=weight_decay)
        self._merged = False
        self._pending: tuple[int, MaskCheck] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Raise ConfigError where the Trainer would train something else, or keep something else."""
        optimizer = given.get("optimizer")
        if getattr(optimizer, "optimizer", optimizer) is not self.optimizer:
            raise ConfigError(
                "The Trainer has an optimizer of its own, with one learning rate for scores and weights; "
                "give it optimizers=(pst.optimizer, None)."
            )
        if args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end would bring back a step at which the model was less sparse; leave it out, "
                "and compare finished runs."
            )
        if self._merged:
            raise ConfigError("This callback's masks are merged; make a new PSTCallback to train again.")
        self._pending = None  # of a run that was broken off

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Choose the masks for the optimizer step that begins; state.global_step steps are done.

        Raises ModelError where it is known already that scores are not finite: on a GPU this does not wait for it.
        """
        if state.global_step % self.mask_every == 0:
            self._choose(state.global_step, CubicSchedule(**self._shape, steps=state.max_steps)(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Raise ModelError where the step's scores were not finite, before the Trainer evaluates or saves.

        A GPU has the whole step to work on meanwhile: this waits for no more than the masks at its beginning.
        """
        self._check()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """As on_step_end, for a step that was broken off while it accumulated gradients."""
        self._check()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Choose the last masks and merge them: the model is plain again. A run that was stopped is merged as it is.

        Raises ModelError, before merging, where the last scores are not finite.
        """
        finished = state.global_step >= state.max_steps
        if finished:
            self._choose(state.global_step, self.sparsity)
            self._check()
        merge_(self.model)
        self._merged = finished

    def save(self, folder: Path | str, tokenizer: Any = None) -> None:
        """Write the merged model, sparsity.json and, if given, the *tokenizer* to *folder*, as ``pst export`` takes it.

        Raises ConfigError before the end of training, RunError or StorageError where *folder* cannot be made.
        """
        if not self._merged:
            raise ConfigError("Training has not come to its end, so the masks are not final; call save after it.")
        report = sparsity_of(
            self.model, method=type(self.method).__name__.lower(), pattern=self.pattern, requested=self.sparsity
        )
        with atomic_folder(Path(folder), overwrite=False) as partial:
            self.model.save_pretrained(partial)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            write_json(partial / "sparsity.json", report | {"versions": versions()})

    def _choose(self, step: int, sparsity: float) -> None:
        """Choose the masks, and keep for ``_check`` what a GPU has yet to say about their scores."""
        with _naming(step):
            self._pending = (step, set_sparsity_(self.model, sparsity, wait=False))
        if dist.is_initialized():
            Processes(rank=dist.get_rank(), count=dist.get_world_size()).share_masks_(self.model)

    def _check(self) -> None:
        """Raise ModelError where the masks that were chosen last mean nothing."""
        if self._pending is not None:
            step, check = self._pending
            self._pending = None
            with _naming(step):
                check.check()


@contextmanager
def _naming(step: int) -> Iterator[None]:
    """Within: a ModelError says at which *step* it was, as many as were done before."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"Step {step}: {error}") from error
