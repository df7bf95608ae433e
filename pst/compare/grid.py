"""The cells of a comparison: which runs there are, with the whole configuration of each, checked before any starts."""

import importlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pst.config import COMMON, TrainConfig
from pst.errors import ConfigError, PSTError
from pst.methods import names
from pst.patterns import parse_pattern
from pst.settings import resolve

DENSE = "dense"
"""The method that the others are measured against: it prunes nothing, so it runs once a seed."""
FAITHFUL = "-faithful"
"""Appended to a method's name: its published form, where it has one (TrainConfig.faithful)."""
OF_THE_GRID = {
    "model": "--model",
    "data": "--data",
    "method": "--methods",
    "faithful": f"--methods NAME{FAITHFUL}",
    "pattern": "--patterns",
    "sparsity": "--sparsities",
    "seed": "--seeds",
}
"""Options that ``--set`` may not touch, with what sets them."""
SHARED = {
    "text_columns", "label_column", "validation", "validation_fraction", "limit", "task", "input_column",
    "target_column", "epochs", "steps", "batch_size", "max_length", "precision", "num_beams", "length_penalty",
    "no_repeat_ngram", "max_new_tokens",
}  # fmt: skip
"""Options that a comparison gives all methods alike, or it would compare something else."""
EPOCHS = float(str(COMMON["epochs"]))
"""Where neither steps nor epochs are given: for all methods, whatever a method's own default is."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid."""

    method: str
    """As typed: a method's name, with ``-faithful`` for its published form."""
    pattern: str
    """``dense`` for the dense run."""
    sparsity: float
    """Requested fraction of zeros, 0 to below 1."""
    seed: int
    config: TrainConfig
    """Filled: no open defaults."""
    dense: str | None = None
    """The cell that has to be finished before this one, which starts from its model or learns from it."""

    @property
    def name(self) -> str:
        """The name of its run folder, unique in the grid."""
        pattern = re.sub(r"[^\w.]+", "-", self.pattern)
        shape = "" if self.method == DENSE else f"_{pattern}_{self.sparsity!r}"
        return f"{self.method}{shape}_seed{self.seed}"

    @property
    def label(self) -> str:
        """For a person."""
        shape = "" if self.method == DENSE else f", {self.pattern} {percent(self.sparsity)}"
        return f"{self.method}{shape}, seed {self.seed}"


def percent(fraction: float) -> str:
    """0.9 as 90%, 0.955 as 95.5%."""
    return f"{100 * fraction:.4g}%"


