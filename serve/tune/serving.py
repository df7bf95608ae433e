"""What ``serve`` opens: an artifact as the command line names it, or what a tuned.json chose, as it was tuned."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst.errors import ArtifactError, ConfigError, RunError
from pst.files import read_json
from pst.progress import note
from serve.bench.comparison import differences
from serve.bench.environment import environment
from serve.engines import ANY_SHAPE, Shapes, available_cpus
from serve.tune.candidates import fingerprint
from serve.tune.tuned import OVERALL, SCHEMA_VERSION, TUNED_NAME

_REMEDY = "give the tuned.json that pst bench --tune wrote, or the folder that holds it."


@dataclass(frozen=True, kw_only=True)
class Serving:
    """An artifact, and how open_engine is to open it."""

    path: Path
    engine: str
    threads: int
    shapes: Shapes = ANY_SHAPE


def serving(path: Path, *, engine: str, threads: int) -> Serving:
    """*path* is an artifact, or a tuned.json or the folder that holds one.

    Of a tuned.json it is its choice for all workloads, opened as it was measured: with the same shapes announced. A
    note tells what differs from the machine it was made on. Raises RunError for what is no tuned.json, ArtifactError
    where the artifact is gone or has changed since, and ConfigError where *engine* or *threads* are given beside it.
    """
    file = path / TUNED_NAME if (path / TUNED_NAME).is_file() else path
    if not file.is_file() or file.suffix != ".json":
        return Serving(path=path, engine=engine, threads=threads)
    if engine != "auto" or threads:
        raise ConfigError(f"{file} names the engine and its threads; leave --engine and --threads out, or tune again.")
    tuned = read_json(file, RunError, _REMEDY)
    version, choice = tuned.get("schema_version"), tuned.get(OVERALL)
    if not isinstance(version, int) or not isinstance(choice, dict):
        raise RunError(f"{file} is not the result of a tuning; {_REMEDY}")
    if version > SCHEMA_VERSION:
        raise RunError(f"{file} has schema version {version}, this program reads up to {SCHEMA_VERSION}; update it.")
    if version < SCHEMA_VERSION:
        raise RunError(f"{file} is of an earlier program, which tuned engines that serve does not open; tune again.")
    try:
        found = Serving(
            path=Path(choice["artifact"]),
            engine=str(choice["engine"]),
            threads=int(choice["threads"]),
            shapes=_shapes(tuned, choice),
        )
        before, expected, name = dict(tuned["environment"]), str(choice["fingerprint"]), str(choice["chosen"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file} is not a whole tuned.json ({error!r}); run pst bench --tune again.") from error
    if not found.path.exists() or fingerprint(found.path) != expected:
        state = "has changed since" if found.path.exists() else "is not there any more"
        raise ArtifactError(f"{found.path}, which {file} chose, {state}; run pst bench --tune again.")
    now = environment(command="", threads=min(found.threads, available_cpus()))
    for each in differences(before, now):
        note(f"Tuned elsewhere: {each}. Run pst bench --tune here.")
    measured = ", ".join(f"{batch}x{tokens}" for batch, tokens in found.shapes.fixed)
    note(f"{file} chose {name} ({found.path}), measured at {measured}.")
    return found


def _shapes(tuned: Mapping[str, Any], choice: Mapping[str, Any]) -> Shapes:
    """What was announced when the candidates were opened (serve.tune.run.tune), and found of the layers."""
    sparse = choice.get("faster_sparse")
    each = [(int(one["batch"]), int(one["sequence"]), int(one["new_tokens"])) for one in tuned["workloads"]]
    return Shapes(
        fixed=tuple(dict.fromkeys((batch, tokens) for batch, tokens, _ in each)),
        new_tokens=max((new for _, _, new in each), default=0),
        spanned=bool(tuned["spanned"]),
        faster_sparse=None if sparse is None else tuple(map(str, sparse)),
    )
