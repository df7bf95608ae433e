"""TensorRT-RTX's parser, which needs no GPU, as one more reader of what was exported."""

from pathlib import Path
from typing import Any

import pytest


def outputs_that_tensorrt_rtx_reads(model: Path) -> int:
    """How many outputs the parsed graph has. Skips the test without TensorRT-RTX; fails with the parser's words."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)  # which has to live for as long as what it made
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(model)), [parser.get_error(index).desc() for index in range(parser.num_errors)]
    return int(network.num_outputs)
