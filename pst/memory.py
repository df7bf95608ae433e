"""The most memory that a run has held."""

from pathlib import Path

import torch


def reset_peak(device: torch.device) -> None:
    """Start counting anew. On the processor, Linux alone can; elsewhere the peak is the process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    except OSError:
        return


def peak(device: torch.device) -> int | None:
    """Bytes: of a GPU, the tensors at their most; of a processor, the whole process. None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
