"""``--help`` is quick, whole and what docs/cli.md says; the set of flags changes only on purpose."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import cli

from .command_line import ROOT, environment

FLAGS = {
    "predict": "--model --pattern --sparsity --shapes --engine --threads --precision --budget --json",
    "train": "--output -o --model --data --method --pattern --sparsity --plan --teacher --epochs --steps --seed "
    "--faithful --config --set --list-options --resume --overwrite",
    "compare": "--model --data --output -o --methods --patterns --sparsities --seeds --from-dense --teacher-from-dense "
    "--jobs --set --overwrite",
    "prune": "source --output -o --pattern --sparsity --plan --method --compensate --data --set --rows --max-length "
    "--budget --overwrite",
    "export": "source --output -o --format --task --opset --precision --residual --linear-form --activations --storage "
    "--data --set --profile --compute-capability --atol --rtol --external-data --overwrite",
    "eval": "path --data --set --engine --batch-size --threads --predictions --json",
    "bench": "artifacts --output -o --shapes --runs --warmup --precision --budget --threads --engine --new-tokens "
    "--spanned --data --set --openings --receipt --no-receipt --tune --traffic --overwrite",
    "report": "first second --json",
    "inspect": "path --json",
    "serve": "artifact --host --port --threads --engine --max-batch-size --max-queue-delay-ms --max-queue-size",
    "quickstart": "--output -o --fresh --sparsity --steps",
}
"""What each command takes. A flag that goes, or changes its name, breaks somebody's script: add, do not change."""
HEAVY = {"torch", "transformers", "datasets", "onnx", "onnxruntime", "onnxscript", "numpy", "rich", "starlette"}
HEAVY |= {"uvicorn", "tokenizers", "yaml", "pandas"}
COMMANDS = dict(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]


def generator() -> ModuleType:
    """docs/generate_cli.py, which is no package's module."""
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def help_in_a_fresh_process(*arguments: str) -> tuple[str, set[str]]:
    """What ``pst ARGUMENTS --help`` prints, and the packages it loads."""
    code = (
        "import sys, cli\n"
        f"sys.argv = ['pst', *{arguments!r}, '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        "print(*sorted(name for name in sys.modules if '.' not in name), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment(COLUMNS="110"), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, set(ran.stderr.split())


@pytest.mark.parametrize("name", FLAGS)
def test_help_is_whole_and_loads_nothing_heavy(name: str) -> None:
    text, loaded = help_in_a_fresh_process(name)
    assert f"Usage: pst {name} " in text
    for flag in FLAGS[name].split():
        assert flag in text
    assert "Example: pst " + name in text
    assert loaded & HEAVY == set()


def test_help_of_the_program_names_every_command() -> None:
    text, loaded = help_in_a_fresh_process()
    for name, command in COMMANDS.items():
        assert f"  {name} " in text
        assert command.short_help in text, "the one line of a command is cut off"
    assert loaded & HEAVY == set()


def test_flags_are_those_that_were_agreed() -> None:
    assert {name: parameters(command) for name, command in COMMANDS.items()} == {
        name: flags.split() for name, flags in FLAGS.items()
    }


def parameters(command: Any) -> list[str]:
    return [flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)]


@pytest.mark.parametrize("name", FLAGS)
def test_every_option_has_a_help_text(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        assert parameter.help, parameter.opts
        assert parameter.help.endswith("."), parameter.help
        assert not parameter.hidden


def test_every_setting_has_a_help_text() -> None:
    from pst.config import TrainConfig
    from pst.settings import describe

    assert [row.key for row in describe(TrainConfig) if not row.help] == []


def test_the_keys_of_reading_data_are_named_in_help() -> None:
    from pst.data import DataSpec

    (option,) = (parameter for parameter in COMMANDS["eval"].params if "--set" in parameter.opts)
    for key in inspect.signature(DataSpec).parameters.keys() - {"data"}:
        assert key in option.help


def test_train_has_a_flag_for_nothing_that_is_no_setting() -> None:
    from pst.config import TrainConfig

    of_the_run = {"output", "config", "sets", "list_options", "resume", "overwrite"}
    known = set(inspect.signature(TrainConfig).parameters)
    assert {parameter.name for parameter in COMMANDS["train"].params} - of_the_run <= known


def test_the_reference_is_what_the_help_texts_say() -> None:
    written = Path(ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == generator().reference(), "run: python docs/generate_cli.py"
