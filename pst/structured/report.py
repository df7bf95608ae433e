"""The field "structured" of a model's config.json: what is left of each layer, in plain JSON. Needs no torch.

schema_version    1
target            macs or parameters, what the sparsity was a fraction of
layers            of each layer: heads, the numbers that the kept ones had in the dense model (of keys and values,
                  where heads share them), and neurons, how many
dense             heads and neurons that each layer had
macs, parameters  of all layers together: dense and kept (pst/structured/units.py says what counts)
length            tokens of a row, on which the multiply-adds of attention depend
"""

import json
from pathlib import Path
from typing import Any

from pst.errors import ModelError

SCHEMA_VERSION = 1
FIELD = "structured"


def removed_share(report: dict[str, Any]) -> float:
    """How much of its target is gone, from 0 to 1, of a config.structured."""
    counted = report[report["target"]]
    return 1 - float(counted["kept"] / counted["dense"])


def removal_of(source: Path | str) -> dict[str, Any] | None:
    """The field "structured" of a folder's config.json, None where it has none. Raises ModelError if damaged."""
    try:
        found = json.loads((Path(source) / "config.json").read_text(encoding="utf-8")).get(FIELD)
    except (OSError, ValueError, AttributeError):
        return None  # whoever reads it for real says what is wrong
    if found is None:
        return None
    where = f"The field {FIELD!r} of {Path(source) / 'config.json'}"
    try:
        version = int(found["schema_version"])
        for layer in found["layers"]:
            [int(head) for head in layer["heads"]], int(layer["neurons"])
        int(found["dense"]["heads"]), int(found["dense"]["neurons"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{where} does not say what is left of each layer ({error!r}); get the folder again."
        ) from error
    if version > SCHEMA_VERSION:
        raise ModelError(f"{where} has schema version {version}, this program reads {SCHEMA_VERSION}; update it.")
    return dict(found)
