"""What the tests of training share: options for runs of a second, and readers of what a run leaves."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pst.config import TrainConfig

torch.set_num_threads(1)  # the matrices are tiny: more threads only wait for each other


def options(model: Path, data: Path, **changes: Any) -> TrainConfig:
    """Twelve steps on the processor, PST at half sparsity; *changes* override any of it."""
    defaults: dict[str, Any] = {"steps": 12, "batch_size": 8, "device": "cpu", "sparsity": 0.5}
    if changes.get("pattern", "unstructured") != "unstructured" or changes.get("method") == "dense":
        defaults.pop("sparsity")
    return TrainConfig(model=str(model), data=str(data), **(defaults | changes))


def weights(output: Path) -> bytes:
    """The saved weights of a run, as bytes."""
    return (output / "model" / "model.safetensors").read_bytes()


def tensors(model: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model folder by name."""
    return load_file(model / "model.safetensors")


def report(output: Path) -> dict[str, Any]:
    """The sparsity.json of a run."""
    value: dict[str, Any] = json.loads((output / "model" / "sparsity.json").read_text())
    return value


def log_lines(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def checkpoint_steps(output: Path) -> list[int]:
    """The steps of the checkpoints in a run folder, oldest first."""
    return sorted(int(path.stem.removeprefix("step-")) for path in output.glob("checkpoints/step-*.pt"))


def leftovers(output: Path) -> list[Path]:
    """Everything under *output* that a write has not finished."""
    return [path for path in output.rglob(".*") if ".partial-" in path.name or ".old-" in path.name]
