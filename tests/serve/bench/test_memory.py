"""Memory by artifact: real allocations, in a process that has not allocated and freed before."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from serve.bench import memory
from serve.bench.memory import Memory, MemoryWatch

MIB = 2**20
linux = pytest.mark.skipif(not memory.STATUS.is_file(), reason="needs Linux: /proc/self/status")


class Device:
    """A GPU whose memory in use is set by the test."""

    source = "test"
    used = 100 * MIB

    def memory_bytes(self) -> int | None:
        return self.used

    def energy_mj(self) -> int | None:
        return None

    def clock_mhz(self) -> int | None:
        return None

    def busy(self) -> int | None:
        return None


def allocate() -> tuple[Memory, Memory, int | None, bool]:
    """Of the artifacts a and b; the process's peak, and whether the system lets it be set back."""
    watch = MemoryWatch(device := Device())
    kept = []
    with watch.of("a"):
        kept.append(np.ones(64 * MIB, dtype=np.uint8))
        device.used += 10 * MIB
    kept.append(np.ones(100 * MIB, dtype=np.uint8))  # nobody's
    with watch.of("b"):
        kept.append(np.ones(32 * MIB, dtype=np.uint8))
    with watch.of("a"):
        passing = np.ones(128 * MIB, dtype=np.uint8)
        del passing
        device.used += 5 * MIB
    return watch.found("a"), watch.found("b"), watch.process_peak, memory._reset_peak()


@linux
def test_each_artifact_gets_what_grew_in_its_own_time() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        a, b, peak, can_reset = pool.apply(allocate)
    assert a.host_loaded == pytest.approx(64 * MIB, rel=0.1)
    assert b.host_loaded == b.host_peak == pytest.approx(32 * MIB, rel=0.2)
    assert (a.device, b.device) == (15 * MIB, 0)
    if can_reset:
        assert a.host_peak == pytest.approx(192 * MIB, rel=0.1)
        assert peak is not None
        assert peak > 324 * MIB


def test_what_the_system_does_not_tell_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "nowhere")
    monkeypatch.setattr(memory, "RESET", tmp_path / "nowhere" / "either")
    watch = MemoryWatch(None)
    with watch.of("a"):
        pass
    assert watch.found("a") == Memory(host_loaded=None, host_peak=None, device=None)
    assert watch.process_peak is None


def allocate_without_a_peak(nowhere: Path) -> Memory:
    memory.RESET = nowhere
    watch = MemoryWatch(None)
    with watch.of("a"):
        kept = np.ones(32 * MIB, dtype=np.uint8)
    assert kept.all()
    return watch.found("a")


@linux
def test_without_a_peak_the_rest_is_there(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(allocate_without_a_peak, (tmp_path / "nowhere" / "either",))
    assert found.host_loaded == pytest.approx(32 * MIB, rel=0.2)
    assert (found.host_peak, found.device) == (None, None)
