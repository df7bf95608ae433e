"""What pst predict found: as JSON, and as text with the answer first and each layer after it."""

from dataclasses import asdict, dataclass
from typing import Any

from pst.markdown import markdown_table
from serve.bench.report_tables import known_columns, machine_lines, show_ratio
from serve.bench.stopping import Stopped
from serve.bench.timing import Speedup

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerPrediction:
    """All linears of one shape together."""

    names: tuple[str, ...]
    shape: str
    """Outputs x inputs, dense."""
    left: str
    """The same of what a structured pattern leaves; shape itself for other patterns."""
    count: int
    dense_ms: float
    """Median of all of them, one after another."""
    sparse_ms: float
    speedup: Speedup
    kernel: str
    """What computed them with the pattern."""
    sparse_kernel: bool
    """Whether that makes use of zeros."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "speedup": self.speedup.to_json()}


@dataclass(frozen=True, kw_only=True)
class ShapePrediction:
    """The model at one shape."""

    shape: str
    model_ms: float
    """Median of the whole dense model."""
    speedup: Speedup
    """Of the whole model."""
    mixed: Speedup | None
    """The same with those layers dense that are slower sparse; None where there are none."""
    layers: tuple[LayerPrediction, ...]
    stopped: Stopped

    @property
    def layers_ms(self) -> float:
        """Of all linears, dense."""
        return sum(layer.dense_ms for layer in self.layers)

    @property
    def share(self) -> float:
        """Of the model's time that is in its linears, at most 1."""
        return min(1.0, self.layers_ms / self.model_ms)

    @property
    def limit(self) -> float | None:
        """The speed-up if the linears took no time; None where there is nothing else."""
        return 1 / (1 - self.share) if self.share < 1 else None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "shape": self.shape,
            "model_ms": self.model_ms,
            "layers_ms": self.layers_ms,
            "share": self.share,
            "limit": self.limit,
            "speedup": self.speedup.to_json(),
            "mixed": None if self.mixed is None else self.mixed.to_json(),
            "stopped": self.stopped.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
        }


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """All shapes."""

    environment: dict[str, Any]
    path: str
    pattern: str
    sparsity: float
    engine: str
    dtype: str
    shapes: tuple[ShapePrediction, ...]
    why_none: str
    """Why the runtime has no sparse kernel where it had none, and what would help."""

    def to_json(self) -> dict[str, Any]:
        """What pst predict --json prints."""
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": self.environment,
            "model": self.path,
            "pattern": self.pattern,
            "sparsity": self.sparsity,
            "engine": self.engine,
            "dtype": self.dtype,
            "answers": [self.answer(each) for each in self.shapes],
            "shapes": [each.to_json() for each in self.shapes],
        }

    def answer(self, each: ShapePrediction) -> str:
        """One sentence for a shape: how much, and why."""
        said = f"{show_ratio(each.speedup)} at {each.shape}: the pruned layers take {each.share:.0%} of the time"
        spread = [layer.speedup.ratio for layer in each.layers]
        speeds = f"{min(spread):.2f}× to {max(spread):.2f}×" if len(spread) > 1 else f"{spread[0]:.2f}×"
        if self.pattern == "structured":
            return f"{said}, and become {speeds} as fast by being smaller; what attention saves comes on top."
        if not any(layer.sparse_kernel for layer in each.layers):
            return f"{said}, and none of it is saved, because {self.why_none}."
        said += f", and with sparse kernels are {speeds} as fast"
        if each.mixed is None:
            return f"{said}."
        if not any(layer.speedup.finding == "faster" for layer in each.layers):
            return f"{said}: keep the model dense at this shape, or use a larger batch."
        return f"{said}; with those dense that are slower, {show_ratio(each.mixed)}."

    def render(self) -> str:
        """Markdown, which a terminal shows as well."""
        lines = [
            f"{self.path} with pattern {self.pattern} at {self.sparsity:.0%} sparsity, predicted on {self.engine}:"
        ]
        lines += ["", *(f"- {self.answer(each)}" for each in self.shapes), ""]
        header = ["shape", "layers", "count", "outputs x inputs", "left", "dense ms", "sparse ms", "ratio", "kernel"]
        rows = [
            [
                each.shape,
                ", ".join(layer.names),
                str(layer.count),
                layer.shape,
                layer.left if layer.left != layer.shape else "",
                f"{layer.dense_ms:.3f}",
                f"{layer.sparse_ms:.3f}",
                show_ratio(layer.speedup),
                layer.kernel,
            ]
            for each in self.shapes
            for layer in each.layers
        ]
        lines += markdown_table(*known_columns(header, rows, optional=("left",)))
        lines += ["", *(f"- {each.stopped.sentence(each.shape)}" for each in self.shapes)]
        lines += [
            "- The whole dense model: "
            + ", ".join(f"{each.model_ms:.3f} ms at {each.shape}" for each in self.shapes)
            + ".",
            f"- Random weights ({self.dtype}), layers timed by themselves; what a runtime fuses with them is left out.",
        ]
        lines += [f"- {name}: {value}" for name, value in machine_lines(self.environment)]
        return "\n".join(lines)
