"""Artifacts of the tiny models, exported once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ..decoders import make_decoder, prune


@pytest.fixture(scope="session")
def bert_artifact(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT as pst export writes it."""
    from export.pipeline import export

    output = tmp_path_factory.mktemp("exported") / "bert"
    export(tiny_bert, output)
    return output


@pytest.fixture(scope="session")
def gpt2_artifact(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny GPT-2 as pst export writes it."""
    from export.pipeline import export

    output = tmp_path_factory.mktemp("exported") / "gpt2"
    export(tiny_gpt2, output)
    return output


@pytest.fixture(scope="session")
def sparse_artifact(sparse_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:4 pruned tiny BERT as pst export writes it."""
    from export.pipeline import export

    output = tmp_path_factory.mktemp("exported") / "bert-2of4"
    export(sparse_model("2:4"), output)
    return output


@pytest.fixture(scope="session")
def mostly_zeros(sparse_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as pst export writes it, of whose pruned weights 80% are zero, without a pattern."""
    from export.pipeline import export

    output = tmp_path_factory.mktemp("exported") / "bert-80"
    export(sparse_model("unstructured", 0.8), output)
    return output


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """``exported("gpt2")``: a tiny sparse decoder's folder, and its artifact. Read only."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        from export.pipeline import export

        if kind not in made:
            folder = prune(make_decoder(tmp_path_factory.mktemp(kind) / "model", kind), "2:4")
            export(folder, folder.parent / "artifact")
            made[kind] = folder, folder.parent / "artifact"
        return made[kind]

    return make
