"""Where a run computes."""

import torch

from pst.distributed import Processes
from pst.errors import ConfigError


def named_device(name: str, group: Processes) -> torch.device:
    """The device that *name* (auto, cpu, cuda, cuda:N) means for this process; a GPU with its index.

    Raises ConfigError for a name that means none here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and group.count > 1:
        name = f"cuda:{group.local_rank}"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no GPU here; use --set device=auto, or cpu.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; use auto, cpu, cuda, or cuda:N.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but the GPUs here are numbered 0 to {torch.cuda.device_count() - 1}.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # as torch.cuda.set_device wants it
    return device
