"""What ``onnxruntime-cuda`` adds to a plain session: fused attention, a session for texts without padding, CUDA graphs.

One artifact becomes up to two sessions. Where no text of a batch is padded, as with one text or with texts of one
length, the mask says nothing, and the session without it has the fastest kernels. The other opens with the first padded
batch. A fused graph is compared with the file as it is, on the device and with random tokens, before it is used.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pst.progress import note
from serve.describe import vocab_size
from serve.engines import Array, TensorSpec
from serve.engines._onnxruntime_device import DeviceSession

MASK, PAST = "attention_mask", "past_key_values."
_INPUTS = ("input_ids", MASK, "position_ids", "token_type_ids")
LARGEST = 1_900_000_000
"""Bytes of a model that is rewritten: a session takes one from memory up to protobuf's 2 GB."""
AGREES = 0.05
"""Largest difference of a fused graph's output, as a share of the output's largest number: fp16 rounds to a hundredth
of that, and a mask or a factor gone wrong makes more."""
_ROWS, _TOKENS, _PAST = 2, 16, 4

OpenSession = Callable[[Any, bool], Any]
"""(file name or bytes, CUDA graphs) to an InferenceSession."""


class FusedSessions:
    """The sessions of one artifact on a device."""

    def __init__(
        self,
        runtime: Any,
        file: Path,
        open_session: OpenSession,
        *,
        device: str,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        max_length: int | None,
        shapes: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._runtime, self._file, self._open = runtime, file, open_session
        self._device, self._inputs, self._outputs, self._shapes = device, inputs, outputs, shapes
        self._max_length = max_length
        self._cached = [name for name in inputs if name.startswith(PAST)]
        self._sessions: dict[bool, DeviceSession] = {}
        self.fused = 0
        """Attentions that are one operator."""
        self._session_for(unpadded=True)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name of feeds that fit."""
        return self._session_for(unpadded=MASK not in feeds or bool(feeds[MASK].all())).run(feeds)

    def session_for(self, feeds: Mapping[str, Array]) -> Any:
        """The InferenceSession that *feeds* would run in."""
        return self._session_for(unpadded=MASK not in feeds or bool(feeds[MASK].all())).session

    def _session_for(self, *, unpadded: bool) -> DeviceSession:
        if unpadded not in self._sessions:
            model = self._fused(unpadded=unpadded) if self._known_inputs() else None
            if unpadded and (model is None or model.reads_mask):
                # The mask is still read: one session does for all.
                self._sessions[True] = self._session_for(unpadded=False)
                return self._sessions[True]
            self._sessions[unpadded] = self._device_session(str(self._file) if model is None else model.content)
            if model is not None and not self._agrees(self._sessions[unpadded], unpadded=unpadded):
                note(
                    f"ONNX Runtime computes something else with fused attention than without it in {self._file}; "
                    "it runs as the file is. Please report this."
                )
                self._sessions[unpadded].close()
                self.fused = 0
                self._sessions[unpadded] = self._device_session(str(self._file))
        return self._sessions[unpadded]

    def _device_session(self, model: Any) -> DeviceSession:
        return DeviceSession(
            self._runtime, lambda graphs: self._open(model, graphs), device=self._device, inputs=self._inputs,
            outputs=self._outputs, graphs=self._device == "cuda" and not self._cached, shapes=self._shapes,
        )  # fmt: skip

    def _known_inputs(self) -> bool:
        """Whether what the model reads can be made up, so that a fused graph can be compared."""
        return set(self._inputs) <= {*_INPUTS, *self._cached}

    def _fused(self, *, unpadded: bool) -> "_Fused | None":
        found = fused(self._file, unpadded=unpadded)
        self.fused = found.count if found else 0
        return found

    def _agrees(self, session: DeviceSession, *, unpadded: bool) -> bool:
        feeds = self._random_feeds(unpadded=unpadded)
        expected = self._open(str(self._file), False).run(list(self._outputs), feeds)
        return all(
            float(np.abs(one.astype(np.float32) - other.astype(np.float32)).max())
            <= AGREES * float(np.abs(one.astype(np.float32)).max())
            for one, other in zip(expected, session.run(feeds).values(), strict=True)
        )

    def _random_feeds(self, *, unpadded: bool) -> dict[str, Array]:
        """Two rows of random tokens and, for a decoder, a random cache; the first row padded unless *unpadded*."""
        random, cached = np.random.default_rng(0), bool(self._cached)
        tokens, past = min(_TOKENS, (self._max_length or _TOKENS) - _PAST), _PAST if cached else 0
        mask = np.ones((_ROWS, past + tokens), dtype=np.int64)
        if not unpadded:
            mask[0, slice(0, 2) if cached else slice(-2, None)] = 0
        ids = random.integers(0, vocab_size(self._file.parent) or 2, (_ROWS, tokens))
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past:]
        known = {"input_ids": ids, MASK: mask, "position_ids": positions, "token_type_ids": np.zeros_like(ids)}
        feeds = {}
        for name, spec in self._inputs.items():
            if name in known:
                feeds[name] = known[name].astype(spec.dtype)
            else:
                _, heads, _, width = spec.shape
                feeds[name] = random.standard_normal((_ROWS, int(heads), past, int(width))).astype(spec.dtype)
        return feeds

    def close(self) -> None:
        """Give up every session."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()


class _Fused:
    """A rewritten model."""

    def __init__(self, model: Any, count: int) -> None:
        self.count = count
        self.content: bytes = model.SerializeToString()
        self.reads_mask = any(MASK in node.input for node in model.graph.node if node.op_type != "Shape")


def fused(file: Path, *, unpadded: bool) -> _Fused | None:
    """*file* with fused attention; None, and a note that says why, where it stays as it is."""
    try:
        import onnx
    except ImportError:
        note("onnx is not installed, so ONNX Runtime computes attention in many small steps; run: pip install onnx")
        return None
    from serve.engines._onnxruntime_elementwise import fuse_elementwise
    from serve.engines._onnxruntime_fusion import fuse_attention

    if sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) > LARGEST:
        note(f"{file} is too large for its attention to be fused; ONNX Runtime runs it as it is.")
        return None
    model = onnx.load(str(file))
    count = fuse_attention(model, unpadded=unpadded)
    if not count:
        note(
            f"No attention in {file} has the form that ONNX Runtime fuses here, so it computes in many small steps; "
            "of BERT-like encoders and GPT-2 the linear forms auto, matmul and gemm have it."
        )
    return _Fused(model, count) if fuse_elementwise(model) or count else None
