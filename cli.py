"""The command line: parses, calls one function, prints. The commands are in pst, export and serve, a commands.py each.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 2 something the user can mend, 130 interrupted.
"""

import io
import sys
from typing import Annotated

import typer

import export.commands
import pst.commands
import serve.commands
from pst import __version__
from pst.command_line import show
from pst.errors import PSTError

ORDER = ("predict", "train", "compare", "prune", "export", "eval", "bench", "report", "inspect", "serve", "quickstart")
"""Of the commands in ``pst --help``: as a model goes from the first to the last."""

app = typer.Typer(
    name="pst",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Sparse transformers from training to serving: learn masks by PST, export 2:4 or unstructured sparse ONNX, "
    "measure honestly, serve. Start with: pst quickstart",
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        show(__version__)
        raise typer.Exit


def _register() -> None:
    """Give *app* the commands of every part."""
    found = {}
    for part in (pst.commands.app, export.commands.app, serve.commands.app):
        for command in part.registered_commands:
            assert command.callback is not None
            found[command.name or command.callback.__name__] = command
    app.registered_commands += [found[name] for name in sorted(found, key=ORDER.index)]


_register()


def main() -> None:
    """Entry point of ``pst``: user errors become one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 still gets its table
    try:
        app(prog_name="pst")
    except PSTError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
