"""Readings of a GPU: a process that stands for nvidia-smi, a library that stands for NVML, and energy by a counter."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serve.bench.gpu import Gpu, Smi, busy_note, gpu_clocks, gpus, measure_energy, open_gpu, others_busy

from ...command_line import environment

COMPILER = shutil.which("cc")
TOOL = """#!/bin/sh
case "$*" in
  *name,memory.total*) echo "NVIDIA Test, 81559 MiB, 580.1" ;;
  *clocks.sm,*) echo "345 MHz, 1980 MHz, 1593 MHz, 2619 MHz, 700.00 W" ;;
  *memory.used*-i\\ 1) echo 1234 ;;
  *memory.used*) echo 512 ;;
  *clocks.sm*) echo "[N/A]" ;;
  *utilization.gpu*) echo 37 ;;
esac
"""
NVML = """
typedef unsigned long long number;
static number energy = 1000;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = &energy; return index == 0 ? 0 : 6; }
int nvmlDeviceGetHandleByUUID(const char *name, void **device) { *device = &energy; return name[4] == 'a' ? 0 : 6; }
int nvmlDeviceGetMemoryInfo(void *device, number *memory) {
  memory[0] = 80; memory[1] = 50; memory[2] = 30; return device != &energy; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, number *value) {
  *value = *(number *)device += 7; return 0; }
int nvmlDeviceGetUtilizationRates(void *device, unsigned *rates) {
  rates[0] = 93; rates[1] = 12; return device != &energy; }
int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *value) { *value = 1980; return kind != 1; }
"""
READ = """
import json
from serve.bench.gpu import open_gpu
gpu = open_gpu()
energies = gpu and [gpu.energy_mj(), gpu.energy_mj()]
print(json.dumps(gpu and [gpu.source, gpu.memory_bytes(), *energies, gpu.clock_mhz(), gpu.busy()]))
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A nvidia-smi on PATH that answers as on a machine with a GPU."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    path = tmp_path / "nvidia-smi"
    path.write_text(TOOL, encoding="utf-8")
    path.chmod(0o755)
    return path


def test_what_nvidia_smi_says(tool: Path) -> None:
    assert gpus() == ["NVIDIA Test, 81559 MiB, 580.1"]
    assert gpu_clocks() == ["SM 345 MHz of 1980 MHz, memory 1593 MHz of 2619 MHz, power limit 700.00 W"]
    gpu = Smi("0")
    assert gpu.memory_bytes() == 512 * 2**20
    assert gpu.clock_mhz() is None
    assert gpu.busy() == 37
    assert measure_energy(gpu, lambda index: None) is None
    assert Smi("1").memory_bytes() == 1234 * 2**20


@pytest.mark.parametrize("content", ["#!/bin/sh\nexit 9\n", "#!/bin/sh\necho broken\n", "no program"])
def test_a_broken_tool_is_no_gpu(tool: Path, content: str) -> None:
    tool.write_text(content, encoding="utf-8")
    assert gpu_clocks() in ([], ["SM broken of , memory  of , power limit "])
    with pytest.raises(OSError, match="tells nothing"):
        Smi("0")


@pytest.mark.parametrize("visible", ["", "-1"])
def test_a_hidden_gpu_is_none(tool: Path, visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert open_gpu() is None


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a library of NVML's name and functions."""
    if COMPILER is None:
        pytest.skip("needs a C compiler: apt-get install gcc")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(NVML, encoding="utf-8")
    command = [COMPILER, "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(folder / "nvml.c")]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0", ["NVML", 30, 1007, 1014, 1980, 93]),
        ("GPU-a1,GPU-b2", ["NVML", 30, 1007, 1014, 1980, 93]),
        ("GPU-b2", None),
        ("3", None),
    ],
)
def test_what_nvml_says(library: Path, visible: str, expected: list[object] | None, tmp_path: Path) -> None:
    """In a process of its own, because the loader reads its path when a process starts. PATH has no nvidia-smi."""
    variables = environment(LD_LIBRARY_PATH=str(library), CUDA_VISIBLE_DEVICES=visible, PATH=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", READ], env=variables, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected


class Simulated:
    """A GPU of 300 W whose counter moves every 100 ms, and a clock that only inferences move."""

    source = "simulated"

    def __init__(self, *, step_s: float = 0.1) -> None:
        self.now, self.step_s = 0.03, step_s

    def memory_bytes(self) -> int | None:
        return None

    def energy_mj(self) -> int | None:
        return int(300_000 * self.step_s * (self.now // self.step_s)) if self.step_s else 42

    def clock_mhz(self) -> int | None:
        return 1500

    def busy(self) -> int | None:
        return None


@pytest.mark.parametrize("milliseconds", [0.2, 3.0, 250.0])
def test_energy_is_power_times_time(milliseconds: float) -> None:
    """However long an inference takes against the counter's step."""
    gpu: Gpu = (simulated := Simulated())
    indices = []

    def call(index: int) -> None:
        indices.append(index)
        simulated.now += milliseconds / 1000

    found = measure_energy(gpu, call, clock=lambda: simulated.now)
    assert found is not None
    assert found.mj_per_inference == pytest.approx(300 * milliseconds, rel=0.1)
    assert found.watts == pytest.approx(300, rel=0.1)
    assert found.seconds >= 1
    assert found.clock_mhz == 1500
    assert found.to_json()["watts"] == found.watts
    assert indices == list(range(len(indices)))


def test_a_counter_that_stands_still_gives_none() -> None:
    simulated = Simulated(step_s=0)

    def call(index: int) -> None:
        simulated.now += 0.05

    assert measure_energy(simulated, call, clock=lambda: simulated.now) is None
    assert simulated.now < 6


class Shared(Simulated):
    """A GPU that tells how busy it was from a list."""

    def __init__(self, *readings: int | None) -> None:
        super().__init__()
        self.readings = list(readings)

    def busy(self) -> int | None:
        return self.readings.pop(0)


@pytest.mark.parametrize(
    ("readings", "expected", "waited"),
    [
        ([0], 0, 0.0),  # nothing to wait for
        ([None], None, 0.0),
        ([80, 30, 0], 0, 0.8),  # what this process did a moment ago is out of the readings then
        ([80, 40, 43, 41], 40, 1.2),
    ],
)
def test_what_other_programs_do_on_a_gpu(readings: list[int | None], expected: int | None, waited: float) -> None:
    slept: list[float] = []
    gpu = Shared(*readings)
    assert others_busy(gpu, sleep=slept.append) == expected
    assert sum(slept) == pytest.approx(waited)
    assert not gpu.readings


def test_without_a_gpu_nobody_is_busy() -> None:
    assert others_busy(None) is None


def test_who_else_was_there_is_said() -> None:
    assert busy_note(None, None) is busy_note(0, 4) is None
    assert "busy for 40% of the time" in (busy_note(40, 0) or "")
    assert "stop them, and measure again" in (busy_note(None, 7) or "")
