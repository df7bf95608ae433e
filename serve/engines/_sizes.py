"""What the symbols of inputs and outputs stand for: batch_size, or past_sequence_length + sequence_length."""

from collections.abc import Mapping

from serve.engines import TensorSpec


def sizes_of(specs: Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The length that each symbol of *specs* has in arrays of *shapes*, by the same names."""
    return {
        symbol: length
        for name, spec in specs.items()
        for symbol, length in zip(spec.shape, shapes[name], strict=True)
        if isinstance(symbol, str)
    }


def shape_of(spec: TensorSpec, sizes: Mapping[str, int]) -> list[int] | None:
    """The shape that *spec* has where its symbols have *sizes*; None where one of them is not known."""
    shape = []
    for part in spec.shape:
        if isinstance(part, int):
            shape.append(part)
        elif all(term in sizes for term in part.split(" + ")):
            shape.append(sum(sizes[term] for term in part.split(" + ")))
        else:
            return None
    return shape
