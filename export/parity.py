"""Proof that ONNX Runtime computes from an exported graph what PyTorch computes from the model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from export.cases import Case, all_cases
from export.manifest import Parity
from export.precision import TOLERANCES
from export.source import Source
from pst.errors import ArtifactError

Array = np.ndarray[Any, Any]
ATOL, RTOL = TOLERANCES["fp32"]


@dataclass(frozen=True, kw_only=True)
class Output:
    """One output of one run, from both sides."""

    name: str
    expected: Array
    """PyTorch's."""
    actual: Array
    """ONNX Runtime's."""
    counts: Array | None = None
    """Which entries mean something, broadcastable against them; None for all of them."""
    answers: bool = True
    """Whether the highest entry along the head's axis is the model's answer."""


def open_session(model: Path) -> Any:
    """An ONNX Runtime session on the CPU, as anyone would open it. ArtifactError where it refuses the file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no other base
        raise ArtifactError(f"ONNX Runtime refuses the exported graph: {str(error).splitlines()[0]}") from error


def check_parity(
    source: Source,
    session: Any,
    *,
    examples: Any = None,
    atol: float = ATOL,
    rtol: float = RTOL,
    rms: float | None = None,
    rms_of_random: bool = True,
    advance: Callable[[float], None] = lambda fraction: None,
) -> Parity:
    """Compare PyTorch and *session* on random inputs of nine shapes and on text; *examples* is a pst.data.Examples.

    *advance* is told the fraction done after each comparison.

    Every output must be within atol * size + rtol * |PyTorch|, where size is the root mean square of PyTorch's output,
    1 at least: rounding grows with what is added up, not with what is left. With *rms*, the root mean square of the
    differences must be within rms * size as well, which half types need (export/precision.py); on random inputs unless
    not *rms_of_random*: those leave the ranges that int8 was calibrated for on text. So a row can get another label
    only where its two highest scores are a tie within twice that.

    A decoder reads each case in steps, its own cache handed on, and every step is compared with PyTorch's answer to the
    whole, without a cache. Raises ArtifactError beyond the tolerance, or where PyTorch's outputs are not finite.
    """
    absolute, relative, agree, answers = 0.0, 0.0, 0, 0
    reports: dict[str, dict[str, Any]] = {}
    cases = all_cases(source, examples)
    for done, case in enumerate(cases, start=1):
        report = reports.setdefault(case.name, {"name": case.name, "rows": 0, "max_abs_error": 0.0})
        mean = rms if rms_of_random or not case.random else None
        for output in _cached_outputs(source, session, case) if source.head.cached else _outputs(source, session, case):
            same = _compare(source, case, output, atol=atol, rtol=rtol, rms=mean)
            difference, size = np.abs(output.actual - output.expected), np.abs(output.expected)
            if output.counts is not None:
                difference = np.where(output.counts, difference, 0.0)
            worst = float(difference.max())
            absolute, agree, answers = max(absolute, worst), agree + int(same.sum()), answers + same.size
            large = size > atol
            relative = max(relative, float((difference[large] / size[large]).max(initial=0.0)))
            report["max_abs_error"] = max(report["max_abs_error"], worst)
        batch, length = case.shape
        report["rows"] += batch
        report["batch_size"] = max(report.get("batch_size", 0), batch)
        report["sequence_length"] = max(report.get("sequence_length", 0), length)
        advance(done / len(cases))
    return Parity(
        max_abs_error=absolute, max_rel_error=relative, label_agreement=agree / answers if answers else None,
        tolerance={"atol": atol, "rtol": rtol} | ({} if rms is None else {"rms": rms}), cases=tuple(reports.values()),
    )  # fmt: skip


def _outputs(source: Source, session: Any, case: Case) -> Iterator[Output]:
    with torch.inference_mode():
        expected = source.model(**{name: torch.from_numpy(array) for name, array in case.feeds.items()})
    actual = session.run(None, case.feeds)
    for name, array in zip(source.head.outputs, actual, strict=True):
        yield Output(name=name, expected=expected[name].numpy(), actual=array)


def _cached_outputs(source: Source, session: Any, case: Case) -> Iterator[Output]:
    """The graph reads *case* as a prompt, one token and the rest; PyTorch all at once, without a past."""
    ids, mask = case.feeds["input_ids"], case.feeds["attention_mask"]
    batch, length = ids.shape
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    with torch.inference_mode():
        whole = source.model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions), use_cache=True,
        )  # fmt: skip
    logits = whole.logits.numpy()
    cache = [tensor.numpy() for layer in whole.past_key_values.layers for tensor in (layer.keys, layer.values)]
    inputs = session.get_inputs()
    names, half = [value.name for value in inputs], inputs[-1].type == "tensor(float16)"
    presents = [value.name for value in session.get_outputs()][1:]
    empty = [tensor.numpy() for layer in source.cache for tensor in layer.empty(batch)]
    past = [tensor.astype(np.float16) for tensor in empty] if half else empty
    real, start = mask.astype(bool), 0
    for end in _ends(length):
        feeds = (ids[:, start:end], mask[:, :end], positions[:, start:end], *past)
        actual, *past = session.run(None, dict(zip(names, feeds, strict=True)))
        counts = real[:, start:end, None]
        yield Output(name="logits", expected=logits[:, start:end], actual=actual, counts=counts)
        for name, expected, present in zip(presents, cache, past, strict=True):
            counts = real[:, None, :end, None]
            yield Output(name=name, expected=expected[:, :, :end], actual=present, counts=counts, answers=False)
        start = end


def _ends(length: int) -> list[int]:
    """Where the steps end in which a decoder reads *length* tokens: the prompt, one token, and up to three at once."""
    prompt = max(1, length - 4)
    return sorted({prompt, min(prompt + 1, length), length})


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _compare(
    source: Source, case: Case, output: Output, *, atol: float, rtol: float, rms: float | None = None
) -> Array:
    """Whether each answer is the same, (answers,). Raises ArtifactError beyond the tolerance."""
    expected, actual = output.expected, output.actual
    where = f"in {output.name} on {case.name} inputs of shape {list(case.shape)}"
    if actual.shape != expected.shape:
        raise ArtifactError(f"The ONNX graph gives shape {actual.shape} {where}, PyTorch {expected.shape}.")
    counts = np.broadcast_to(True if output.counts is None else output.counts, expected.shape)
    if not np.isfinite(expected[counts]).all():
        raise ArtifactError(
            f"The model's own outputs {where} are not finite; its training diverged, so train it again."
        )
    size = max(1.0, _rms(expected[counts]))
    difference, allowed = np.abs(actual - expected), atol * size + rtol * np.abs(expected)
    if not (difference <= allowed)[counts].all() or not np.isfinite(actual).all():  # also true of NaN
        raise ArtifactError(
            f"ONNX Runtime differs from PyTorch by {float(difference[counts].max()):.3g} {where}, beyond the tolerance "
            f"of {atol * size:.3g} + {rtol:g} * |PyTorch|; nothing was written. Try another --opset, "
            "or allow more with --atol and --rtol."
        )
    if rms is not None and _rms(difference[counts]) > rms * size:
        raise ArtifactError(
            f"ONNX Runtime differs from PyTorch by {_rms(difference[counts]):.3g} in the root mean square {where}, "
            f"beyond the tolerance of {rms * size:.3g}; nothing was written. Use --precision fp32, "
            "or allow more with --atol."
        )
    axis = source.head.agrees_along
    if source.task == "regression" or axis is None or not output.answers:
        return np.ones(0, dtype=bool)
    same: Array = actual.argmax(axis) == expected.argmax(axis)
    return same[counts[..., 0]] if output.counts is not None else same.reshape(-1)
