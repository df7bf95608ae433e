"""A receipt for people: its layers as tables, by kind and one by one, and what follows from it in sentences."""

import itertools
from collections.abc import Iterator

from serve.bench.receipt import Layer, Receipt, groups, size

TOLD, WORTH_TELLING = 4, 0.03
"""Of what computes with no weight: so many kinds at most, and those of such a share of the time."""


def receipt_table(receipt: Receipt) -> tuple[list[str], list[list[str]]]:
    """The layers by kind; what all names begin with is left out."""
    header = ["weights", "runs as", "pattern", "density", "shape", "sparse kernel", "ms", "baseline ms", "share"]
    found = groups(receipt)
    names = [group.name.split(".") for group in found]
    common = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False)))
    rows = []
    for group, parts in zip(found, names, strict=True):
        time, short = group.time_ms, ".".join(parts[common:] or parts)
        rows.append(
            [
                f"{len(group.layers)} x {short}",
                group.distinct("operator"),
                group.distinct("pattern"),
                f"{group.density:.1%}",
                group.distinct("shape"),
                group.sparse_kernel,
                "unknown" if time is None else f"{time:.3f}",
                "" if group.baseline_ms is None else f"{group.baseline_ms:.3f}",
                "" if time is None else f"{time / receipt.total_ms:.1%}",
            ]
        )
    return header, rows


def layer_table(receipt: Receipt) -> tuple[list[str], list[list[str]]]:
    """Every layer."""
    header = ["weight", "runs as", "pattern", "density", "shape", "sparse kernel", "ms", "baseline ms", "share", "why"]
    rows = [
        [
            layer.weight,
            layer.operator or "unknown",
            layer.pattern,
            f"{layer.density:.1%}",
            size(layer.shape),
            "" if layer.pattern == "dense" else _chosen(layer),
            "unknown" if layer.time_ms is None else f"{layer.time_ms:.3f}",
            "" if layer.baseline_ms is None else f"{layer.baseline_ms:.3f}",
            f"{(layer.time_ms or 0.0) / receipt.total_ms:.1%}",
            layer.why,
        ]
        for layer in receipt.layers
    ]
    return header, rows


def _chosen(layer: Layer) -> str:
    if layer.sparse_kernel:
        return "chosen"
    return {True: "eligible", False: "none", None: "not told"}[layer.eligible]


def summary(receipt: Receipt, *, inference_ms: float | None = None) -> str:
    """How much of the time is in these layers, why zeros saved none of it, and what would.

    *inference_ms*: median latency of an inference without the profiler, where it is known. What would follow from times
    that the profiler made much longer is not said.
    """
    slowed = receipt.is_slowed(inference_ms)
    sentences = [_share(receipt, slowed=slowed), *slowed_sentence(receipt, inference_ms)]
    sentences += _rest(receipt, slowed=slowed)
    saving = [layer for layer in receipt.layers if not layer.sparse_kernel]
    sentences += [f"{why}." for why in dict.fromkeys(layer.why for layer in saving if layer.is_sparse)]
    sentences += [
        f"What would use these zeros: {each}." for each in dict.fromkeys(x.advice for x in saving if x.advice)
    ]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def slowed_sentence(receipt: Receipt, inference_ms: float | None) -> Iterator[str]:
    """That the profile took much longer than an inference, where it did."""
    if receipt.is_slowed(inference_ms):
        yield (
            f"The profile took {receipt.total_ms:.2f} ms where an inference takes {inference_ms:.2f}: what the "
            "profiler adds, such as launches and waits, is in every layer's time, so small layers seem longer than "
            "they are, and how much faster the model would be without these layers is not said."
        )


def _rest(receipt: Receipt, *, slowed: bool) -> Iterator[str]:
    """What else takes time, and whether that alone takes longer than the whole baseline."""
    told = [other for other in receipt.others[:TOLD] if other.time_ms >= WORTH_TELLING * receipt.total_ms]
    if told:
        parts = ", ".join(f"{other.count} x {other.operator} {other.time_ms:.2f}" for other in told)
        yield f"{receipt.others_ms:.2f} ms go to what computes with none of them: {parts}."
    ran = sum(layer.sparse_kernel for layer in receipt.layers)
    if ran:
        yield f"Sparse kernels ran in {ran} of {sum(layer.is_sparse for layer in receipt.layers)} layers with zeros."
    baseline = receipt.baseline_total_ms
    if ran and not slowed and baseline is not None and receipt.others_ms > baseline:
        yield (
            f"What computes with no weight takes longer than all of the baseline ({baseline:.2f} ms), so that no "
            "sparse kernel can make up for it: fusions that the baseline has are lost in this form."
        )


def _share(receipt: Receipt, *, slowed: bool) -> str:
    if receipt.limit is None:
        fused = {layer.node: layer.fused_ms for layer in receipt.layers if layer.fused_ms is not None}
        count, time = sum(1 for layer in receipt.layers if layer.fused), sum(fused.values())
        if not count:
            return f"None of these layers can be found in what ran, which took {receipt.total_ms:.2f} ms."
        return (
            f"{count} of these layers are fused with others; what they are fused into takes {time:.2f} of "
            f"{receipt.total_ms:.2f} ms."
        )
    share = receipt.layers_ms / receipt.total_ms
    said = f"These layers take {receipt.layers_ms:.2f} of {receipt.total_ms:.2f} ms ({share:.0%})"
    return f"{said}." if slowed else f"{said}; if they took no time, the model would be {receipt.limit:.1f}× as fast."
