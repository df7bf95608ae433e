"""What ``onnxruntime-cuda`` adds to a plain session: fused attention, a session for texts without padding, CUDA graphs.

One artifact becomes up to two sessions. Where no text of a batch is padded, as with one text or with texts of one
length, the mask says nothing, and the session without it has the fastest kernels. The other opens with the first padded
batch. A fused graph is compared with the file as it is, on the device and with random tokens, before it is used.

A decoder's cache wants the scores of the last token alone. Its sessions compute no others, and open apart from those of
infer, which gives the scores of every token.
"""

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst.progress import note
from serve.describe import vocab_size
from serve.engines import LOGITS, Array, TensorSpec, cache_inputs
from serve.engines._graph_view import LARGEST
from serve.engines._onnxruntime_device import DeviceSession
from serve.engines._onnxruntime_fusion import fuse_attention, merged_weights
from serve.engines._onnxruntime_providers import first_line

MASK = "attention_mask"
_INPUTS = ("input_ids", MASK, "position_ids", "token_type_ids")
AGREES = 0.05
"""Largest difference of a fused graph's output, as a share of the output's largest number: fp16 rounds to a hundredth
of that, and a mask or a factor gone wrong makes more."""
_ROWS, _TOKENS, _PAST = 2, 16, 4

_AGREED: set[tuple[object, ...]] = set()
"""Files and kinds of sessions that this process has compared already."""

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
        plain: list[Any] | None = None,
    ) -> None:
        """*plain*: a session of the file as it is, where there is one. It is taken out, so that it makes room."""
        self._runtime, self._file, self._open = runtime, file, open_session
        self._device, self._inputs, self._outputs, self._shapes = device, inputs, outputs, shapes
        self._max_length = max_length
        self._cached = list(cache_inputs(inputs))
        self._sessions: dict[_Kind, DeviceSession] = {}
        self._forms: dict[_Kind, _Kind | None] = {}
        """What was fused for each session: for itself or, where that does for both, for padded texts; None: nothing."""
        self._files: dict[_Kind, tuple[Path, Mapping[str, str]]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._said: set[str] = set()
        self._plain = [] if plain is None else plain
        self._lock = threading.RLock()
        self.fused = 0
        """Attentions that are one operator."""
        self._session_for(_Kind(unpadded=True, last=bool(self._cached)))
        self._plain.clear()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name of feeds that fit."""
        session = self._session_for(_Kind(unpadded=is_unpadded(feeds), last=False))
        if not self._cached:
            return session.run(feeds)
        # Of a decoder's large outputs no buffers are kept.
        values = session.session.run(list(self._outputs), dict(feeds))
        return dict(zip(self._outputs, values, strict=True))

    def session_for(self, feeds: Mapping[str, Array]) -> Any:
        """The InferenceSession that continues *feeds*; it may give the scores of the last token alone."""
        return self._session_for(_Kind(unpadded=is_unpadded(feeds), last=True)).session

    def graph_file(self, feeds: Mapping[str, Array]) -> tuple[Path, Mapping[str, str]]:
        """The file of the graph that runs *feeds*, until close, and which weights lie beside others in it.

        That is the artifact's own, or what was fused, which is made once more: the bytes of a session are not kept. Of
        a decoder it is the graph that reads a prompt. For the names see serve.engines._onnxruntime_fusion.
        """
        kind = _Kind(unpadded=is_unpadded(feeds), last=bool(self._cached))
        with self._lock:
            self._session_for(kind)
            form = self._forms[kind]
            if form is None:
                return self._file, {}
            if form not in self._files:
                self._folder = self._folder or tempfile.TemporaryDirectory()
                path, made = Path(self._folder.name) / f"fused-{len(self._files)}.onnx", self._make(form)
                assert made is not None
                path.write_bytes(made.content)
                self._files[form] = path, made.merged
            return self._files[form]

    def _session_for(self, kind: "_Kind") -> DeviceSession:
        with self._lock:
            return self._sessions.get(kind) or self._new_session(kind)

    def _new_session(self, kind: "_Kind") -> DeviceSession:
        model = self._fused(kind)
        if kind.unpadded and takes_padding(model):
            for_all = _Kind(unpadded=False, last=kind.last)
            self._sessions[kind] = self._session_for(for_all)
            self._forms[kind] = self._forms[for_all]
            return self._sessions[kind]
        session = None if model is None else self._checked(model.content, kind)
        self._forms[kind] = None if session is None else kind
        if session is None:
            self.fused = 0
            session = self._device_session(lambda: str(self._file), kind)
        self._sessions[kind] = session
        return session

    def _checked(self, content: bytes, kind: "_Kind") -> DeviceSession | None:
        """A session of the fused graph; None, and a note, where it is refused or computes something else."""
        held = [content]

        def model() -> bytes:
            if not held:  # once more, for which it is made again: it may take as much memory as the weights
                again = self._make(kind)
                assert again is not None
                held.append(again.content)
            return held.pop()

        try:
            state = self._file.stat()
            known = (str(self._file.resolve()), state.st_mtime_ns, state.st_size, self._device, kind)
            expected = [] if known in _AGREED else self._expected(kind)
            self._plain.clear()
            session = self._device_session(model, kind)
            if not expected or self._agrees(session, kind, expected):
                _AGREED.add(known)
                return session
            why = "computes something else with it"
        except Exception as error:  # the runtime's exceptions have no common base but this
            why = f"refuses it ({first_line(error)})"
        self._say(f"{self._file} runs as it is, without what is fused: ONNX Runtime {why}. Please report this.")
        return None

    def _device_session(self, model: Callable[[], Any], kind: "_Kind") -> DeviceSession:
        return DeviceSession(
            self._runtime, lambda graphs: self._open(model(), graphs), device=self._device, inputs=self._inputs,
            outputs=self._outputs, graphs=self._device == "cuda" and not self._cached, shapes=self._shapes,
            constant=[MASK] if kind.unpadded else (),
        )  # fmt: skip

    def _say(self, text: str) -> None:
        """A note, once for all sessions."""
        if text not in self._said:
            self._said.add(text)
            note(text)

    def _known_inputs(self) -> bool:
        """Whether what the model reads can be made up, so that a fused graph can be compared."""
        return set(self._inputs) <= {*_INPUTS, *self._cached}

    def _fused(self, kind: "_Kind") -> "_Fused | None":
        if not self._known_inputs():
            self._say(f"{self._file} has inputs of its own, so nothing in it is fused; ONNX Runtime runs it as it is.")
            return None
        found = self._make(kind)
        self.fused = found.count if found else 0
        return found

    def _make(self, kind: "_Kind") -> "_Fused | None":
        return fused(self._file, unpadded=kind.unpadded, last=kind.last, say=self._say)

    def _expected(self, kind: "_Kind") -> list[Array]:
        """What the file as it is computes; its session is closed before another opens."""
        plain = self._plain.pop() if self._plain else self._open(str(self._file), False)
        values: list[Array] = plain.run(list(self._outputs), self._random_feeds(unpadded=kind.unpadded))
        return values

    def _agrees(self, session: DeviceSession, kind: "_Kind", expected: list[Array]) -> bool:
        feeds, names = self._random_feeds(unpadded=kind.unpadded), list(self._outputs)
        given = session.session.run(names, feeds) if self._cached else list(session.run(feeds).values())
        if kind.last:
            expected[names.index(LOGITS)] = expected[names.index(LOGITS)][:, -1:]
        return all(
            float(np.abs(one.astype(np.float32) - other.astype(np.float32)).max())
            <= AGREES * float(np.abs(one.astype(np.float32)).max())
            for one, other in zip(expected, given, strict=True)
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
        """Give up every session and file."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self._forms.clear()
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a session is for."""

    unpadded: bool
    """Masks of ones alone."""
    last: bool
    """The scores of the last token alone."""


def is_unpadded(feeds: Mapping[str, Array]) -> bool:
    """Whether no text of a batch is padded, so that a session without the mask runs it."""
    return MASK not in feeds or bool(feeds[MASK].all())


class _Fused:
    """A rewritten model."""

    def __init__(self, model: Any, count: int) -> None:
        self.count = count
        self.content: bytes = model.SerializeToString()
        self.merged = merged_weights(model)
        """See serve.engines._onnxruntime_fusion."""
        self.reads_mask = any(MASK in node.input for node in model.graph.node if node.op_type != "Shape")


def takes_padding(model: _Fused | None) -> bool:
    """Whether what was made for texts without padding does for all: the mask is still read, or nothing was fused."""
    return model is None or model.reads_mask


def fused(file: Path, *, unpadded: bool, last: bool = False, say: Callable[[str], None] = note) -> _Fused | None:
    """*file* with fused attention; None, and a note that says why, where it stays as it is.

    *last*: its logits are those of the last token, (rows, 1, vocabulary).
    """
    try:
        import onnx
    except ImportError:
        say("onnx is not installed, so ONNX Runtime computes attention in many small steps; run: pip install onnx")
        return None
    from serve.engines._onnxruntime_elementwise import fuse_elementwise
    from serve.engines._onnxruntime_last import keep_last

    if sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) > LARGEST:
        say(f"{file} is too large for its attention to be fused; ONNX Runtime runs it as it is.")
        return None
    model = onnx.load(str(file))
    count = fuse_attention(model, unpadded=unpadded)
    if not count:
        say(
            f"No attention in {file} has the form that ONNX Runtime fuses here, so it computes in many small steps; "
            "of BERT-like encoders and GPT-2 the linear forms auto, matmul and gemm have it."
        )
    changed = [count, fuse_elementwise(model), last and keep_last(model, LOGITS)]
    return _Fused(model, count) if any(changed) else None