def parse_names(text: str) -> tuple[str, ...]:
    """``dense,pst`` as ("dense", "pst"); one that is named twice counts once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def parse_sparsities(text: str) -> tuple[float, ...]:
    """``0.5,0.9`` as (0.5, 0.9). Raises ConfigError for what is not a number."""
    try:
        return tuple(dict.fromkeys(float(part) for part in parse_names(text)))
    except ValueError:
        raise ConfigError(f"--sparsities is {text!r}; give numbers separated by commas, such as 0.5,0.9.") from None


def build(
    *,
    model: str,
    data: str,
    methods: Sequence[str],
    patterns: Sequence[str],
    sparsities: Sequence[float],
    seeds: int,
    runs: Path,
    sets: Sequence[str] = (),
    from_dense: bool = False,
    teacher_from_dense: bool = False,
) -> tuple[Cell, ...]:
    """Every cell, seed by seed and the dense one first. *runs*: the folder of the run folders.

    Raises ConfigError for a grid that makes no sense, and what TrainConfig raises for a cell that could not run.
    """
    _check_methods(methods)
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; a comparison needs at least 1, and 3 to see any spread.")
    needs_dense = [
        flag
        for flag, wanted in (("--from-dense", from_dense), ("--teacher-from-dense", teacher_from_dense))
        if wanted and DENSE not in methods
    ]
    if needs_dense:
        raise ConfigError(f"{' and '.join(needs_dense)} needs the dense runs; add {DENSE} to --methods.")
    shared, own = _split_sets(sets, methods)
    if teacher_from_dense and any(_key(item) == "teacher" for part in (shared, *own.values()) for item in part):
        raise ConfigError("--set teacher and --teacher-from-dense name two teachers; leave one of them out.")
    shapes = _shapes(patterns, sparsities) if any(method != DENSE for method in methods) else []
    cells: list[Cell] = []
    for seed in range(seeds):
        for method in sorted(methods, key=lambda name: name != DENSE):
            for pattern, sparsity in [(DENSE, 0.0)] if method == DENSE else shapes:
                flags: dict[str, object] = {"model": model, "data": data, "seed": seed}
                flags |= {"method": method.removesuffix(FAITHFUL), "faithful": method.endswith(FAITHFUL)}
                if method != DENSE:
                    flags |= {"pattern": pattern, "sparsity": sparsity}
                config = resolve(TrainConfig, sets=[*shared, *own[method]], flags=flags)
                if not config.steps and config.epochs is None:
                    config = replace(config, epochs=EPOCHS)
                cell = Cell(method=method, pattern=pattern, sparsity=sparsity, seed=seed, config=config)
                if method != DENSE and (from_dense or teacher_from_dense):
                    cell = _after_dense(cell, runs, start=from_dense, teach=teacher_from_dense)
                cells.append(_filled(cell))
    return tuple(cells)


def _check_methods(methods: Sequence[str]) -> None:
    if not methods:
        raise ConfigError(f"There is nothing to compare; name --methods from {', '.join(names())}.")
    for method in methods:
        if method.removesuffix(FAITHFUL) not in names():
            raise ConfigError(f"Unknown method {method!r} in --methods; use {', '.join(names())}, or pst{FAITHFUL}.")
        if getattr(importlib.import_module(f"pst.methods.{method.removesuffix(FAITHFUL)}"), "KEEPS_ZEROS", False):
            raise ConfigError(
                f"Method {method} keeps the zeros that its model has, so it cannot be run at chosen patterns and "
                "sparsities; use it with pst train."
            )


def _shapes(patterns: Sequence[str], sparsities: Sequence[float]) -> list[tuple[str, float]]:
    """Each pattern with each sparsity, or with the one that it fixes."""
    if not patterns:
        raise ConfigError("There is nothing to prune to; name --patterns such as unstructured,2:4.")
    shapes = []
    for spec in patterns:
        fixed = parse_pattern(spec).sparsity
        if fixed is None and not sparsities:
            raise ConfigError(f"Pattern {spec} needs --sparsities such as 0.5,0.9.")
        shapes += [(spec, sparsity) for sparsity in (sparsities if fixed is None else [fixed])]
    return list(dict.fromkeys(shapes))


def _key(item: str) -> str:
    return item.partition("=")[0].strip().replace("-", "_")


def _split_sets(sets: Sequence[str], methods: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """``key=value`` for all methods, and ``METHOD.key=value`` by method."""
    shared: list[str] = []
    own: dict[str, list[str]] = {method: [] for method in methods}
    for item in sets:
        left, equals, value = item.partition("=")
        method, dot, name = left.strip().rpartition(".")
        if not equals:
            raise ConfigError(f"--set {item} is not of the form key=value or METHOD.key=value; write one of them.")
        key = _key(name)
        if key in OF_THE_GRID:
            raise ConfigError(f"--set {left.strip()} is not for a comparison; {OF_THE_GRID[key]} sets it.")
        if not dot:
            shared.append(item)
        elif method not in own:
            raise ConfigError(f"--set {item} is for {method!r}, which is not among --methods {','.join(methods)}.")
        elif key in SHARED:
            raise ConfigError(f"{key} is the same for all methods, or they could not be compared; use --set {key}=...")
        else:
            own[method].append(f"{name}={value}")
    return shared, own


def _after_dense(cell: Cell, runs: Path, *, start: bool, teach: bool) -> Cell:
    dense = f"{DENSE}_seed{cell.seed}"
    folder = str(runs / dense / "model")
    config = replace(cell.config, model=folder, start="finetuned") if start else cell.config
    return replace(cell, config=replace(config, teacher=folder) if teach else config, dense=dense)


def _filled(cell: Cell) -> Cell:
    try:
        return replace(cell, config=cell.config.filled())
    except PSTError as error:
        raise type(error)(f"The run {cell.label} is not possible: {error}") from error


def differences(stored: TrainConfig, now: TrainConfig, *, ignored: set[str]) -> list[str]:
    """``name was X, now Y`` for each option in which two configurations differ."""
    before, after = asdict(stored), asdict(now)
    return [
        f"{name} was {before[name]!r}, now {after[name]!r}"
        for name in after
        if name not in ignored and before[name] != after[name]
    ]
