"""PyTorch, as the baseline that every other runtime is checked against: a Hugging Face classifier folder.

The only module of this layer that imports torch and transformers, and only once a model is opened.
Variants: ``torch`` and ``auto`` use a GPU where there is one; ``torch-cpu`` and ``torch-cuda`` say which, and -fp16,
-compiled, -sparse and -autotune say more, see _torch_variant.py. Products of float32 are never rounded to
TensorFloat-32.
"""

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pst.errors import EngineError, ModelError
from pst.files import refuse_language_model, resolve_model
from serve.closing import Closing
from serve.describe import max_positions
from serve.engines import ANY_SHAPE, Array, Shapes, TensorSpec, check_feeds
from serve.engines._torch_autotune import autotune, timer_of
from serve.engines._torch_sparse import SparseWeights, compress, install_, known_dense
from serve.engines._torch_sparse_linear import ALGORITHMS
from serve.engines._torch_variant import Variant, parse_variant
from serve.layers import LayerTimes, dense_weights

MISSING = 'PyTorch and transformers are needed for this; install them with: pip install "sparse-pst[train,cpu]".'
SPARE_COMPILATIONS = 8
"""Of one model, beside one for each shape that was announced: as many as PyTorch itself has for a function."""
AXES: tuple[str, ...] = ("batch_size", "sequence_length")


def _load_libraries() -> tuple[Any, Any]:
    try:
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise EngineError(MISSING) from error


class TorchEngine(Closing):
    """AutoModelForSequenceClassification in evaluation mode, with the protocol of serve.engines.Engine."""

    def __init__(self, path: Path, *, variant: str, threads: int, shapes: Shapes = ANY_SHAPE) -> None:
        asked = parse_variant(variant)
        folder = resolve_model(path)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json; the engine torch wants a Hugging Face model folder.")
        refuse_language_model(folder)
        self._torch, transformers = _load_libraries()
        has_gpu = bool(self._torch.cuda.is_available())
        if asked.device == "cuda" and not has_gpu:
            raise EngineError("PyTorch sees no CUDA device on this machine; choose the engine torch-cpu.")
        self._device = asked.device or ("cuda" if has_gpu else "cpu")
        start = time.perf_counter()
        self._model: Any = _load_model(self._torch, transformers, folder).to(self._device).eval()
        if asked.half:
            self._model = self._model.half()
        self.layer_times: tuple[LayerTimes, ...] = ()
        """Of ``autotune``, where it measured."""
        self._sparse = self._compress(folder, asked, shapes) if asked.sparse else None
        config = self._model.config
        self._exact: Any = None
        self._prepared = shapes.fixed if asked.compiled else ()
        if asked.compiled:
            self._exact, self._model = self._compile(shapes)
        self.load_ms = (time.perf_counter() - start) * 1000
        self.name = asked.name(self._device)
        self.threads = threads
        # The tokenizer of a model with one or no segment type does not write token types (RoBERTa, GPT-2, DistilBERT).
        names = ["input_ids", "attention_mask"]
        if (getattr(config, "type_vocab_size", 0) or 0) > 1:
            names.append("token_type_ids")
        self.inputs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name=name, dtype="int64", shape=AXES) for name in names
        }
        self.outputs: Mapping[str, TensorSpec] = {
            "logits": TensorSpec(name="logits", dtype="float32", shape=("batch_size", config.num_labels))
        }
        self.max_length = max_positions(folder)

    @property
    def sparse_weights(self) -> frozenset[str]:
        """Names of the weights that run in 2:4 kernels; none of a variant without ``sparse``."""
        return frozenset(self._sparse.sparse if self._sparse else ())

    @property
    def dense_weights(self) -> Mapping[str, str]:
        """Of ``sparse``: why each other prunable weight does not, by its name."""
        return dict(self._sparse.dense) if self._sparse else {}

    def _compress(self, folder: Path, asked: Variant, shapes: Shapes) -> SparseWeights:
        torch, where = self._torch, str(folder)
        prunable = importlib.import_module("pst.sparsify").prunable_weights(self._model)
        found, others = compress(torch, prunable, where=where)
        if asked.autotune and shapes.faster_sparse is not None:
            others |= known_dense(found, shapes.faster_sparse, where=where)
        elif asked.autotune:
            timer = timer_of(torch, compiled=asked.compiled)
            self.layer_times = autotune(torch, found, shapes=shapes, timer=timer, where=where)
            others |= dense_weights(self.layer_times)
        installed = install_(torch, found, others)
        with ALGORITHMS.searching(), torch.inference_mode():
            for shape in shapes.fixed:
                ids = torch.zeros(shape, dtype=torch.int64, device=self._device)
                self._model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return installed

    @property
    def prepared_shapes(self) -> tuple[tuple[int, int], ...]:
        """See PreparedEngine: of ``compiled`` the shapes that were announced."""
        return self._prepared

    def _compile(self, shapes: Shapes) -> tuple[Any, Any]:
        """For each of the announced shapes by itself, and for all others at once; with the first inference of each."""
        # Of one class of models all that are open count together, and beyond the limit PyTorch compiles no more.
        self._torch._dynamo.config.recompile_limit += len(shapes.fixed) + SPARE_COMPILATIONS
        mode = "reduce-overhead" if self._device == "cuda" else "default"
        exact, general = (self._torch.compile(self._model, mode=mode, dynamic=dynamic) for dynamic in (False, True))
        return exact, general

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """``logits``, shape (batch, labels); raises EngineError for feeds that do not fit."""
        if self._model is None:
            raise EngineError("The engine is closed; open it again.")
        check_feeds(self.inputs, feeds, max_length=self.max_length)
        torch = self._torch
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)  # one setting for the whole process, so every call makes sure of it
        try:
            with torch.inference_mode():
                tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in feeds.items()}
                model = self._exact if feeds["input_ids"].shape in self._prepared else self._model
                logits = model(**{name: tensor.to(self._device) for name, tensor in tensors.items()}).logits
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise EngineError(
                f"PyTorch cannot compile the model ({reason}); choose the engine {self.name.removesuffix('-compiled')}."
            ) from error
        return {"logits": logits.float().cpu().numpy()}

    def close(self) -> None:
        """Drop the model and its memory."""
        self._model = self._exact = None


def _load_model(torch: Any, transformers: Any, folder: Path) -> Any:
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loading = importlib.import_module("pst.structured.storage").from_pretrained(
            "AutoModelForSequenceClassification",
            folder,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in words of our own
        )
    except Exception as error:  # damaged weights surface as OSError, ValueError, RuntimeError or safetensors' own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{folder} cannot be opened as a classifier ({reason.rstrip('.')}); copy or train it again."
        ) from error
    if loading["mismatched_keys"]:
        name, stored, wanted = sorted(loading["mismatched_keys"])[0]
        raise ModelError(
            f"{folder} mixes two models: {name} is {list(stored)} in its weights, {list(wanted)} by its config.json; "
            "copy the whole folder again, or train again."
        )
    if loading["missing_keys"]:
        name = sorted(loading["missing_keys"])[0]
        raise ModelError(f"{folder} holds no trained classifier: {name} is missing. Train it with pst train first.")
    return model


def open_path(path: Path, *, variant: str, threads: int, shapes: Shapes = ANY_SHAPE) -> TorchEngine:
    """Open a run or model folder; serve.engines.open_engine calls this."""
    return TorchEngine(path, variant=variant, threads=threads, shapes=shapes)
