"""What nvidia-smi, the tool of NVIDIA's driver, says of GPUs."""

import shutil
import subprocess


def query(fields: str, *options: str) -> list[str]:
    """The lines of ``nvidia-smi --query-gpu``; empty where it is missing, fails or hangs."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={fields}", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
