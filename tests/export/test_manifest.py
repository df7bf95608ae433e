"""export.json: round trip, and every way in which a folder is not what it claims."""

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from export import manifest as manifest_module
from export.manifest import Manifest
from export.pipeline import export
from pst.errors import ArtifactError

from .conftest import Artifact


@pytest.fixture
def folder(artifact: Artifact, tmp_path: Path) -> Path:
    """A copy of the 2:4 artifact to damage."""
    return shutil.copytree(artifact("2:4", 0.5), tmp_path / "artifact")


def edit(folder: Path, **changes: Any) -> None:
    value = json.loads((folder / "export.json").read_text()) | changes
    (folder / "export.json").write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ArtifactError, match=match):
        Manifest.load(folder)


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(folder)
    (tmp_path / "again").mkdir()
    manifest.save(tmp_path / "again")
    assert (tmp_path / "again" / "export.json").read_bytes() == (folder / "export.json").read_bytes()
    assert Manifest.from_json(manifest.to_json(), where="memory") == manifest
    assert manifest_module.load(folder) == manifest
    assert next(iter(manifest.to_json())) == "schema_version"


def test_unknown_keys_are_ignored(folder: Path) -> None:
    manifest = Manifest.load(folder)
    edit(folder, added_later=1)
    assert Manifest.load(folder) == manifest


def test_paths_of_the_machine_stay_out(folder: Path) -> None:
    assert "/" not in (folder / "export.json").read_text()


def test_not_an_artifact(tmp_path: Path) -> None:
    refused(tmp_path / "none", "is not a folder")
    refused(tmp_path, r"export\.json is missing")
    (tmp_path / "export.json").write_text("[]")
    refused(tmp_path, "does not hold a JSON object")
    (tmp_path / "export.json").write_text("{")
    refused(tmp_path, "not readable JSON")
    (tmp_path / "export.json").write_text("{}")
    refused(tmp_path, "no schema_version")


def test_newer_schema(folder: Path) -> None:
    edit(folder, schema_version=2)
    refused(folder, "schema version 2, this program reads up to 1")


@pytest.mark.parametrize("key", ["inputs", "parity", "files", "weights", "labels"])
def test_missing_key(folder: Path, key: str) -> None:
    edit(folder, **{key: None})
    refused(folder, "not a whole export.json")


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "config.json"])
def test_missing_or_changed_file(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    refused(folder, f"{name} is damaged or was changed")
    assert Manifest.load(folder, verify=False).opset == 17
    (folder / name).unlink()
    refused(folder, f"lacks {name}")
    with pytest.raises(ArtifactError, match="lacks"):
        Manifest.load(folder, verify=False)


def test_file_outside_the_folder(folder: Path) -> None:
    edit(folder, files={"../secret": "0"})
    refused(folder, "not a file of an artifact")


def test_the_gpu_package_of_onnx_runtime_alone(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-gpu brings the module without a package named onnxruntime."""
    find = importlib.metadata.Distribution.from_name

    def without_onnxruntime(name: str) -> importlib.metadata.Distribution:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", without_onnxruntime)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("onnxruntime")
    manifest = export(tiny_bert, tmp_path / "artifact")
    assert manifest.versions["onnxruntime"] == onnxruntime.__version__
