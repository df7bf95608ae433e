"""Writes docs/cli.md, the reference of every command, from the help texts: python docs/generate_cli.py"""

import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
from pst.config import TrainConfig  # noqa: E402
from pst.settings import describe  # noqa: E402

HEAD = """# Commands

Made by `python docs/generate_cli.py` from the help texts; change those, not this file.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 something the user can mend (one sentence on
stderr says what and how), 130 interrupted."""


def reference() -> str:
    """The whole text of docs/cli.md."""
    program: Any = typer.main.get_command(cli.app)
    parts = [HEAD, *(section(name, command) for name, command in program.commands.items()), settings()]
    return "\n\n".join(parts) + "\n"


def section(name: str, command: Any) -> str:
    """One command: what it does, an example, its arguments and options."""
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    shown = [f"{parameter.name.upper()}{'...' if parameter.nargs == -1 else ''}" for parameter in arguments]
    usage = " ".join(["pst", name, *shown, "[OPTIONS]"])
    example = command.epilog.removeprefix("Example: ")
    parts = [f"## pst {name}", f"    {usage}", inspect.cleandoc(command.help), f"Example: `{example}`"]
    if arguments:
        rows = ((f"`{text}`", parameter.help) for text, parameter in zip(shown, arguments, strict=True))
        parts.append(table(("Argument", "Meaning"), rows))
    parts.append(table(("Option", "Default", "Meaning"), map(row, options)))
    return "\n\n".join(parts)


def row(option: Any) -> tuple[str, str, str]:
    """The cells of one option."""
    names = ", ".join(f"`{name}`" for name in option.opts)
    shown = "" if option.default in (None, False) else f"`{option.default}`"
    default = "required" if option.required else shown
    return names, default, option.help


def settings() -> str:
    """What --set and --config of pst train take."""
    rows = [
        (f"`{item.key}`", item.type, f"`{item.default}`" if item.default else "", item.help)
        for item in describe(TrainConfig)
    ]
    return "## Settings of pst train\n\nFor `--set KEY=VALUE` and the YAML file of `--config`.\n\n" + table(
        ("Key", "Takes", "Default", "Meaning"), rows
    )


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(re.sub(r"([|*<])", r"\\\1", cell) for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    (ROOT / "docs" / "cli.md").write_text(reference(), encoding="utf-8")
