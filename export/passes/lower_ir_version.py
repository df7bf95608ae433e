"""State the lowest IR version that the graph's opset needs, so that older runtimes read it.

The exporter always writes a recent IR version; runtimes refuse one newer than themselves, even where nothing of it is
used. What newer IR versions added is metadata on nodes and values, overloads of local functions, and small types.

Requires: strip_metadata has run; no local functions.
Ensures: ir_version is what onnx pairs with the opset (8 for opset 17, at least), where the model uses nothing newer.
"""

from collections.abc import Mapping
from typing import Any

import onnx

_NEWER_TYPES = {"UINT4", "INT4", "FLOAT4E2M1", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"}


def run(model: Any, weights: Mapping[str, Any]) -> bool:
    """Lower model.ir_version in place."""
    lowest = max(onnx.helper.find_min_ir_version_for(model.opset_import), 8)
    types = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    if model.functions or types & _NEWER_TYPES or model.ir_version <= lowest:
        return False
    model.ir_version = lowest
    return True
