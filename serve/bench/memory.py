"""How much memory an artifact takes, of the host and of the GPU, as far as one process that holds several can tell.

Each artifact is loaded by itself, and warms up by itself at each shape; what this process grows by in the meantime is
its own. Two things blur that. Memory that another artifact gave back to the allocator is used again without growth. And
whoever comes first also pays for the runtime's libraries. Both are small beside a model's weights; an artifact measured
alone has neither. Linux alone tells (/proc/self/status: VmRSS and VmHWM, the peak, which /proc/self/clear_refs resets).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.bench.gpu import Gpu

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one artifact, in bytes. None where it cannot be told."""

    host_loaded: int | None
    """What the process grew by while it was loaded."""
    host_peak: int | None
    """The most that it grew by, while it was loaded or at one of its first inferences."""
    device: int | None
    """What the GPU's memory in use grew by, loading and first inferences together."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


class MemoryWatch:
    """Adds up what belongs to each artifact."""

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu
        self._loaded: dict[str, int | None] = {}
        self._host: dict[str, int | None] = {}
        self._peak: dict[str, int | None] = {}
        self._device: dict[str, int | None] = {}
        self.process_peak: int | None = None
        """The most bytes that the whole process held while any artifact was loaded or warmed up."""

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """What grows within is *name*'s: first its loading, then its warm-ups."""
        can_reset = _reset_peak()
        before, device_before = _read("VmRSS"), self._device_bytes()
        yield
        after, peak, device_after = _read("VmRSS"), _read("VmHWM") if can_reset else None, self._device_bytes()
        start = self._host.get(name, 0)
        self._host[name] = _sum(start, _difference(after, before))
        self._loaded.setdefault(name, self._host[name])
        known = [each for each in (self._peak.get(name), _sum(start, _difference(peak, before))) if each is not None]
        self._peak[name] = max(known, default=None)
        self._device[name] = _sum(self._device.get(name, 0), _difference(device_after, device_before))
        self.process_peak = max((each for each in (self.process_peak, peak) if each is not None), default=None)

    def found(self, name: str) -> Memory:
        """What *name* has taken so far."""
        host, peak, device = self._loaded.get(name), self._peak.get(name), self._device.get(name)
        return Memory(
            host_loaded=None if host is None else max(0, host),
            host_peak=None if peak is None else max(0, peak),
            device=None if device is None else max(0, device),
        )

    def _device_bytes(self) -> int | None:
        return None if self._gpu is None else self._gpu.memory_bytes()


def _read(field: str) -> int | None:
    """A field of this process's status, in bytes."""
    try:
        text = STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def _reset_peak() -> bool:
    """Make VmHWM count from now on; False where that is not allowed."""
    try:
        RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _difference(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other
