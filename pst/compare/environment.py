"""The machine and the software that a comparison ran on."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def environment(*, command: str, jobs: int) -> dict[str, Any]:
    """JSON values: hardware, versions, the command, the time in UTC. Imports torch."""
    import torch

    from pst.result import versions
    from pst.revision import git_revision

    gpus = range(torch.cuda.device_count())
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "cpu": _cpu(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "os": platform.platform(),
        "jobs": jobs,
        "versions": versions() | ({"cuda": torch.version.cuda} if gpus and torch.version.cuda else {}),
        "git_revision": git_revision(),
    }


def _cpu() -> str:
    """The processor's name as it gives it itself, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
