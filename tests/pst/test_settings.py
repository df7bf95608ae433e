"""Settings out of defaults, a file, strings and flags; and back into a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from pst.errors import ConfigError, StorageError
from pst.settings import Setting, describe, dump, field, required, resolve


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = field("base", "model to start from")
    learning_rate: float = field(1e-3, "step size")
    steps: int = field(10, "optimizer steps")
    faithful: bool = field(False, "as published")
    method: Literal["pst", "dense"] = field("pst", "what to keep")
    seed: int | None = field(None, "start of the random numbers")
    note: str | None = field(None, "free text")
    columns: tuple[str, ...] = field((), "text columns")
    shapes: tuple[int, ...] = field((1, 8), "batch sizes")
    folder: Path = Path("runs")
    fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ConfigError(f"fraction is {self.fraction}; it must lie in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class Needy:
    data: str = required("what to read")


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_later_places_override_earlier_ones(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "steps: 1\nseed: 1\nmodel: file\n")
    options = resolve(Options, file=file, sets=["steps=2", "seed=2"], flags={"seed": 3, "learning_rate": None})
    assert (options.model, options.steps, options.seed, options.learning_rate) == ("file", 2, 3, 1e-3)
    assert resolve(Options) == Options()


@pytest.mark.parametrize(
    ("item", "key", "value"),
    [
        ("learning_rate=1e-4", "learning_rate", 1e-4),
        ("learning-rate=2", "learning_rate", 2.0),
        ("steps = 5", "steps", 5),
        ("faithful=yes", "faithful", True),
        ("faithful=False", "faithful", False),
        ("method=dense", "method", "dense"),
        ("seed=none", "seed", None),
        ("seed=0", "seed", 0),
        ("note=a=b, c", "note", "a=b, c"),
        ("model=", "model", ""),
        ("columns=a, b", "columns", ("a", "b")),
        ("columns=", "columns", ()),
        ("shapes=1,2,3", "shapes", (1, 2, 3)),
        ("folder=a/b", "folder", Path("a/b")),
    ],
)
def test_strings_take_the_type_of_the_field(item: str, key: str, value: object) -> None:
    got = getattr(resolve(Options, sets=[item]), key)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("model: 2:4", "model", "2:4"),  # 124 to YAML 1.1
        ("model: no", "model", "no"),  # False to YAML 1.1
        ("model: 2024-01-01", "model", "2024-01-01"),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # a text to YAML 1.1
        ("steps: 010", "steps", 10),  # 8 to YAML 1.1
        ("seed: null", "seed", None),
        ("seed:", "seed", None),
        ("note: none", "note", "none"),
        ("columns: [a, 'b, c']", "columns", ("a", "b, c")),
        ("faithful: on", "faithful", True),
        ("", "steps", 10),
    ],
)
def test_values_of_a_file(tmp_path: Path, text: str, key: str, value: object) -> None:
    assert getattr(resolve(Options, file=yaml_file(tmp_path, text)), key) == value


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["model=2:4", "note=1e-4", "columns=yes,no", "folder=~", "learning_rate=1e-7", "seed=7", "faithful=1"],
        ["model=null", "note=12:30:45", "columns=null,010", "folder=0x1F", "shapes=", "method=dense"],
        ["model=", "note=: a # b", "folder=true", "learning_rate=3"],
        ["model='q'", "note=straße \U0001f600", "columns=*a,&b,!c"],
    ],
)
def test_dump_reads_back_equal(tmp_path: Path, sets: list[str]) -> None:
    options = resolve(Options, sets=sets)
    dump(options, tmp_path / "new" / "config.yaml")
    assert resolve(Options, file=tmp_path / "new" / "config.yaml") == options
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.yaml"]


def test_dump_says_where_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    dump(Options(), tmp_path / "config.yaml")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError):
        dump(Options(steps=99), tmp_path / "config.yaml")
    monkeypatch.undo()
    assert resolve(Options, file=tmp_path / "config.yaml") == Options()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["lerning_rate=1"], "unknown setting 'lerning_rate'; did you mean 'learning_rate'?"),
        (["zzz=1"], "unknown setting 'zzz'; the keys are model, learning_rate,"),
        (["steps"], "--set steps is not of the form key=value"),
        (["=1"], "--set =1 is not of the form key=value"),
        (["steps=many"], "--set steps is 'many', which is not a whole number"),
        (["steps=1.5"], "--set steps is '1.5', which is not a whole number"),
        (["learning_rate=fast"], "--set learning_rate is 'fast', which is not a number"),
        (["learning_rate=nan"], "which is not a number"),
        (["faithful=perhaps"], "which is not true or false"),
        (["method=magic"], "--set method is 'magic', which is not one of pst, dense"),
        (["seed=x"], "which is not a whole number"),
        (["shapes=1,x"], "--set shapes is 'x', which is not a whole number"),
        (["fraction=1"], "it must lie in [0, 1)"),
    ],
)
def test_refused_strings(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(Options, sets=sets)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes: 1", "config.yaml names the unknown setting 'stpes'; did you mean 'steps'?"),
        ("- a", "config.yaml holds no settings"),
        ("a: [", "config.yaml is not valid YAML in line 1"),
        ("steps: 1\nsteps: 2", "config.yaml is not valid YAML in line 2 (steps is there twice)"),
        ("!!python/object:os.system {}", "is not valid YAML"),
        ("steps: 1.5", "steps in "),
        ("steps: true", "which is not a whole number"),
        ("steps: [1]", "which is not a whole number"),
        ("model: true", "which is not text"),
        ("model:", "which is not text"),
        ("columns: {a: 1}", "which is not a comma-separated list"),
        ("method: 1", "which is not one of pst, dense"),
    ],
)
def test_refused_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(Options, file=yaml_file(tmp_path, text))
    assert message in str(caught.value)


def test_refused_flags_and_missing_things(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--learning-rate is 'x', which is not a number"):
        resolve(Options, flags={"learning_rate": "x"})
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(Options, file=tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve(Options, file=tmp_path)
    with pytest.raises(ConfigError, match="data must be given"):
        resolve(Needy)
    assert resolve(Needy, sets=["data=x"]).data == "x"


def test_describe_lists_every_field() -> None:
    described = {setting.key: setting for setting in describe(Options)}
    assert described["model"] == Setting("model", "text", "base", "model to start from")
    assert described["seed"] == Setting("seed", "a whole number or none", "none", "start of the random numbers")
    assert described["method"].type == "one of pst, dense"
    assert described["shapes"] == Setting("shapes", "a comma-separated list, each a whole number", "1,8", "batch sizes")
    assert described["fraction"].help == ""
    assert describe(Needy) == [Setting("data", "text", "required", "what to read")]
