"""The kernels of sparse_cpu as a library for this processor: compiled once, where it is first needed, and kept.

It lies in ``$XDG_CACHE_HOME/sparse-pst``, under a digest of its source, the compiler's version and what the processor
can do, since it may hold instructions that others do not have: a home folder may be several machines'.
"""

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from pst.errors import EngineError
from pst.files import atomic_file, cache_folder
from serve.bench.environment import cpu_flags, cpu_model

SOURCE = Path(__file__).parent / "sparse_cpu" / "sparse_linear.c"
COMPILERS = ("cc", "gcc", "clang")
OPTIONS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-w")
NATIVE = (("-march=native",), ("-mcpu=native",), ())
"""For this very processor: as x86 compilers take it, as those for Arm do, and not at all."""


@functools.cache
def sparse_library() -> Path:
    """The compiled library. Raises EngineError where there is no C compiler, or where it fails."""
    compiler = _compiler()
    version = _run([*compiler, "--version"]).stdout
    sources = [file.read_text(encoding="utf-8") for file in sorted(SOURCE.parent.glob("*.[ch]"))]
    processor = [cpu_model(), platform.machine(), *sorted(cpu_flags())]
    known = "\n".join([*sources, *compiler, version, *processor, *OPTIONS])
    target = cache_folder() / "sparse-cpu" / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory() as folder:
        made, said = Path(folder) / "library.so", ""
        for native in NATIVE:
            done = _run([*compiler, *OPTIONS, *native, str(SOURCE), "-o", str(made)])
            if done.returncode == 0:
                with atomic_file(target) as partial:
                    shutil.copyfile(made, partial)
                return target
            said = said or (done.stderr.strip().splitlines() or ["no reason given"])[0]
    raise EngineError(
        f"{shlex.join(compiler)} cannot compile the sparse kernels ({said}); choose the engine onnxruntime."
    )


def _compiler() -> list[str]:
    """The command of $CC, else of the first compiler that is installed."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    if found is None:
        raise EngineError(
            "The sparse kernels are compiled for this processor, and there is no C compiler; install one (on Debian "
            "and Ubuntu: apt-get install gcc libc6-dev), or choose the engine onnxruntime."
        )
    return [found]


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(
            f"The C compiler {command[0]} does not run ({error}); set CC to one that does, or choose the engine "
            "onnxruntime."
        ) from error
