"""Learn which weights of a transformer to keep (PST, arXiv 2205.11005).

The public verbs are imported on first use, so that ``import pst`` costs nothing and needs no torch:

    sparsify_(model, ...)        attach masks to every prunable weight
    set_sparsity_(model, s)      choose the mask of each weight from its present scores
    merge_(model)                fold everything into plain weights with zeros in place
    load_structured(folder)      open a model from which heads and neurons were removed
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pst.sparsify import merge_, set_sparsity_, sparsify_
    from pst.structured.storage import load_structured

__all__ = ["__version__", "load_structured", "merge_", "set_sparsity_", "sparsify_"]


def __getattr__(name: str) -> Any:
    if name in {"merge_", "set_sparsity_", "sparsify_"}:
        import pst.sparsify

        return getattr(pst.sparsify, name)
    if name == "load_structured":
        import pst.structured.storage

        return pst.structured.storage.load_structured
    raise AttributeError(f"module 'pst' has no attribute {name!r}")
