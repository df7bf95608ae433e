"""Mixed plans: a pattern of its own for each prunable weight, from a small TOML file.

    attention = "dense"                                             one or more whole parts of a weight's name
    "layer.0.output" = "dense"
    intermediate = "2:4"
    "*.output.dense.weight" = {pattern = "unstructured", sparsity = 0.9}     with * ? [ a glob over the whole name
    're:layer\\.1[01]\\.' = "4:8"                                     a regular expression, found anywhere in the name
    default = "2:4"                                                 whatever no entry matches

The first entry that matches decides, in the order of the file; ``default`` comes last wherever it stands. Dense weights
get a mask that is always full, so that a method which freezes the weights themselves still updates them.

Every weight follows the one schedule up to its own end: at the schedule's sparsity s, a weight that ends at f is at
min(s, f). The schedule ends at the largest f.
"""

import difflib
import fnmatch
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst.errors import ConfigError, PatternError
from pst.patterns import Pattern, check_sparsity, parse_pattern
from pst.patterns.structured import Structured

MIXED = "mixed"
"""What stands for the pattern of a model whose weights have different ones."""
DENSE = "dense"
GLOBAL_PLAN = (
    "A plan gives each weight a sparsity of its own, so that a global budget has nothing to share out; use a local "
    "budget, or one pattern without a plan."
)
_DEFAULT = "default"
_KEYS = ("pattern", "sparsity")
_EXAMPLE = 'for example: attention = "dense"'


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a weight is to become."""

    spec: str
    """The pattern as stored: dense, unstructured, 2:4, ..."""
    pattern: Pattern
    """Of dense, one whose mask at sparsity 0 is full."""
    sparsity: float


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a plan."""

    key: str
    target: Target

    def matches(self, name: str) -> bool:
        """Whether the weight *name* is meant."""
        if self.key == _DEFAULT:
            return True
        if self.key.startswith("re:"):
            return re.search(self.key[3:], name) is not None
        if any(sign in self.key for sign in "*?["):
            return fnmatch.fnmatchcase(name, self.key)
        return f".{self.key}." in f".{name}."


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Entries in the order in which they are asked, the default last."""

    entries: tuple[Entry, ...]
    where: str
    """For messages: the file, or what stands for it."""

    @property
    def sparsity(self) -> float:
        """The largest fraction of zeros, where the schedule ends."""
        return max(entry.target.sparsity for entry in self.entries)

    @property
    def text(self) -> str:
        """The plan as TOML, equal for equal plans."""
        return "".join(f"{_quoted(entry.key)} = {_shown(entry.target)}\n" for entry in self.entries)

    def assign(self, names: Sequence[str]) -> dict[str, Target]:
        """The target of each of *names*.

        Raises ConfigError for an entry that decides nothing, a name that none decides, and where all stay dense.
        """
        found, matched = self._decided(names)
        for entry, own in zip(self.entries, found, strict=True):
            if not own and entry.key != _DEFAULT:
                raise ConfigError(self._idle(entry, names))
        missing = [name for name in names if name not in matched]
        if missing:
            raise ConfigError(
                f"{self.where} has no entry for {len(missing)} weights, {missing[0]} among them; "
                'add one, or a default, such as default = "dense".'
            )
        if all(target.sparsity == 0 for target in matched.values()):
            raise ConfigError(f"{self.where} leaves every weight dense; give one a pattern, or use --method dense.")
        return matched

    def overview(self, sizes: Mapping[str, int]) -> list[str]:
        """What each entry decides, a line each; *sizes* are the entries of each weight by name."""
        lines = []
        for entry, own in zip(self.entries, self._decided(list(sizes))[0], strict=True):
            size = sum(sizes[name] for name in own)
            lines.append(f"{entry.key} -> {_described(entry.target)}: {len(own)} weights, {size:,} parameters")
        return lines

    def _decided(self, names: Sequence[str]) -> tuple[list[list[str]], dict[str, Target]]:
        found: list[list[str]] = [[] for _ in self.entries]
        matched = {}
        for name in names:
            for place, entry in enumerate(self.entries):
                if entry.matches(name):
                    found[place].append(name)
                    matched[name] = entry.target
                    break
        return found, matched

    def _idle(self, entry: Entry, names: Sequence[str]) -> str:
        covered = [name for name in names if entry.matches(name)]
        if covered:
            before = next(other.key for other in self.entries if other.matches(covered[0]))
            return (
                f"{entry.key!r} in {self.where} decides nothing: {covered[0]} and all else that it matches is decided "
                f"by {before!r} before it; move it up."
            )
        parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
        near = difflib.get_close_matches(entry.key, parts, n=3, cutoff=0.5)
        remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else f"a name is, for example, {names[0]}."
        return f"{entry.key!r} in {self.where} matches no prunable weight; {remedy}"


def read_plan(value: str) -> Plan:
    """The plan in the file *value*, or in the text *value*. Raises ConfigError, and PatternError for a bad pattern."""
    if "=" in value and not Path(value).is_file():
        return parse_plan(value, where="the plan")
    try:
        return parse_plan(Path(value).expanduser().read_text(encoding="utf-8-sig"), where=value)
    except FileNotFoundError:
        raise ConfigError(f"{value} does not exist; give --plan an existing TOML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{value} cannot be read ({error}); give --plan a TOML file.") from error


def parse_plan(text: str, *, where: str) -> Plan:
    """The plan in *text*; *where* is for messages. Raises ConfigError and PatternError."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML ({error}); write one entry a line, {_EXAMPLE}.") from error
    if not content:
        raise ConfigError(f"{where} is empty; write one entry a line, {_EXAMPLE}.")
    entries = [Entry(key=key, target=_target(key, value, where)) for key, value in content.items()]
    entries.sort(key=lambda entry: entry.key == _DEFAULT)  # stable: the order of the file, the default last
    return Plan(entries=tuple(entries), where=where)


