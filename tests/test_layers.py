"""The arrows between the folders: cli -> serve -> export.manifest, export -> pst, and leaves that all may import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("pst", "export", "serve")
HEAVY = {"torch", "transformers"}
LEAVES = (
    "pst.command_line",
    "pst.errors",
    "pst.files",
    "pst.nvidia_smi",
    "pst.progress",
    "pst.revision",
    "pst.tables",
    "pst.data",
    "pst.documents",
    "pst.markdown",
    "pst.metrics",
    "pst.models",
    "pst.patterns",
    "pst.settings",
)
PLANS = "export.targets.tensorrt"
ALLOWED = {
    "pst": ("pst",),
    "export": ("export", "pst"),
    "serve": ("serve", "export.manifest", PLANS, "pst.__version__", *LEAVES),
    "serve.engines.torch": ("serve", "pst.structured", "pst.sparsify", *LEAVES),
    "export.manifest": ("export.manifest", "pst.__version__", *LEAVES),
    PLANS: (PLANS, "export.manifest", "pst.__version__", *LEAVES),
}
TORCH_IN_SERVE = ("serve.engines.torch", "serve.engines._torch_products")


def modules() -> Iterator[tuple[str, Path]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def is_import_call(node: ast.AST) -> TypeGuard[ast.Call]:
    if not isinstance(node, ast.Call) or not node.args:
        return False
    return ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}


def imports(tree: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Dotted names that run-time code imports; ``from a import b`` gives "a.b", which names a module or not."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports alone, so that they can be read and searched"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif is_import_call(node) and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value)
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, inside_functions=inside_functions)


def names(path: Path, *, inside_functions: bool) -> list[str]:
    return list(imports(ast.parse(path.read_text(encoding="utf-8")), inside_functions=inside_functions))


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)


def heavy(imported: list[str]) -> list[str]:
    return [name for name in imported if name.split(".")[0] in HEAVY]


MODULES = list(modules())
IDS = [module for module, _ in MODULES]


@pytest.mark.parametrize(("module", "path"), MODULES, ids=IDS)
def test_imports_follow_the_arrows(module: str, path: Path) -> None:
    allowed = ALLOWED.get(module, ALLOWED[module.split(".")[0]])
    ours = [name for name in names(path, inside_functions=True) if name.split(".")[0] in (*FOLDERS, "cli")]
    assert [name for name in ours if not within(name, allowed)] == []


@pytest.mark.parametrize(
    ("module", "path"), [m for m in MODULES if within(m[0], ("serve", PLANS)) and m[0] not in TORCH_IN_SERVE]
)
def test_serving_never_imports_torch(module: str, path: Path) -> None:
    assert heavy(names(path, inside_functions=True)) == []


@pytest.mark.parametrize(("module", "path"), [m for m in MODULES if within(m[0], (*LEAVES, "export.manifest"))])
def test_leaves_import_only_leaves_and_nothing_heavy(module: str, path: Path) -> None:
    """Inside functions a leaf may use torch, and its own private modules (``_name.py``), which may import it."""
    at_import = names(path, inside_functions=module == "export.manifest")
    ours = [name for name in at_import if name.split(".")[0] in FOLDERS]
    assert [name for name in ours if not within(name, ALLOWED["export.manifest"])] == []
    if "._" not in module:
        assert heavy(at_import) == []
        assert [name for name in ours if "._" in name] == []


def test_the_reader_of_imports_sees_them_all() -> None:
    code = """
import a.b
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import never
def f():
    from c import d
    importlib.import_module("e")
class C:
    import g
"""
    assert list(imports(ast.parse(code), inside_functions=True)) == ["a.b", "typing.TYPE_CHECKING", "c.d", "e", "g"]
    assert list(imports(ast.parse(code), inside_functions=False)) == ["a.b", "typing.TYPE_CHECKING", "g"]


@pytest.mark.parametrize(
    "module",
    ["cli", "serve", "serve.http", "serve.bench", "serve.tune", "serve.engines", "export.manifest", PLANS, *LEAVES],
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    if module == "cli" and not (ROOT / "cli.py").is_file():
        pytest.skip("cli.py is not there")
    assert loaded(f"import {module}") == "[]"


def test_help_loads_nothing_heavy() -> None:
    if not (ROOT / "cli.py").is_file():
        pytest.skip("cli.py is not there")
    code = (
        "sys.argv = ['pst', '--help']\ntry:\n    runpy.run_module('cli', run_name='__main__')\nexcept SystemExit: pass"
    )
    assert loaded(f"import runpy\n{code}") == "[]"


def loaded(code: str) -> str:
    """The heavy packages that *code* leaves in a fresh interpreter, as the last line that it prints."""
    packages = {*HEAVY, "datasets", "onnx", "onnxruntime", "onnxscript", "tensorrt", "tensorrt_rtx"}
    program = f"import sys\n{code}\nprint(sorted({packages} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]
