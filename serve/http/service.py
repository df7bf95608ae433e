"""One loaded classifier behind a batcher: what the transport asks."""

import asyncio
from collections.abc import Callable
from typing import Any

from serve.classify import Classifier, Prediction
from serve.engines import TensorSpec
from serve.http.app import TextPair
from serve.http.batcher import Batcher, BatchOptions, ClosedError

DATATYPES = {
    "int64": "INT64",
    "int32": "INT32",
    "float32": "FP32",
    "float16": "FP16",
    "float64": "FP64",
    "bool": "BOOL",
}
"""numpy's type names in the Open Inference Protocol's words."""


class ModelService:
    """Loads a classifier in the background and answers through a batcher. Implements serve.http.app.Service."""

    def __init__(self, name: str, load: Callable[[], Classifier], options: BatchOptions) -> None:
        self.name = name
        self.max_texts = options.max_queue_size
        self._load = load
        self._options = options
        self._classifier: Classifier | None = None
        self._batcher: Batcher[TextPair, Prediction] | None = None
        self._closing = False

    @property
    def ready(self) -> bool:
        """Whether the model is loaded and one inference has been made."""
        return self._batcher is not None and not self._closing

    async def start(self) -> None:
        """Load the model and answer one text, off the event loop; raises what the loading raises."""
        classifier = await asyncio.to_thread(self._load)
        self._classifier = classifier
        await asyncio.to_thread(classifier.predict, ["warm-up"])
        batcher = Batcher[TextPair, Prediction](lambda texts: run_batch(classifier, texts), self._options)
        batcher.start()
        self._batcher = batcher

    async def ask(self, texts: list[TextPair]) -> list[Prediction]:
        """One prediction per text or pair."""
        if self._batcher is None:
            raise ClosedError
        return await self._batcher.submit(texts)

    async def close(self) -> None:
        """Finish what was accepted, then free the model."""
        self._closing = True
        if self._batcher is not None:
            await self._batcher.close()
        if self._classifier is not None:
            self._classifier.close()

    def metadata(self) -> dict[str, Any]:
        """The Open Inference Protocol's model metadata; ``parameters`` holds what it has no field for."""
        assert self._classifier is not None, "asked only when ready"
        folder, engine = self._classifier.folder, self._classifier.engine
        return {
            "name": self.name,
            "versions": [],
            "platform": "onnxruntime_onnx" if engine.name.startswith("onnxruntime") else engine.name,
            "inputs": [_tensor(spec) for spec in engine.inputs.values()],
            "outputs": [_tensor(spec) for spec in engine.outputs.values()],
            "parameters": {
                "task": folder.task,
                "labels": list(folder.labels),
                "max_length": folder.max_length,
                "pattern": folder.pattern,
                "sparsity": folder.sparsity,
                "engine": engine.name,
                "threads": engine.threads,
            },
        }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    shape = [length if isinstance(length, int) else -1 for length in spec.shape]
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": shape}


def run_batch(classifier: Classifier, texts: list[TextPair]) -> list[Prediction]:
    """Single texts and pairs may meet in one batch, but not in one inference: each kind has its own."""
    results: list[Prediction | None] = [None] * len(texts)
    single = [index for index, (_, second) in enumerate(texts) if second is None]
    paired = [index for index, (_, second) in enumerate(texts) if second is not None]
    for indices in (single, paired):
        first = [texts[index][0] for index in indices]
        second = None if indices is single else [texts[index][1] or "" for index in indices]
        for index, prediction in zip(indices, classifier.predict(first, second), strict=True):
            results[index] = prediction
    return [prediction for prediction in results if prediction is not None]
