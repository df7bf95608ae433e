"""The wheel holds the four names and nothing else, and its extras can be installed side by side where they may."""

import email
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
TOP_LEVEL = {"pst", "export", "serve", "cli.py"}


def package(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match.group()).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the sources, so that no build/ is left in the checkout and none is picked up from it."""
    pytest.importorskip("build")
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is older than the build needs")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "cli.py"):
        if not (ROOT / name).is_file():
            pytest.skip(f"{name} is not there")
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("pst", "export", "serve", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata_file(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_the_wheel_holds_exactly_the_four_names(wheel: zipfile.ZipFile) -> None:
    top = {path.split("/")[0] for path in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == TOP_LEVEL
    assert len(top) == len(TOP_LEVEL) + 1


def test_the_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    sources = {
        str(path.relative_to(ROOT))
        for folder in ("pst", "export", "serve")
        for kind in ("*.py", "*.[ch]")
        for path in (ROOT / folder).rglob(kind)
    }
    assert {f"serve/engines/sparse_cpu/{name}" for name in ("sparse_linear.c", "tiles.h")} <= sources
    assert sources <= set(wheel.namelist())


def test_the_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_string(metadata_file(wheel, "METADATA"))
    assert metadata["Name"] == "sparse-pst"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == {"train", "cpu", "gpu"}
    assert "[console_scripts]\npst = cli:main" in metadata_file(wheel, "entry_points.txt")
    (license_file,) = [path for path in wheel.namelist() if path.endswith("LICENSE")]
    assert wheel.read(license_file) == (ROOT / "LICENSE").read_bytes()


def test_a_serving_machine_needs_no_torch() -> None:
    for extra in ("cpu", "gpu"):
        required = {package(line) for line in (*PROJECT["project"]["dependencies"], *EXTRAS[extra])}
        assert not required & {"torch", "transformers", "onnx", "datasets"}


def test_cpu_and_gpu_exclude_each_other() -> None:
    runtimes = {"onnxruntime", "onnxruntime-gpu"}
    chosen = {extra: {package(line) for line in lines} & runtimes for extra, lines in EXTRAS.items()}
    assert chosen == {"train": set(), "cpu": {"onnxruntime"}, "gpu": {"onnxruntime-gpu"}}
    assert [{"extra": "cpu"}, {"extra": "gpu"}] in PROJECT["tool"]["uv"]["conflicts"]


def test_every_direct_requirement_is_pinned_once() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)  # no local versions
    pinned = [package(pin) for pin in pins]
    assert sorted(pinned) == sorted(set(pinned))
    project = PROJECT["project"]
    direct = [
        *project["dependencies"],
        *PROJECT["dependency-groups"]["dev"],
        *(r for rs in EXTRAS.values() for r in rs),
    ]
    unpinned = {package(line) for line in direct} - set(pinned) - {"setuptools"}
    assert unpinned == set()
