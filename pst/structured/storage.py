"""A folder from which units were removed is a Hugging Face folder, whose config.json says so in its field "structured".

Where all layers are alike and the architecture has fields for what is left (the neurons of most; of Llama, heads too),
transformers' Auto classes open it. Elsewhere they refuse it, because the weights have other shapes than the
configuration gives, and ``load_structured`` opens it.
"""

from pathlib import Path
from typing import Any

from torch import nn

from pst.errors import ModelError
from pst.files import resolve_model
from pst.structured.remove import shape_model_
from pst.structured.report import removal_of


def load_structured(source: Path | str, auto_class: str = "AutoModelForSequenceClassification") -> Any:
    """The model of a run or model folder, in evaluation mode, as transformers' *auto_class* would open it.

    Folders without removed units open as well. Raises ModelError where the folder, its config.json or its weights are
    not usable.
    """
    folder = resolve_model(Path(source))
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json; give a run folder of pst train, or a Hugging Face model folder."
        )
    try:
        return from_pretrained(auto_class, folder, dtype="float32").eval()
    except ModelError:
        raise
    except Exception as error:  # OSError, SafetensorError, RuntimeError, ValueError: whatever is wrong with the files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{folder} cannot be opened by {auto_class}: {lines[0]} Get the folder again.") from error


def from_pretrained(name: str, source: Path | str, **options: Any) -> Any:
    """``transformers.NAME.from_pretrained(source, **options)``, with removed units too; raises what that does."""
    import transformers

    auto_class = getattr(transformers, name)
    report = removal_of(source)
    if report is None:
        return auto_class.from_pretrained(source, **options)
    config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(source)
    plain = auto_class
    if hasattr(auto_class, "_model_mapping"):
        if type(config) not in auto_class._model_mapping:
            return auto_class.from_pretrained(source, config=config, **options)  # which says that it has no such model
        plain = auto_class._model_mapping[type(config)]

    def make(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, *args, **kwargs)
        shape_model_(self, report, where=str(source))

    smaller: Any = type(plain.__name__, (plain,), {"__init__": make, "__module__": plain.__module__})
    loaded = smaller.from_pretrained(source, config=config, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.__class__ = plain
    return loaded
