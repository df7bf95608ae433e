"""Reading safetensors files with numpy alone: names, types, shapes, and where the zeros are, in any stored type.

The format: 8 bytes little-endian length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
Source: https://huggingface.co/docs/safetensors
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst.errors import ModelError, PSTError
from pst.files import read_json

Array = np.ndarray[Any, Any]

# Bytes per entry, and the bits that are not the sign: a float is zero when those are clear, so -0.0 is zero too.
_FLOATS = {"F64": (8, (1 << 63) - 1), "F32": (4, (1 << 31) - 1), "F16": (2, 0x7FFF), "BF16": (2, 0x7FFF)}
_FLOATS |= {"F8_E4M3": (1, 0x7F), "F8_E5M2": (1, 0x7F)}
_INTEGERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a file, not read before it is asked for."""

    name: str
    dtype: str
    """In the format's words: F32, BF16, I64."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """First byte in the file."""

    @property
    def is_float(self) -> bool:
        """Whether it is of a floating type, that is a parameter and not an index buffer."""
        return self.dtype in _FLOATS

    @property
    def itemsize(self) -> int:
        """Bytes per entry."""
        return _FLOATS[self.dtype][0] if self.is_float else _INTEGERS[self.dtype]

    @property
    def size(self) -> int:
        """Entries."""
        return int(np.prod(self.shape, dtype=np.int64))

    def raw(self) -> Array:
        """The stored bytes as unsigned integers of the entry's width, in the tensor's shape, mapped from the file."""
        if self.size == 0:
            return np.zeros(self.shape, dtype=np.uint8)
        return np.memmap(self.file, dtype=f"<u{self.itemsize}", mode="r", offset=self.offset, shape=self.shape)

    def nonzero(self) -> Array:
        """Which entries are not zero: bool, the tensor's shape. Negative zero is zero."""
        raw = self.raw()
        mask = _FLOATS[self.dtype][1] if self.is_float else (1 << 8 * self.itemsize) - 1
        result: Array = (raw & raw.dtype.type(mask)) != 0
        return result


def is_pointer(path: Path) -> bool:
    """Whether *path* is what Git leaves in place of a large file that Git LFS has not fetched."""
    with path.open("rb") as file:
        return file.read(24).startswith(b"version https://git-lfs")


def refuse_pointer(path: Path, error: type[PSTError]) -> None:
    """Raise *error* for a Git LFS pointer or an empty file."""
    if path.stat().st_size == 0:
        raise error(f"{path} is empty; copy or download it again.")
    if is_pointer(path):
        raise error(f"{path} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull")


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the order of their data.

    Raises ModelError: missing, empty, a Git LFS pointer, not safetensors, cut off.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing; copy or download the whole model folder again.")
    refuse_pointer(path, ModelError)
    size = path.stat().st_size
    damaged = f"{path} is not a safetensors file, or its header is damaged; copy or download it again."
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _HEADER_LIMIT:
            raise ModelError(damaged)
        if size < 8 + length:
            raise ModelError(f"{path} is cut off within its header; copy or download it again.")
        header = file.read(length)
    try:
        entries = json.loads(header)
        tensors = [_entry(name, entry, path, 8 + length) for name, entry in entries.items() if name != "__metadata__"]
        end = max((tensor.offset + tensor.size * tensor.itemsize for tensor in tensors), default=8 + length)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(damaged) from error
    if size < end:
        raise ModelError(f"{path} is cut off: {size} bytes of {end}; copy or download it again.")
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.offset)}


def _entry(name: str, entry: dict[str, Any], path: Path, start: int) -> StoredTensor:
    if entry["dtype"] not in _FLOATS and entry["dtype"] not in _INTEGERS:
        raise ModelError(f"{path} stores {name} as {entry['dtype']}, a type that is not supported here.")
    first, last = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(length) for length in entry["shape"])
    tensor = StoredTensor(name=name, dtype=entry["dtype"], shape=shape, file=path, offset=start + first)
    if min(shape, default=0) < 0 or first < 0 or last - first != tensor.size * tensor.itemsize:
        raise ValueError("offsets do not fit the shape")
    return tensor


def read_model_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face folder, whether in one file or sharded. Raises ModelError."""
    files = weight_files(folder)
    if len(files) == 1 and files[0].name == "model.safetensors":
        return read_safetensors(files[0])
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= read_safetensors(file)
    index = read_json(folder / "model.safetensors.index.json", ModelError, "copy or download the folder again.")
    missing = sorted(set(index["weight_map"]) - set(tensors))
    if missing:
        raise ModelError(f"The shards of {folder} lack {missing[0]}, which its index lists; download it again.")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, in order of name. Raises ModelError where it has none."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index, ModelError, "copy or download the folder again.").get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index} lists no weights; copy or download the folder again.")
        return [folder / name for name in sorted({str(shard) for shard in shards.values()})]
    if (folder / "pytorch_model.bin").is_file():
        raise ModelError(
            f"{folder} keeps its weights in pytorch_model.bin, a pickle that can run code, which is not opened; "
            "save it again with save_pretrained, which writes model.safetensors."
        )
    raise ModelError(f"{folder} holds no model.safetensors; give a Hugging Face model folder or a run folder.")
