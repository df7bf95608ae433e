"""Which revision of this code runs."""

import subprocess
from pathlib import Path


def git_revision() -> str | None:
    """The commit this code is checked out at, or None outside a checkout, in somebody else's repository too."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
