"""An ONNX file of nothing but matrix products, written without the package onnx, which serving does not need.

The bytes are Protocol Buffers; numbers below are the field numbers of onnx.proto3 (https://github.com/onnx/onnx).
"""

from collections.abc import Sequence

import numpy as np

IR_VERSION, OPSET = 8, 17
DATA_TYPES = {"float32": 1, "float16": 10}
"""TensorProto.DataType."""


def products_model(weights: Sequence[np.ndarray]) -> bytes:
    """``y0 = x w0``, ``y1 = x w1``, ...: x (tokens, inputs), each weight (inputs, outputs), all of one type."""
    dtype = DATA_TYPES[str(weights[0].dtype)]
    inputs, outputs = weights[0].shape
    graph = b"".join(_message(1, _node(f"x w{index}", f"y{index}")) for index in range(len(weights)))
    graph += _string(2, "products")
    for index, weight in enumerate(weights):
        dims = b"".join(_number(1, length) for length in weight.shape)
        raw = np.ascontiguousarray(weight).tobytes()
        graph += _message(5, dims + _number(2, dtype) + _string(8, f"w{index}") + _bytes(9, raw))
    graph += _message(11, _value("x", dtype, inputs))
    graph += b"".join(_message(12, _value(f"y{index}", dtype, outputs)) for index in range(len(weights)))
    return _number(1, IR_VERSION) + _message(8, _string(1, "") + _number(2, OPSET)) + _message(7, graph)


def _node(inputs: str, output: str) -> bytes:
    """NodeProto of a MatMul."""
    read = b"".join(_string(1, name) for name in inputs.split())
    return read + _string(2, output) + _string(3, f"product_{output}") + _string(4, "MatMul")


def _value(name: str, dtype: int, width: int) -> bytes:
    """ValueInfoProto of (tokens, width)."""
    shape = _message(1, _string(2, "tokens")) + _message(1, _number(1, width))
    return _string(1, name) + _message(2, _message(1, _number(1, dtype) + _message(2, shape)))


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


_message = _bytes


def _string(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())
