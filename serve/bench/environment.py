"""The machine and the software that a number was measured with."""

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve.bench.gpu import gpu_clocks, gpus
from serve.engines import available_cpus

PACKAGES = (
    "sparse-pst", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tokenizers", "torch",
    "transformers",
)  # fmt: skip


def _field(file: str, *names: str) -> str | None:
    """The value of the first ``name : value`` line of a /proc file; None where there is no such file or line."""
    try:
        lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return None


def cpu_model() -> str:
    """The CPU's name as it gives it itself; its architecture where it gives none."""
    return _field("/proc/cpuinfo", "model name", "Hardware", "Model") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Names of what the CPU can do, as the system lists them; empty where it does not."""
    return (_field("/proc/cpuinfo", "flags", "Features") or "").split()


def memory_gib() -> float | None:
    """Main memory in GiB; None where the system does not tell."""
    value = _field("/proc/meminfo", "MemTotal")
    return round(int(value.split()[0]) / 2**20, 1) if value else None


def versions() -> dict[str, str]:
    """Installed versions of what can change a number."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(*, command: str, threads: int) -> dict[str, Any]:
    """Everything above as JSON values, with the time in UTC and the load before the measurement."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "cpu": cpu_model(),
        "cpu_features": [flag for flag in cpu_flags() if flag.startswith(("avx", "amx", "fma", "asimd", "sve"))],
        "cpus_usable": available_cpus(),
        "cpus_total": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_gib": memory_gib(),
        "os": platform.platform(),
        "gpus": gpus(),
        "gpu_clocks": gpu_clocks(),
        "threads": threads,
        "versions": versions(),
    }
