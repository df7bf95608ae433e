"""NVIDIA's trtexec on a plan that our engine built: what is asked of it, and what it says.

Its "Latency" is the sum of three times that events on the GPU tell: copies in, kernels, copies out. What the host adds
is not in it: filling pinned memory, launching, and waiting. With --exposeDMA one inference ends before the next one
begins, so that the wall-clock time of all of them over their number, the inverse of its "Throughput", has launching
and waiting in it as well. Formats: printPerformanceReport in samples/common/sampleReporting.cpp of
github.com/NVIDIA/TensorRT.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from serve.engines import Array

NAME = "trtexec"
PLACES = ("/usr/src/tensorrt/bin", "/opt/tensorrt/bin")
"""Where Debian packages and NVIDIA's containers put it."""
INSTALL = (
    "install TensorRT's archive or its package libnvinfer-bin, and put its folder bin on PATH (pip does not bring it)"
)
WARMUP_MS = 200
_METRIC = re.compile(r"\[I\] (Latency|GPU Compute Time|H2D Latency|D2H Latency|Enqueue Time): (.+)")
_VALUE = re.compile(r"(min|max|mean|median) = ([\d.e+-]+) ms")
_THROUGHPUT = re.compile(r"\[I\] Throughput: ([\d.e+-]+) qps")


def find() -> Path | None:
    """The program; None where it is not installed."""
    found = shutil.which(NAME) or next((each for each in map(shutil.which, _places()) if each), None)
    return Path(found) if found else None


def _places() -> list[str]:
    return [f"{place}/{NAME}" for place in PLACES]


def command(program: Path, plan: Path, feeds: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]], *,
            profile: int, runs: int) -> list[str]:  # fmt: skip
    """*runs* inferences, one after the other, of *feeds*: files of each input's numbers, in the plan's own types."""
    sizes = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
    files = ",".join(f"{name}:{file}" for name, file in feeds.items())
    return [
        str(program), f"--loadEngine={plan}", f"--shapes={sizes}", f"--loadInputs={files}", "--useCudaGraph",
        "--useSpinWait", "--exposeDMA", f"--warmUp={WARMUP_MS}", "--duration=0", f"--iterations={runs}",
        *([f"--useProfile={profile}"] if profile else []),
    ]  # fmt: skip


def parse(text: str) -> dict[str, dict[str, float]]:
    """Milliseconds by metric and statistic, as trtexec prints them; the wall-clock time of one inference as "wall".

    Raises ValueError where the summary is not there.
    """
    found = {
        name: {statistic: float(value) for statistic, value in _VALUE.findall(values)}
        for name, values in _METRIC.findall(text)
    }
    throughput = _THROUGHPUT.search(text)
    if "Latency" not in found or throughput is None:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "it says nothing")
        raise ValueError(f"trtexec printed no performance summary: {last}")
    wall = 1000 / float(throughput[1])
    return found | {"wall": {"min": wall, "mean": wall, "median": wall}}


def measure(program: Path, plan: Path, feeds: Mapping[str, Array], *, profile: int, runs: int,
            folder: Path) -> dict[str, dict[str, float]]:  # fmt: skip
    """What it says of *runs* inferences; files for it go to *folder*. Raises ValueError where it fails."""
    files = {name: folder / f"{name}.bin" for name in feeds}
    for name, array in feeds.items():
        array.tofile(files[name])
    shapes = {name: array.shape for name, array in feeds.items()}
    done = subprocess.run(
        command(program, plan, files, shapes, profile=profile, runs=runs), capture_output=True, text=True, check=False
    )
    return parse(done.stdout + done.stderr)
