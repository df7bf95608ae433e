"""Seconds that ``--help`` of each command takes, beside an interpreter that does nothing; the goal is below 0.3 s.

    python benchmarks/help_latency.py [RUNS]

Prints the median and the slowest of RUNS (5) processes each, started one after the other, and the machine.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("train", "export", "eval", "bench", "inspect", "serve", "quickstart")


def seconds(arguments: list[str]) -> float:
    """Wall-clock time of one process, from its start to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    rows = {"python -c pass": ["-c", "pass"], "pst --help": ["-m", "cli", "--help"]}
    rows |= {f"pst {name} --help": ["-m", "cli", name, "--help"] for name in COMMANDS}
    print(f"Python {platform.python_version()}, {os.cpu_count()} logical CPUs, {runs} runs each")
    print(f"{'command':<24} {'median':>8} {'slowest':>8}")
    for label, arguments in rows.items():
        seconds(arguments)  # once without counting, so that the files are in memory
        times = [seconds(arguments) for _ in range(runs)]
        print(f"{label:<24} {statistics.median(times):>6.3f} s {max(times):>6.3f} s")


if __name__ == "__main__":
    main()
