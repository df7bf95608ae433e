"""Which weights of an architecture are prunable: one file a model_type, found by its name.

Each file defines ARCHITECTURE. A model_type without a file falls back to generic.py's rule. Importing this package
needs no torch, so that files can be inspected where torch is not installed.
"""

import importlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a transformer block has its heads and its neurons; names below the block, for pst/structured."""

    block: re.Pattern[str]
    """Matches (search) the full name of each block."""
    attention: str
    """The module that counts its heads and states their width."""
    attention_inputs: tuple[str, ...]
    """The linears whose outputs hold the heads, one after another: queries first."""
    attention_output: str
    """The linear whose inputs do."""
    feed_forward_inputs: tuple[str, ...]
    """The linears whose outputs are the neurons, multiplied with each other where there are several."""
    feed_forward_output: str
    fused: int = 1
    """Matrices side by side in each of attention_inputs."""
    crossed: str = ""
    """Ending of the name of a block's second attention, which no unit covers; such a block is refused."""
    neurons_field: str = "intermediate_size"
    """The field of config.json that says how many neurons each layer has."""
    heads_fields: tuple[str, str] | None = None
    """The fields for heads of queries, and of keys and values, where the width of a head is a field by itself."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How to find the prunable weights of a model by the names of its modules."""

    prunable: re.Pattern[str]
    """Matches (search) the full name of each module whose weight is prunable."""
    axis: int = 1
    """Reduction axis of those weights as stored: 1 for nn.Linear (n x k), 0 for GPT-2's Conv1D (k x n)."""
    fused: Mapping[str, int] = field(default_factory=dict)
    """Name endings of modules that hold several matrices side by side along the output axis, and how many."""
    layout: Layout | None = None
    """Where heads and neurons are; None where nobody has said so, and pattern structured is refused."""

    def parts(self, module_name: str) -> int:
        """How many matrices the module's weight holds, each of which gets a mask of its own."""
        return next((count for ending, count in self.fused.items() if module_name.endswith(ending)), 1)


def architecture(model_type: str) -> Architecture:
    """The rules for *model_type*, as named in a model's config.json."""
    name = model_type.replace("-", "_")
    known = name.isidentifier() and importlib.util.find_spec(f"{__name__}.{name}") is not None
    found: Architecture = importlib.import_module(f"{__name__}.{name if known else 'generic'}").ARCHITECTURE
    return found
