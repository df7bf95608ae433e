"""Every kernel compiles to machine code, also where no GPU could run it; the interpreter would not notice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("capability", ["80", "90"])  # A100, H100
def test_every_kernel_compiles(capability: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.pst.kernels.compile_all", capability]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 35
    assert all(line.startswith(f"sm_{capability} ") and int(line.split()[-2]) > 0 for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, on which they work")
def test_where_kernels_cannot_run_they_are_not_used_and_that_is_said_once() -> None:
    code = "import torch; from pst.kernels import works; print(*[works(torch.device('cpu')) for _ in range(2)])"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False False\n"
    assert done.stderr.count("Triton's kernels cannot be used here") == 1
