"""Every kernel compiles to machine code, also where no GPU could run it; the interpreter would not notice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("capability", ["80", "90"])  # A100, H100
def test_every_kernel_compiles(capability: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.pst.kernels.compile_all", capability]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 33
    assert all(line.startswith(f"sm_{capability} ") and int(line.split()[-2]) > 0 for line in lines)
