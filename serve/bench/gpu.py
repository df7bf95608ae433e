"""What an NVIDIA GPU tells of itself: name, clocks, memory in use, and the energy that it has taken so far.

Read through NVML, the library that comes with every driver (the package nvidia-ml-py wraps the same one), or through
the tool nvidia-smi where that library is not found. It is the whole GPU's: what other programs do on it counts too.
"""

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from pst.nvidia_smi import query

LIBRARY = "libnvidia-ml.so.1"
SM_CLOCK = 1
"""NVML_CLOCK_SM of nvmlClockType_t."""
ENERGY_S = 1.0
"""Least seconds between the first and the last reading of energy: the counter moves every 20 to 100 ms."""
ENERGY_MOST_S = 5.0
READ_EVERY_S = 0.005
LOOKS, BETWEEN_LOOKS_S = 4, 0.4
"""At how busy a GPU is: together longer than the second that a driver's reading may be of."""
BUSY = 5
"""Per cent from which on other programs count."""


class Gpu(Protocol):
    """The GPU that a process uses first. Each reading is None where it cannot be had."""

    source: str
    """What is asked: NVML or nvidia-smi."""

    def memory_bytes(self) -> int | None:
        """In use, by whatever program."""
        ...

    def energy_mj(self) -> int | None:
        """Millijoules since the driver was loaded."""
        ...

    def clock_mhz(self) -> int | None:
        """Of the multiprocessors, now."""
        ...

    def busy(self) -> int | None:
        """Per cent of the last moments, a second at most, in which a kernel of whatever program ran."""
        ...


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Utilization(ctypes.Structure):
    """nvmlUtilization_t."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Nvml:
    """The functions of NVML that are needed here. Raises OSError without the library, or without a GPU."""

    source = "NVML"

    def __init__(self, identifier: str) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._device = ctypes.c_void_p()
        if self._library.nvmlInit_v2():
            raise OSError(f"{LIBRARY} does not start")
        place = ctypes.byref(self._device)
        if identifier.isdigit():
            failed = self._library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(identifier)), place)
        else:
            failed = self._library.nvmlDeviceGetHandleByUUID(identifier.encode(), place)
        if failed:
            raise OSError(f"{LIBRARY} knows no GPU {identifier}")

    def memory_bytes(self) -> int | None:
        """nvmlDeviceGetMemoryInfo."""
        found = self._read("nvmlDeviceGetMemoryInfo", _Memory())
        return None if found is None else int(found.used)

    def energy_mj(self) -> int | None:
        """nvmlDeviceGetTotalEnergyConsumption; from Volta on."""
        found = self._read("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong())
        return None if found is None else int(found.value)

    def clock_mhz(self) -> int | None:
        """nvmlDeviceGetClockInfo."""
        found = self._read("nvmlDeviceGetClockInfo", ctypes.c_uint(), ctypes.c_int(SM_CLOCK))
        return None if found is None else int(found.value)

    def busy(self) -> int | None:
        """nvmlDeviceGetUtilizationRates."""
        found = self._read("nvmlDeviceGetUtilizationRates", _Utilization())
        return None if found is None else int(found.gpu)

    def _read(self, function: str, result: Any, *arguments: Any) -> Any:
        """*result*, filled; None where the driver lacks the function or refuses it for this GPU."""
        call = getattr(self._library, function, None)
        return None if call is None or call(self._device, *arguments, ctypes.byref(result)) else result


class Smi:
    """The same from nvidia-smi, which does not tell energy."""

    source = "nvidia-smi"

    def __init__(self, identifier: str) -> None:
        self._identifier = identifier
        if self.memory_bytes() is None:
            raise OSError("nvidia-smi tells nothing")

    def memory_bytes(self) -> int | None:
        """memory.used, to the MiB."""
        found = self._read("memory.used")
        return None if found is None else found * 2**20

    def energy_mj(self) -> int | None:
        """Never."""
        return None

    def clock_mhz(self) -> int | None:
        """clocks.sm."""
        return self._read("clocks.sm")

    def busy(self) -> int | None:
        """utilization.gpu."""
        return self._read("utilization.gpu")

    def _read(self, field: str) -> int | None:
        lines = query(field, "--format=csv,noheader,nounits", "-i", self._identifier)
        return int(lines[0]) if lines and lines[0].isdigit() else None


def open_gpu() -> Gpu | None:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, in the order of the bus; None without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    identifier = "0" if visible is None else visible.split(",")[0].strip()
    if identifier in ("", "-1"):
        return None
    for kind in (Nvml, Smi):
        try:
            return kind(identifier)
        except (OSError, AttributeError):
            continue
    return None


def others_busy(gpu: Gpu | None, *, sleep: Callable[[float], object] = time.sleep) -> int | None:
    """Per cent of the time in which other programs kept *gpu* busy: the least of some readings over a second.

    This process must start nothing on it meanwhile; what it did before has left the readings by the last of them.
    """
    if gpu is None:
        return None
    least = gpu.busy()
    for _ in range(LOOKS - 1):
        if not least:
            break
        sleep(BETWEEN_LOOKS_S)
        value = gpu.busy()
        least = value and min(least, value)
    return least


def busy_note(before: int | None, after: int | None) -> str | None:
    """A sentence about other programs on the GPU before and after a measurement, where there were any."""
    most = max(before or 0, after or 0)
    if most < BUSY:
        return None
    return (
        f"Other programs kept the GPU busy for {most}% of the time right before or after the measurement, so that "
        "times are longer and scatter; stop them, and measure again."
    )


def gpus() -> list[str]:
    """``name, memory, driver`` of every NVIDIA GPU that nvidia-smi lists; empty without one."""
    return query("name,memory.total,driver_version", "--format=csv,noheader")


def gpu_clocks() -> list[str]:
    """Clocks of each of them: now, at rest as a rule, and the highest; and the limit of its power."""
    found = []
    for line in query("clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit", "--format=csv,noheader"):
        now, most, memory, most_memory, power = (*map(str.strip, line.split(",")), *[""] * 5)[:5]
        found.append(f"SM {now} of {most}, memory {memory} of {most_memory}, power limit {power}")
    return found


@dataclass(frozen=True, kw_only=True)
class Energy:
    """What one inference took, the GPU's idle power included, as the mean of many in a row."""

    mj_per_inference: float
    inferences: int
    seconds: float
    clock_mhz: int | None
    """Of the multiprocessors, right after them."""

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.mj_per_inference * self.inferences / self.seconds / 1000

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "watts": self.watts}


def measure_energy(
    gpu: Gpu, call: Callable[[int], object], *, clock: Callable[[], float] = time.perf_counter
) -> Energy | None:
    """Repeat *call* for a second or more, from one step of the GPU's counter to another; None where it makes none.

    *call* gets the number of the inference and must return when that is done.
    """
    value = gpu.energy_mj()
    if value is None:
        return None
    begin, index = clock(), 0
    first: tuple[int, float, int] | None = None
    while clock() - begin < ENERGY_MOST_S:
        until = clock() + READ_EVERY_S
        while True:
            call(index)
            index += 1
            if clock() >= until:
                break
        now = gpu.energy_mj()
        if now is None:
            return None
        if now == value:
            continue
        value, at = now, clock()
        if first is None:
            first = value, at, index
        elif at - first[1] >= ENERGY_S:
            count, seconds = index - first[2], at - first[1]
            return Energy(
                mj_per_inference=(value - first[0]) / count,
                inferences=count,
                seconds=seconds,
                clock_mhz=gpu.clock_mhz(),
            )
    return None
