"""Settings of a command: a frozen keyword-only dataclass, filled from four places, each overriding the one before.

    defaults  <  a YAML file (--config)  <  key=value strings (--set)  <  named flags

Every value is checked against the annotation of its field, an unknown key is refused, and the result can be written
to a YAML file that gives the same settings again. Annotations may be int, float, bool, str, Path, Literal[...],
tuple[X, ...] of one of these, and any of them or None.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast

import yaml

from pst.errors import ConfigError
from pst.files import atomic_file

T = TypeVar("T")
D = TypeVar("D")

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NO_FLAGS: Mapping[str, object] = types.MappingProxyType({})


class Setting(NamedTuple):
    """One field for a person: its name, what it takes, its default ("required" without one), and what it does."""

    key: str
    type: str
    default: str
    help: str


def field(default: D, help: str) -> D:  # noqa: A002 - the word that argparse, click and typer use
    """A dataclass field with a default and one line on its meaning and unit."""
    if isinstance(default, list | dict | set):
        raise TypeError("a setting's default must be immutable; use a tuple")
    return dataclasses.field(default=default, metadata={"help": help})


def required(help: str) -> Any:  # noqa: A002
    """A dataclass field that has to be given."""
    return dataclasses.field(metadata={"help": help})


def resolve(
    cls: type[T], *, file: Path | None = None, sets: Sequence[str] = (), flags: Mapping[str, object] = _NO_FLAGS
) -> T:
    """An instance of *cls* from its defaults, *file*, *sets* ("key=value") and *flags* (None: not given).

    Raises ConfigError, naming the place and the remedy, for what cannot be read, is unknown, or does not fit.
    """
    hints = typing.get_type_hints(cls)
    keys = [entry.name for entry in _fields(cls)]
    values: dict[str, Any] = {}
    if file is not None:
        for key, value in _read(file).items():
            values[key] = _convert(value, hints[_known(key, keys, str(file))], f"{key} in {file}", text=False)
    for item in sets:
        name, equals, raw = item.partition("=")
        key = name.strip().replace("-", "_")
        if not equals or not key:
            raise ConfigError(f"--set {item} is not of the form key=value; write for example --set {keys[0]}=VALUE.")
        values[key] = _convert(raw.strip(), hints[_known(key, keys, "--set")], f"--set {key}", text=True)
    for key, value in flags.items():
        if value is not None:
            hint = hints[_known(key, keys, "the flags")]
            values[key] = _convert(value, hint, f"--{key.replace('_', '-')}", text=isinstance(value, str))
    missing = [entry.name for entry in _fields(cls) if entry.name not in values and _is_required(entry)]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given; add --set {missing[0]}=VALUE.")
    return cls(**values)


def dump(config: object, path: Path) -> None:
    """Write the settings to *path* as YAML, atomically; ``resolve(type(config), file=path)`` gives them back equal."""
    values = {entry.name: _plain(getattr(config, entry.name)) for entry in _fields(type(config))}
    with atomic_file(path) as partial:
        text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
        partial.write_text(text, encoding="utf-8")


def describe(cls: type) -> list[Setting]:
    """Every field of *cls* in order, for --help and the documentation."""
    hints = typing.get_type_hints(cls)
    return [
        Setting(
            key=entry.name,
            type=_name(hints[entry.name]),
            default="required" if _is_required(entry) else _shown(_default(entry)),
            help=entry.metadata.get("help", ""),
        )
        for entry in _fields(cls)
    ]


# -- reading and writing -------------------------------------------------------------------------------------------


def _fields(cls: type) -> list["dataclasses.Field[Any]"]:
    return [entry for entry in dataclasses.fields(cast(Any, cls)) if entry.init]


def _is_required(entry: "dataclasses.Field[Any]") -> bool:
    return entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _default(entry: "dataclasses.Field[Any]") -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


class _Loader(yaml.SafeLoader):
    """Scalars as YAML 1.2 reads them: to YAML 1.1 the pattern 2:4 is the number 124, and 1e-4 is a text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is there twice", node.value[index][0].start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that either version of YAML would read as something else."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _read(file: Path) -> dict[str, Any]:
    try:
        value = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; give --config an existing YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); give --config a YAML file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise ConfigError(f"{file} is not valid YAML{line} ({problem}); write one 'key: value' a line.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds no settings; write one 'key: value' a line.")
    return {str(key): item for key, item in value.items()}


def _known(key: str, keys: Sequence[str], where: str) -> str:
    if key in keys:
        return key
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(keys)}."
    raise ConfigError(f"{where} names the unknown setting {key!r}; {remedy}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# -- values and annotations ----------------------------------------------------------------------------------------


def _convert(value: Any, hint: Any, where: str, *, text: bool) -> Any:
    """*value* as *hint* wants it. *text*: it was typed on the command line, so "none" and "a,b" have their meaning."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        rest = [argument for argument in arguments if argument is not type(None)]
        if len(rest) != 1 or len(rest) == len(arguments):
            raise TypeError(f"{where}: the annotation {hint} is not supported")
        if value is None or (text and str(value).lower() in {"none", "null"}):
            return None
        return _convert(value, rest[0], where, text=text)
    if origin is Literal:
        for choice in arguments:
            if value == choice and type(value) is type(choice):
                return choice
            if text and str(value) == str(choice):
                return choice
        raise _unfit(value, hint, where)
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")] if value.strip() else []
        if not isinstance(value, list | tuple):
            raise _unfit(value, hint, where)
        return tuple(_convert(item, arguments[0], where, text=text) for item in value)
    if hint is Path:
        return Path(_scalar(value, str, hint, where))
    return _scalar(value, hint, hint, where)


def _scalar(value: Any, kind: Any, hint: Any, where: str) -> Any:
    if kind is str:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise _unfit(value, hint, where)
        return str(value)
    if kind is bool:
        word = _WORDS.get(str(value).lower())
        if isinstance(value, float) or word is None:
            raise _unfit(value, hint, where)
        return word
    if kind not in (int, float):
        raise TypeError(f"{where}: the annotation {hint} is not supported")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _unfit(value, hint, where)
    if kind is int and isinstance(value, float):  # int(2.5) would drop the half
        if not value.is_integer():
            raise _unfit(value, hint, where)
        return int(value)
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise _unfit(value, hint, where) from None
    if not math.isfinite(number):
        raise _unfit(value, hint, where)
    return number


def _unfit(value: Any, hint: Any, where: str) -> ConfigError:
    return ConfigError(f"{where} is {_shown(value)!r}, which is not {_name(hint)}; correct the value.")


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(_shown(item) for item in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _name(hint: Any) -> str:
    """What a field takes, in words: "a number", "one of 'a', 'b'", "a whole number or none"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("none" if argument is type(None) else _name(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(_shown(choice) for choice in arguments)
    if origin is tuple:
        return f"a comma-separated list, each {_name(arguments[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(hint, str(hint))
