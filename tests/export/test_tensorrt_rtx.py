"""TensorRT-RTX, which builds plans without a GPU, reads what is exported and accepts 2:4 weights."""

from pathlib import Path
from typing import Any

import pytest

from .conftest import Artifact

trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")


def build_plan(model: Path, *, sparse: bool, max_batch: int, max_length: int) -> bytes:
    """Parse *model* and build a serialized plan, without a GPU, for Ampere (SM 8.0), the first with 2:4 hardware."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.messages.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(str(model))
    assert parsed, [parser.get_error(index).desc() for index in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        assert config.get_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        shapes = (1, 1), (max_batch, max_length // 2), (max_batch, max_length)
        profile.set_shape(network.get_input(index).name, *shapes)
    assert config.add_optimization_profile(profile) == 0
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, log.messages
    assert log.messages == []
    return bytes(plan)


def test_two_four_artifact_builds_a_plan_with_sparse_weights(artifact: Artifact) -> None:
    plan = build_plan(artifact("2:4", 0.5) / "model.onnx", sparse=True, max_batch=8, max_length=64)
    assert len(plan) > 10_000
