"""The dense model that another learns from."""

from typing import Any

from torch import nn

from pst.errors import ModelError
from pst.loading import first_line, load_config, load_tokenizer
from pst.quiet import quiet_transformers
from pst.structured.storage import from_pretrained


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
    return teacher.eval().requires_grad_(False)


def _is(model: nn.Module, kind: str) -> bool:
    return _names(type(model).__name__, kind)


def _names(architecture: str, kind: str) -> bool:
    return architecture.endswith(f"For{kind}") or (kind == "CausalLM" and architecture.endswith("LMHeadModel"))
