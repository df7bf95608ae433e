"""What a serving machine must not need."""

import subprocess
import sys
from pathlib import Path

import pytest

import serve

ROOT = Path(serve.__file__).resolve().parents[1]
FORBIDDEN = ("torch", "transformers", "onnx", "datasets")


def modules() -> list[str]:
    files = sorted((ROOT / "serve").rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return [name for name in names if not name.endswith("__main__")]


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_serve_loads_neither_torch_nor_transformers() -> None:
    loaded = loaded_by("\n".join(f"import {name}" for name in modules()))
    assert not loaded.intersection(FORBIDDEN)
    assert "onnxruntime" not in loaded
    assert "tokenizers" not in loaded


@pytest.mark.parametrize("name", ["serve.engines", "serve.text", "serve.classify", "serve.http.client"])
def test_the_lower_layers_do_not_load_the_server(name: str) -> None:
    assert not loaded_by(f"import {name}").intersection({"starlette", "uvicorn", "rich", "onnxruntime"})


def test_serving_an_artifact_loads_no_torch(bert_artifact: Path) -> None:
    statement = (
        "from pathlib import Path\n"
        "from serve.classify import Classifier\n"
        f"with Classifier(Path({str(bert_artifact)!r})) as model: model.predict(['a lovely film'])\n"
    )
    loaded = loaded_by(statement)
    assert not loaded.intersection(FORBIDDEN)
    assert "onnxruntime" in loaded
