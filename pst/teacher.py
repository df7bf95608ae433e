"""The dense model that another learns from."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from pst.batches import Encoded
from pst.config import START, TrainConfig
from pst.distributed import Processes
from pst.errors import ModelError
from pst.loading import fingerprint_of, first_line, load_config, load_tokenizer
from pst.objective import Objective, squares
from pst.pending import moved
from pst.progress import note
from pst.quiet import quiet_transformers
from pst.structured.storage import from_pretrained
from pst.tasks import Prepared

SAMPLE = 256
"""Training rows by which a start is judged."""


def find_teacher(config: TrainConfig, prepared: Prepared) -> tuple[nn.Module | None, dict[str, str]]:
    """The teacher of *config*, if it has one, before any mask is on the model; and what tells it from another.

    Raises ModelError as load_teacher does.
    """
    if not config.teacher:
        return None, {}
    if config.teacher == START:
        return frozen(copy.deepcopy(prepared.model)), {}
    teacher = load_teacher(config.teacher, prepared.model, prepared.tokenizer)
    return teacher, {"teacher's weights": fingerprint_of(teacher, config.teacher)}


def settle(
    teacher: nn.Module | None, config: TrainConfig, prepared: Prepared, device: torch.device, group: Processes
) -> nn.Module | None:
    """The *teacher* ready on *device*, or None, with a note, where it is the start and does not know the task."""
    if teacher is None:
        return None
    on_device(teacher, device, config.precision)
    if config.teacher != START:
        return teacher
    if group.first_does(partial(knows_task, teacher, prepared, batch_size=config.batch_size, device=device)):
        note(f"{config.model} teaches what becomes of it; --teacher off does without, and is faster.")
        return teacher
    note(
        f"{config.model} does not know the task better than by its label shares, so it is no teacher, and dropout "
        "is the model's own."
    )
    return None


def frozen(model: nn.Module) -> nn.Module:
    """*model* as a teacher is: it neither trains nor drops."""
    return model.eval().requires_grad_(False)


def on_device(teacher: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """The *teacher* on *device*; in bfloat16 on a GPU, unless *precision* is fp32: half of the memory, and faster."""
    fast = device.type == "cuda" and precision != "fp32"
    return teacher.to(device, torch.bfloat16 if fast else torch.float32)


def knows_task(teacher: nn.Module, prepared: Prepared, *, batch_size: int, device: torch.device) -> bool:
    """Whether the *teacher*, on *device*, answers training rows better than their label shares (or mean) alone would.

    Judged by the loss over SAMPLE rows, evenly spaced. Of language models it is taken for granted.
    """
    rows = prepared.train
    if not isinstance(rows, Encoded):
        return True
    chosen = np.unique(np.linspace(0, len(rows) - 1, num=min(SAMPLE, len(rows))).astype(int)).tolist()
    loss = 0.0
    with torch.no_grad():
        for first in range(0, len(chosen), batch_size):
            part = chosen[first : first + batch_size]
            batch = {name: moved(value, device) for name, value in rows.batch(part).items()}
            loss += float(teacher(**batch).loss) * len(part) / len(chosen)
    labels = rows.labels[torch.as_tensor(chosen)]
    if prepared.task == "regression":
        return loss < float(labels.var(correction=0))
    shares = torch.bincount(labels).double() / len(labels)
    return loss < float(torch.special.entr(shares).sum())


def teach_parts(
    objective: Objective,
    batches: Sequence[dict[str, Tensor]],
    shares: Sequence[float],
    group: Processes,
    device: torch.device,
) -> list[dict[str, Any]]:
    """What *objective* is called with beside each of *batches*, this process's parts of a step, besides the model.

    Hidden states count as a share of the teacher's over all rows of the step, so the teacher answers all parts first;
    *shares* are those of the parts' losses. Nothing where there is one part, or no such loss.
    """
    if objective.teacher is None or not objective.hidden or (group.count == 1 and len(batches) == 1):
        return [{} for _ in batches]
    lessons = [objective.teach(batch) for batch in batches]
    found = [squares(lesson, batch["attention_mask"]) for lesson, batch in zip(lessons, batches, strict=True)]
    layers = int(cast(Any, objective.teacher).config.num_hidden_layers)  # of a process that has no rows
    whole = group.sum_(torch.stack(found).sum(0) if found else torch.zeros(layers, device=device))
    return [{"lesson": lesson, "whole": whole * share} for lesson, share in zip(lessons, shares, strict=True)]


@quiet_transformers()
def load_teacher(source: str, model: nn.Module, tokenizer: Any) -> nn.Module:
    """The model of *source*, frozen and in evaluation mode, with the same kind of head and outputs as *model*.

    Raises ModelError where it cannot be read, its tokens or its outputs are others, or it was never fine-tuned.
    """
    config = load_config(source)
    model_config: Any = model.config
    kind = next(name for name in ("SequenceClassification", "CausalLM") if _is(model, name))
    named = getattr(config, "architectures", None) or []
    if not any(_names(architecture, kind) for architecture in named):
        raise ModelError(
            f"The teacher {source} has no head for this task ({', '.join(named) or 'no architecture named'}); "
            "give a model that was fine-tuned on it, for example the result of pst train --method dense."
        )
    if kind == "SequenceClassification" and config.num_labels != model_config.num_labels:
        raise ModelError(
            f"The teacher {source} has {config.num_labels} outputs, the model {model_config.num_labels}; "
            "give a teacher of the same task."
        )
    if load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"The teacher {source} has another vocabulary than the model; give one with the same tokenizer."
        )
    try:
        teacher: nn.Module = from_pretrained(f"AutoModelFor{kind}", source, dtype="float32")
    except Exception as error:
        raise ModelError(
            f"The weights of the teacher {source} cannot be read: {first_line(error)} Choose another --teacher."
        ) from error
    return frozen(teacher)


def _is(model: nn.Module, kind: str) -> bool:
    return _names(type(model).__name__, kind)


def _names(architecture: str, kind: str) -> bool:
    return architecture.endswith(f"For{kind}") or (kind == "CausalLM" and architecture.endswith("LMHeadModel"))
