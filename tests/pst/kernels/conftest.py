"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter, which runs the same code in numpy."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
