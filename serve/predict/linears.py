"""The prunable linears of a model, by shape: from an artifact, a Hugging Face folder, or a config.json alone."""

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export import manifest
from export.manifest import FILE_NAME
from pst.errors import ModelError
from pst.files import read_json, resolve_model
from pst.models import Layout, architecture

HEADS_FIELDS = ("num_attention_heads", "n_head", "n_heads")
MULTIPLE = 8
"""Neurons that are left in a layer are a multiple of this, as pst train leaves them."""
_REMEDY = "give an artifact folder or a Hugging Face model folder, or copy it again."


@dataclass(frozen=True, kw_only=True)
class Linear:
    """All layers of a model that compute the same product: outputs x inputs."""

    names: tuple[str, ...]
    """Their kinds: module names with * for numbers."""
    outputs: int
    inputs: int
    count: int
    """How many there are in the model."""
    left_outputs: int
    """Of outputs, what a structured pattern would leave; all of them for the others."""
    left_inputs: int

    @property
    def shape(self) -> str:
        """3072 x 768: outputs x inputs, as PyTorch stores a Linear."""
        return f"{self.outputs} x {self.inputs}"


def read_linears(path: Path, *, structured: float | None = None) -> list[Linear]:
    """The prunable linears of the model at *path*, those of one shape together, the largest part of the model first.

    *structured*: the fraction of heads and neurons that would be removed, None for none.
    Raises ModelError where there is no model, or one whose heads and neurons nobody has described.
    """
    folder = resolve_model(path)
    config: dict[str, Any] = read_json(folder / "config.json", ModelError, _REMEDY)
    rules = architecture(str(config.get("model_type", "")))
    if structured is not None and rules.layout is None:
        raise ModelError(
            f"{path} is a {config.get('model_type')}, whose heads and neurons are not described, so that pattern "
            "structured does not fit; use another pattern."
        )
    found: dict[tuple[int, int, int, int], Linear] = {}
    for name, (outputs, inputs) in _matrices(folder, axis=rules.axis).items():
        module = name.removesuffix(".weight")
        if not rules.prunable.search(module):
            continue
        left = outputs, inputs
        if structured is not None and rules.layout is not None:
            left = _left(module, outputs, inputs, rules.layout, config, structured)
        kind, key = re.sub(r"\d+", "*", module), (outputs, inputs, *left)
        one = Linear(names=(kind,), outputs=outputs, inputs=inputs, count=1, left_outputs=left[0], left_inputs=left[1])
        before = found.get(key)
        if before is not None:
            one = replace(before, count=before.count + 1, names=tuple(dict.fromkeys((*before.names, kind))))
        found[key] = one
    if not found:
        raise ModelError(f"{path} has no linear that could be pruned; {_REMEDY}")
    return sorted(found.values(), key=lambda each: -each.outputs * each.inputs * each.count)


def _left(
    module: str, outputs: int, inputs: int, layout: Layout, config: Mapping[str, Any], sparsity: float
) -> tuple[int, int]:
    """The outputs and inputs that are left of a linear where like fractions of all heads and neurons are removed."""
    heads = next((int(config[name]) for name in HEADS_FIELDS if config.get(name)), 1)
    of_heads = max(1, round(heads * (1 - sparsity))) / heads

    def neurons(count: int) -> int:
        return max(MULTIPLE, MULTIPLE * round(count * (1 - sparsity) / MULTIPLE))

    def is_one(*endings: str) -> bool:
        return any(module.endswith(f".{ending}") for ending in endings)

    if is_one(*layout.attention_inputs):
        return round(outputs * of_heads), inputs
    if is_one(layout.attention_output):
        return outputs, round(inputs * of_heads)
    if is_one(*layout.feed_forward_inputs):
        return neurons(outputs), inputs
    if is_one(layout.feed_forward_output):
        return outputs, neurons(inputs)
    return outputs, inputs


def _matrices(folder: Path, *, axis: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each matrix, by the name of its parameter. *axis*: of the inputs, as a model stores it."""
    if (folder / FILE_NAME).is_file():
        made = manifest.load(folder, verify=False)
        by_axis = [(weight.name, tuple(weight.shape), weight.axis) for weight in made.weights]
    else:
        by_axis = [(name, shape, axis) for name, shape in _stored(folder).items()]
    # A 1 x 1 convolution's weight has two more dimensions, of 1.
    flat = [(name, shape[:2], reduced) for name, shape, reduced in by_axis if _flat(shape)]
    return {name: (shape[1 - reduced], shape[reduced]) for name, shape, reduced in flat}


def _flat(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and all(length == 1 for length in shape[2:])


def _stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors: from the headers of its safetensors, or built from its config.json."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in read_json(index, ModelError, _REMEDY)["weight_map"].values()})
    else:
        files = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []
    if not files:
        shapes: dict[str, tuple[int, ...]] = importlib.import_module("serve.engines._torch_products").shapes_of(folder)
        return shapes
    return {name: shape for file in files for name, shape in _header(file).items()}


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file: a length in 8 bytes, then that much JSON."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        return {name: tuple(each["shape"]) for name, each in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is not a whole safetensors file ({error}); copy it again.") from error
