"""The machine's description."""

import json
import os

from serve.bench.environment import environment
from serve.engines import available_cpus


def test_environment_is_json_with_what_a_reader_needs() -> None:
    machine = environment(command="pst bench x", threads=2)
    assert json.loads(json.dumps(machine)) == machine
    assert {"time", "command", "cpu", "memory_gib", "os", "gpus", "gpu_clocks", "threads", "versions"} <= set(machine)
    assert machine["versions"]["numpy"]
    assert 1 <= machine["cpus_usable"] == available_cpus() <= (os.cpu_count() or 1)
