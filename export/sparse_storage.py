"""Zeros left out of the file: weights as ONNX sparse_initializer, wherever that takes fewer bytes.

A SparseTensorProto holds the values that are not zero and their places in the flattened tensor, ascending, as int64
(https://onnx.ai/onnx/repo-docs/IR.html). A weight of b bytes an entry gains where fewer than b of b + 8 entries are
kept: a third in fp32, a fifth in fp16, a ninth in int8.

ONNX Runtime makes dense tensors of them when it opens the file: answers, memory and speed are those of dense storage.
onnx's shape inference and TensorRT's parser know no sparse_initializer.
"""

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from export.graph import to_array
from pst.errors import ConfigError

STORAGES = ("dense", "sparse")
INDEX_BYTES = 8


def check_storage(storage: str) -> None:
    """Raise ConfigError for a name that is not one of STORAGES."""
    if storage not in STORAGES:
        raise ConfigError(f"Unknown storage {storage!r}; use one of {', '.join(STORAGES)}.")


def store_sparse(model: Any) -> tuple[list[str], int]:
    """Move the initializers of *model* (onnx.ModelProto) that gain to sparse_initializer, in place.

    Requires initializers inside the model. Returns their names and the bytes saved. Every number stays, but a negative
    zero, which masking leaves behind, becomes 0.0: of no account in a product, whose sum begins with 0.0.
    """
    names, saved = [], 0
    for place in reversed(range(len(model.graph.initializer))):
        tensor = model.graph.initializer[place]
        if len(tensor.dims) < 2 or 0 in tensor.dims:
            continue
        array = numpy_helper.to_array(tensor)
        kept = np.flatnonzero(array != 0)
        gain = array.nbytes - len(kept) * (array.itemsize + INDEX_BYTES)
        if gain <= 0 or not len(kept):
            continue
        sparse = onnx.SparseTensorProto(dims=tensor.dims)
        sparse.values.CopyFrom(numpy_helper.from_array(array.reshape(-1)[kept], tensor.name))
        sparse.indices.CopyFrom(numpy_helper.from_array(kept.astype(np.int64), f"{tensor.name}_indices"))
        assert np.array_equal(to_array(sparse, tensor.name), array), tensor.name
        model.graph.sparse_initializer.insert(0, sparse)
        names.append(tensor.name)
        del model.graph.initializer[place]
        saved += gain
    return names[::-1], saved
