"""Masks that know the inputs: at every stage of the schedule, what is pruned is made up for by what stays.

A stage begins when the schedule asks for STEP fewer weights than the last one left, and at the final sparsity. Then

    1. H = X'X is summed over some training rows, for the inputs X of each prunable weight, in evaluation mode;
    2. each weight takes up its low-rank update where it stayed: W0 := M (W0 + beta U V), V := 0. The outputs stay as
       they are: what U V holds for entries that are pruned never was part of them;
    3. masks are chosen with |W| Q in place of |W|, at the stage's sparsity, and refined (pst/compensation.py);
    4. W0 becomes the compensated weight under its mask. What is pruned is 0 from there on, so |W| Q keeps this mask
       until updates or learned scores are larger than what stays.

Under a plan (pst/plan.py) the sparsity of a stage is what no weight goes beyond: those that end below it are calibrated
again at their own, as their inputs change with the stage. A stage is due by what the sparsest weights lose.

So W0 is frozen for the gradient alone, and what U V learned in one stage does not count against its rank in the next.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from pst.compensation import compensate, input_scale, refine
from pst.distributed import Processes
from pst.errors import ConfigError, ModelError
from pst.masked_weight import MaskedLowRank, MaskedMagnitude
from pst.materialize import masked_weights, materialized
from pst.sparsify import set_sparsity_
from pst.tasks import Rows

STEP = 0.2
"""Share of the remaining weights that a stage removes, at least."""


Adjustable = MaskedLowRank | MaskedMagnitude
"""What has a Q, and a weight that may be adjusted."""
Calibrated = tuple[Adjustable, Tensor, Tensor]
"""A masked matrix, its original as stored, and H of its inputs."""


@dataclass(kw_only=True)
class Calibration:
    """The stages of one run."""

    rows: Rows
    count: int
    """Training rows that each stage looks at."""
    batch_size: int
    seed: int
    budget: Literal["local", "global"] | None
    final: float
    """The schedule's last sparsity."""
    level: float = -1.0
    """Sparsity of the present stage; below 0 before the first."""

    def due(self, sparsity: float) -> bool:
        """Whether a stage begins where the schedule is at *sparsity*."""
        if self.level < 0:
            return True
        return self.level < sparsity and (sparsity >= self.final or 1 - sparsity <= (1 - STEP) * (1 - self.level))

    @torch.no_grad()
    def __call__(self, model: nn.Module, sparsity: float, *, step: int, device: torch.device, group: Processes) -> None:
        """Begin the stage of *sparsity*.

        Raises ConfigError for a method whose weights cannot be calibrated, ModelError where scores or inputs are not
        finite.
        """
        found = [
            (part, piece, module)
            for module, attached in masked_weights(model)
            for part, piece in attached.matrices(cast(Any, module).parametrizations.weight.original)
            if isinstance(part, Adjustable)
        ]
        if not found:
            raise ConfigError("calibration is for the methods pst and magnitude; leave it out, or set it to 0.")
        self.level = sparsity
        if sparsity == 0:
            return
        random = np.random.default_rng([self.seed, step])
        chosen = random.choice(len(self.rows), size=min(self.count, len(self.rows)), replace=False)
        lengths = self.rows.lengths()
        share = group.share(sorted(chosen.tolist(), key=lambda row: (lengths[row], row)))
        batches = [list(share[i : i + self.batch_size]) for i in range(0, len(share), self.batch_size)]
        moments = input_moments(model, (self.rows.batch(rows) for rows in batches), device=device, group=group)
        parts = [(part, piece, moments[module]) for part, piece, module in found]
        for part, piece, _ in parts:
            self.fold_(part, piece)
        self.scale_(model, parts)
        set_sparsity_(model, sparsity, budget=self.budget)
        for part, piece, H in parts:
            try:
                part.by_row(piece).copy_(self.compensated(part, piece, H))
            except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                raise ModelError(
                    f"The inputs of a prunable weight cannot be used ({error}): training diverged, or the model came "
                    "so. Use a lower learning rate, another model, or --set calibration=0."
                ) from error
            group.share_(piece)
        group.share_masks_(model)

    def fold_(self, part: Adjustable, piece: Tensor) -> None:
        """Take up the update of *piece*, as stored, where the mask has let it take part."""
        part.fold_(piece)
        part.by_row(piece).mul_(part.mask)

    def scale_(self, model: nn.Module, parts: list[Calibrated]) -> None:
        """Set Q of every matrix for the choice of the masks."""
        for part, _, H in parts:
            part.Q.copy_(input_scale(H))

    def compensated(self, part: Adjustable, piece: Tensor, H: Tensor) -> Tensor:
        """W' (n, k) in place of *piece*, as stored, once the mask of *part* is chosen, which is refined first."""
        refine_(part, piece, H)
        return compensate(part.by_row(piece), H, part.mask)


@torch.no_grad()
def refine_(part: Adjustable, piece: Tensor, H: Tensor) -> None:
    """Refine the mask of *part*, whose weight is *piece* as stored, once it is chosen; as many entries stay.

    The scores are those of *part*, with what refinement makes of the weight in place of the weight itself. Raises
    ValueError and torch.linalg.LinAlgError as refine does.
    """
    W, zeros = part.by_row(piece), int((~part.mask).sum())
    if zeros:
        assert part.pattern is not None
        pattern, others = part.pattern, part.scores(piece) - W.abs() * part.Q
        wanted = min((zeros + 0.5) / W.numel(), pattern.sparsity or 1.0)  # the half keeps the count exact
        part.mask.copy_(refine(W, H, part.mask, lambda S: pattern.mask(S + others, wanted, axis=1)))


@torch.no_grad()
def input_moments(model: nn.Module, batches: Any, *, device: torch.device, group: Processes) -> dict[nn.Module, Tensor]:
    """H = X'X (k, k), float32, of each sparsified module's inputs, over the real tokens of all processes' *batches*."""
    moments: dict[nn.Module, Tensor] = {}
    mask = torch.empty(0)

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        x = x[mask] if x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])  # (tokens, k)
        moments[module].addmm_(x.T, x)

    hooks = []
    for module, attached in masked_weights(model):
        weight = cast(Any, module).parametrizations.weight.original
        k = weight.shape[attached.axis]
        moments[module] = torch.zeros(k, k, dtype=torch.float32, device=device)
        hooks.append(module.register_forward_pre_hook(add))
    training = model.training
    model.eval()
    try:
        with materialized(model):
            for batch in batches:
                inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
                mask = inputs["attention_mask"].bool()
                model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    for H in moments.values():
        group.sum_(H)
    return moments