def _target(key: str, value: Any, where: str) -> Target:
    place = f"{key!r} in {where}"
    if key.startswith("re:"):
        try:
            re.compile(key[3:])
        except re.error as error:
            raise ConfigError(f"{place} is not a regular expression ({error}); correct it.") from error
    options = {"pattern": value} if isinstance(value, str) else value
    if not isinstance(options, dict):
        raise ConfigError(
            f'{place} is {value!r}; write a pattern, such as "2:4", or {{pattern = ..., sparsity = ...}}.'
        )
    for name in options:
        if name not in _KEYS:
            near = difflib.get_close_matches(name, _KEYS, n=1, cutoff=0.5)
            remedy = (
                f"did you mean {near[0]!r}?" if near else f'put a name with dots in quotes, such as "{key}.{name}".'
            )
            raise ConfigError(f"{place} has the unknown key {name!r}; {remedy}")
    spec, sparsity = options.get("pattern"), options.get("sparsity")
    if not isinstance(spec, str):
        raise ConfigError(f'{place} names no pattern; write for example {{pattern = "unstructured", sparsity = 0.9}}.')
    if sparsity is not None and (isinstance(sparsity, bool) or not isinstance(sparsity, int | float)):
        raise ConfigError(f"{place} has the sparsity {sparsity!r}, which is not a number; write for example 0.9.")
    try:
        if spec == DENSE:
            pattern, fixed = parse_pattern("unstructured"), 0.0
        else:
            pattern = parse_pattern(spec)
            fixed = pattern.sparsity  # type: ignore[assignment]
        if isinstance(pattern, Structured):
            raise ConfigError(
                f"{place}: heads and neurons span several weights; use --pattern structured without a plan."
            )
        check_sparsity(sparsity or 0.0)
    except PatternError as error:
        raise PatternError(f"{place}: {error}") from error
    if fixed is None and sparsity is None:
        raise ConfigError(f'{place} needs a sparsity: {{pattern = "{spec}", sparsity = 0.9}}.')
    if fixed is not None and sparsity is not None and abs(sparsity - fixed) > 1e-6:
        raise ConfigError(f"{place} asks for sparsity {sparsity:g}, but {spec} has {fixed:g}; leave the sparsity out.")
    return Target(spec=spec, pattern=pattern, sparsity=float(sparsity if fixed is None else fixed))


def _shown(target: Target) -> str:
    if target.spec == DENSE or target.pattern.sparsity is not None:
        return _quoted(target.spec)
    return f"{{pattern = {_quoted(target.spec)}, sparsity = {target.sparsity!r}}}"


def _described(target: Target) -> str:
    return target.spec if target.spec == DENSE else f"{target.spec} {target.sparsity:.0%}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
