"""What is important, and what trains: one file a method, found by its name.

Each file defines ``make(config) -> Method | None``, where None means that nothing is pruned, and ``DEFAULTS`` for the
options that a user leaves open, or, where these depend on the start and on what shall go, a function ``defaults``
beside it; ``KEEPS_ZEROS = True`` says that pattern and sparsity are the model's own. The masked
weight that a method attaches may say more: ``fixed``, a mask that is never chosen again, and ``budget``, whether its
scores compete in each weight or over all (pst/masked_weight.py). Adding a method is adding a file here.
"""

import importlib
import importlib.util
import pkgutil
from typing import TYPE_CHECKING, Any, Protocol

from pst.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pst.masked_weight import MaskedWeight


class Method(Protocol):
    """How a weight is scored and which of the model's tensors train."""

    @property
    def trains_original(self) -> bool:
        """Whether the dense weights under the masks train."""

    def masked_weight(
        self, weight: "Tensor", *, axis: int, generator: "torch.Generator | None" = None
    ) -> "MaskedWeight":
        """What to attach to one stored *weight* whose reduction axis is *axis*."""

    def select_trainable_(self, model: "nn.Module") -> None:
        """Set requires_grad of every parameter of the plain *model*; the masked weights are made, not attached yet."""

    def param_groups(self, model: "nn.Module") -> list[dict[str, Any]]:
        """The optimizer's groups of the sparsified *model*: params and lr, each trainable parameter once."""


def names() -> list[str]:
    """The methods that exist, by their files."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def shape_of(name: str, model: "nn.Module", config: Any) -> dict[str, Any]:
    """Changes of *config* for a method whose pattern and sparsity are those of *model*: none for any other."""
    module = importlib.import_module(f"{__name__}.{name}")
    found: dict[str, Any] = {}
    if getattr(module, "KEEPS_ZEROS", False):
        found = module.settled(model, pattern=config.pattern, source=config.model)
    return found


def make(name: str, config: Any) -> "Method | None":
    """The method *name* with the options of *config*. Raises ConfigError for a name without a file."""
    if name not in names():
        raise ConfigError(f"Unknown method {name!r}; use one of {', '.join(names())}.")
    made: Method | None = importlib.import_module(f"{__name__}.{name}").make(config)
    return made
