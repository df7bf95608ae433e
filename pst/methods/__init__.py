"""What is important, and what trains: one file a method, found by its name.

Each file defines ``make(config) -> Method | None``; None means that nothing is pruned. Adding a method is adding a
file here.
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
        """Set requires_grad of every parameter of the plain *model*."""

    def param_groups(self, model: "nn.Module") -> list[dict[str, Any]]:
        """The optimizer's groups of the sparsified *model*: params and lr, each trainable parameter once."""


def names() -> list[str]:
    """The methods that exist, by their files."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))


def make(name: str, config: Any) -> "Method | None":
    """The method *name* with the options of *config*. Raises ConfigError for a name without a file."""
    if name not in names():
        raise ConfigError(f"Unknown method {name!r}; use one of {', '.join(names())}.")
    made: Method | None = importlib.import_module(f"{__name__}.{name}").make(config)
    return made
