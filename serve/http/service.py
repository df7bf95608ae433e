"""One loaded model and the worker that its requests share: what is the same for every task."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from serve.describe import ModelFolder
from serve.engines import Engine, TensorSpec
from serve.http.batcher import BatchOptions
from serve.http.worker import ClosedError, Worker

DATATYPES = {
    "int64": "INT64",
    "int32": "INT32",
    "float32": "FP32",
    "float16": "FP16",
    "float64": "FP64",
    "bool": "BOOL",
}
"""numpy's type names in the Open Inference Protocol's words."""


class Model(Protocol):
    """A Classifier or a Generator."""

    folder: ModelFolder
    engine: Engine

    def close(self) -> None: ...


ModelType = TypeVar("ModelType", bound=Model)
WorkerType = TypeVar("WorkerType", bound=Worker)


class ModelService(ABC, Generic[ModelType, WorkerType]):
    """Loads a model in the background and answers through a worker. Implements serve.http.app.Service.

    One thread loads it and makes all inferences: PyTorch keeps CUDA graphs by thread, and before 2.13 fails in any but
    the one that compiled first (pytorch/pytorch issue 123177).
    """

    path: str

    def __init__(self, name: str, load: Callable[[], ModelType], options: BatchOptions) -> None:
        self.name = name
        self.options = options
        self._load = load
        self._model: ModelType | None = None
        self._worker: WorkerType | None = None
        self._closing = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    @abstractmethod
    def warm_up(self, model: ModelType) -> None:
        """The first inferences, off the event loop."""

    @abstractmethod
    def make_worker(self, model: ModelType, thread: ThreadPoolExecutor) -> WorkerType:
        """Not started yet; all its inferences are to run in *thread*."""

    @abstractmethod
    def parse(self, body: bytes) -> Any:
        """See serve.http.app.Service."""

    @abstractmethod
    async def respond(self, question: Any, request: Request) -> Response:
        """See serve.http.app.Service."""

    @abstractmethod
    def parameters(self, model: ModelType) -> dict[str, Any]:
        """What the task adds to the metadata's parameters."""

    @property
    def ready(self) -> bool:
        """Whether the model is loaded and one inference has been made."""
        return self._worker is not None and not self._closing

    @property
    def model(self) -> ModelType:
        """Raises ClosedError before it is loaded."""
        if self._model is None:
            raise ClosedError
        return self._model

    @property
    def worker(self) -> WorkerType:
        """Raises ClosedError before it has started."""
        if self._worker is None:
            raise ClosedError
        return self._worker

    async def start(self) -> None:
        """Load the model and warm it up, off the event loop; raises what the loading raises."""
        loop = asyncio.get_running_loop()
        self._model = await loop.run_in_executor(self._thread, self._load)
        await loop.run_in_executor(self._thread, self.warm_up, self._model)
        worker = self.make_worker(self._model, self._thread)
        worker.start()
        self._worker = worker

    async def close(self) -> None:
        """Finish what was accepted, then free the model."""
        self._closing = True
        if self._worker is not None:
            await self._worker.close()
        self._thread.shutdown()
        if self._model is not None:
            self._model.close()

    def metadata(self) -> dict[str, Any]:
        """The Open Inference Protocol's model metadata; ``parameters`` holds what it has no field for."""
        folder, engine = self.model.folder, self.model.engine
        return {
            "name": self.name,
            "versions": [],
            "platform": "onnxruntime_onnx" if engine.name.startswith("onnxruntime") else engine.name,
            "inputs": [_tensor(spec) for spec in engine.inputs.values()],
            "outputs": [_tensor(spec) for spec in engine.outputs.values()],
            "parameters": {
                "task": folder.task,
                **self.parameters(self.model),
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
