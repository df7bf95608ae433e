"""A decoder's cache as values of ONNX Runtime, which stay on the device from one step to the next.

What a run gives as present is what the next one reads as past: no copy, and on a GPU no way through the host. A value
is never written to, so that copies of a cache share theirs.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np

from pst.errors import EngineError
from serve.engines import LOGITS, PAST, PRESENT, Array, TensorSpec, cache_inputs, check_feeds
from serve.engines._onnxruntime_providers import first_line

SessionFor = Callable[[Mapping[str, Array]], Any]
"""The session that shall run these feeds; raises EngineError once the engine is closed."""


class OrtCache:
    """See serve.engines.Cache."""

    def __init__(
        self,
        runtime: Any,
        session_for: SessionFor,
        past: Mapping[str, Array],
        *,
        device: str,
        inputs: Mapping[str, TensorSpec],
        max_length: int | None,
    ) -> None:
        """Of the arrays of *past*, which are copied to *device*."""
        specs = cache_inputs(inputs)
        check_feeds(specs, past, max_length=None)
        self._runtime, self._session_for, self._max_length = runtime, session_for, max_length
        self._inputs = {name: spec for name, spec in inputs.items() if name not in specs}
        # On a processor a value reads its array's memory, which these keep alive.
        self._held = [
            runtime.OrtValue.ortvalue_from_numpy(np.array(array, order="C"), device, 0) for array in past.values()
        ]
        self._names, self._past = list(past), [value._get_c_value() for value in self._held]
        self._reads = [*self._inputs, *self._names]
        self._gives = [LOGITS, *(name.replace(PAST, PRESENT, 1) for name in self._names)]
        host, where = (runtime.OrtDevice.make(kind, 0)._get_c_device() for kind in ("cpu", device))
        self._places = [host, *(where for _ in self._names)]
        self._options = runtime.RunOptions()
        self._options.log_severity_level = 4

    def extend(self, feeds: Mapping[str, Array]) -> Array:
        """See Cache."""
        check_feeds(self._inputs, feeds, max_length=self._max_length)
        session, library = self._session_for(feeds), self._runtime.capi.onnxruntime_pybind11_state
        given, made = library.OrtValueVector(), library.OrtValueVector()
        kept = [self._runtime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(feeds[name])) for name in self._inputs]
        for value in (*(each._get_c_value() for each in kept), *self._past):
            given.push_back(value)
        try:
            session.run_with_ortvaluevector(self._options, self._reads, given, self._gives, made, self._places)
        except Exception as error:  # the runtime's exceptions have no common base but this
            raise EngineError(f"ONNX Runtime failed to run the model: {first_line(error)}.") from error
        logits = np.array(made[0].numpy()[:, -1])
        cache = library.OrtValueVector()  # a value keeps the vector that it comes from: not that with a prompt's scores
        for value in list(made)[1:]:
            cache.push_back(value)
        self._past, self._held = list(cache), []
        return logits

    def copy(self) -> Self:
        """See Cache."""
        other = object.__new__(type(self))
        other.__dict__ = dict(self.__dict__)  # values are shared, and none is written to
        return other

    def arrays(self) -> dict[str, Array]:
        """See Cache."""
        return {name: np.array(value.numpy()) for name, value in zip(self._names, self._past, strict=True)}
