"""A model folder for Triton Inference Server: config.pbtxt, and version 1 with the artifact in it.

    repository/NAME/config.pbtxt     names, types and shapes, dynamic batching, a warm-up
    repository/NAME/1/model.onnx     and the rest of the artifact: pst inspect, bench and serve open this folder, too

With a plan, model.plan lies beside model.onnx and is what Triton loads. The schema is ModelConfig of
https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from export.manifest import Manifest, TensorInfo
from export.targets.tensorrt import Profile
from pst.errors import ArtifactError, ConfigError

PLATFORMS = {"onnx": "onnxruntime_onnx", "plan": "tensorrt_plan"}
"""Triton's backends by the ending of the file that they load."""
QUEUE_DELAY_MICROSECONDS = 2000
"""Longest that a request waits for others to share a batch with."""
_TYPES = {
    "int64": "TYPE_INT64", "int32": "TYPE_INT32", "bool": "TYPE_BOOL", "float32": "TYPE_FP32", "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
}  # fmt: skip


def check_name(name: str) -> None:
    """Raise ConfigError for a folder that cannot be the name of a model, which is part of the server's addresses."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise ConfigError(
            f"The folder's name, {name!r}, becomes the model's name in Triton; use letters, digits, '_', '-' and '.'."
        )


def model_config(name: str, manifest: Manifest, *, profile: Profile, ending: str = "onnx") -> str:
    """The text of config.pbtxt for a model called *name*; *ending* is onnx or plan.

    Requests are put together up to the largest batch of *profile*, at best to its usual one.
    Raises ArtifactError for an artifact without a batch dimension.
    """
    check_name(name)
    fixed = [tensor.name for tensor in (*manifest.inputs, *manifest.outputs) if tensor.shape[:1] != ("batch_size",)]
    if fixed:
        raise ArtifactError(f"{fixed[0]} has no batch dimension in front; export again, for Triton's batches need one.")
    most = profile.largest[0]
    preferred = sorted({size for size in (profile.usual[0], most) if size > 1})
    lines = [
        f"name: {json.dumps(name)}",
        f"platform: {json.dumps(PLATFORMS[ending])}",
        f"max_batch_size: {most}",
        *_tensors("input", manifest.inputs),
        *_tensors("output", manifest.outputs),
        "dynamic_batching {",
        *(f"  preferred_batch_size: {size}" for size in preferred),
        f"  max_queue_delay_microseconds: {QUEUE_DELAY_MICROSECONDS}",
        "}",
        f"instance_group {{ count: 1 kind: {'KIND_GPU' if ending == 'plan' else 'KIND_AUTO'} }}",
    ]
    if manifest.task != "text_generation":  # whose cache is empty at first, which a warm-up cannot say
        lines += _warmup(manifest.inputs, profile)
    return "\n".join(lines) + "\n"


def _tensors(kind: str, tensors: Sequence[TensorInfo]) -> list[str]:
    lines = []
    for tensor in tensors:
        dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in tensor.shape[1:])
        lines.append(f"{kind} {{ name: {json.dumps(tensor.name)} data_type: {_type(tensor)} dims: [ {dims} ] }}")
    return lines


def _type(tensor: TensorInfo) -> str:
    if tensor.dtype not in _TYPES:
        raise ArtifactError(f"{tensor.name} is of type {tensor.dtype}, which Triton does not have; export again.")
    return _TYPES[tensor.dtype]


def _warmup(inputs: Sequence[TensorInfo], profile: Profile) -> list[str]:
    """One batch of the usual shape before the first request."""
    batch, length = profile.usual
    lines = ["model_warmup {", '  name: "usual"', f"  batch_size: {batch}"]
    for tensor in inputs:
        value = f"data_type: {_type(tensor)} dims: [ {length} ] zero_data: true"
        lines.append(f"  inputs {{ key: {json.dumps(tensor.name)} value {{ {value} }} }}")
    return [*lines, "}"]


def write_config(folder: Path, name: str, manifest: Manifest, *, profile: Profile, ending: str = "onnx") -> None:
    """Write *folder*/config.pbtxt."""
    text = model_config(name, manifest, profile=profile, ending=ending)
    (folder / "config.pbtxt").write_text(text, encoding="utf-8")
