"""Write Split nodes in the form that opsets below 18 know.

Opset 18 gave Split the attribute num_outputs; the version converter leaves it in place when it lowers a graph to 17,
and runtimes then refuse the graph. Below 18 a Split without sizes has as many equal parts as outputs.

Requires: equal parts, the only ones that torch.chunk and torch.split of a weight's fused parts give. Unequal ones fail
when the graph runs, and so in the comparison with PyTorch.
Ensures: below opset 18 no Split has num_outputs; from 18 on nothing changes.
"""

from collections.abc import Mapping
from typing import Any


def run(model: Any, weights: Mapping[str, Any]) -> bool:
    """Remove the attribute from *model* in place."""
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    changed = False
    if opset < 18:
        for node in model.graph.node:
            for attribute in [entry for entry in node.attribute if node.op_type == "Split"]:
                if attribute.name == "num_outputs":
                    assert attribute.i == len(node.output)
                    node.attribute.remove(attribute)
                    changed = True
    return changed
