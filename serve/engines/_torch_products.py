"""Matrix products of PyTorch on an NVIDIA GPU: dense by cuBLAS, 2:4 by cuSPARSELt with its algorithm search.

Times are the GPU's own, between two CUDA events. Before each, the GPU is kept busy for as long as the host needs to
launch the products, so that no launch is waited for: what a CUDA graph would reach, and any runtime at large sizes. And
the L2 cache is overwritten, so that weights come from memory as in a model whose other layers ran in between.

y = x W^T, x (tokens, inputs), W (outputs, inputs). cuSPARSELt gets the compressed W, and x^T as a view;
transpose_result lets it write y (tokens, outputs) in rows, as every next layer reads it; without, in columns, which
another product can read, but not a norm. In rows cuSPARSELt 0.8.0 fails on an H100 (its search ends in an internal
error or an illegal instruction, its default takes 100 ms and more), so that columns are what is measured. The search
returns an algorithm, and how the inputs are split among blocks (split_k and its mode); the product is then called with
both.
"""

import importlib
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pst.errors import EngineError, ModelError
from pst.files import resolve_model
from serve.closing import Closing
from serve.predict.products import SEED, Call, Product, Weights

DEVICE = "cuda"
FLUSH_BYTES = 256 * 2**20
"""More than the L2 cache of any GPU so far."""
SLEEP_MARGIN_S, CYCLES_PER_S = 0.0002, 2.0e9
"""A GPU's clock at most; at a lower one the sleep is longer, which does no harm."""
TOKENS_MULTIPLE, WIDTH_MULTIPLE = 16, 32
"""What cuSPARSELt wants of fp16 and bf16: tokens are filled up, and other layers stay dense."""
TOLERANCE = 0.02
"""Largest difference between a sparse product and the dense one of the same weights, against the largest output."""
ALGORITHM_WORDS = "cuSPARSELt, algorithm {0}, split_k {1}"


def load_torch() -> Any:
    """torch, where it sees a GPU. Raises EngineError."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise EngineError(
            'PyTorch is needed for this; install it with: pip install "sparse-pst[train,gpu]".'
        ) from error
    if not torch.cuda.is_available():
        raise EngineError(
            "PyTorch sees no NVIDIA GPU on this machine, so that no 2:4 product can be measured; run this where "
            "nvidia-smi lists one, with PyTorch for CUDA."
        )
    return torch


class GpuTimer:
    """Milliseconds of the GPU for whatever is launched."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def call(self, run: Callable[[], object]) -> Call:
        """*run* launches; it is called a few times first, which shows how long the host needs."""
        run()
        seconds = min(self._host_seconds(run) for _ in range(2))
        cycles = int((1.5 * seconds + SLEEP_MARGIN_S) * CYCLES_PER_S)

        def measured() -> float:
            self._torch.cuda._sleep(cycles)
            self._flush.zero_()
            self._start.record()
            run()
            self._end.record()
            self._end.synchronize()
            return float(self._start.elapsed_time(self._end))

        return measured

    def _host_seconds(self, run: Callable[[], object]) -> float:
        self._torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        self._torch.cuda.synchronize()
        return seconds


class TorchDense:
    """cuBLAS, one product after another."""

    kernel = "cuBLAS"

    def __init__(self, torch: Any, timer: GpuTimer, weights: Sequence[Any]) -> None:
        self._torch, self._timer, self._weights = torch, timer, weights

    def at(self, tokens: int) -> Call:
        """See Product."""
        torch, weights = self._torch, self._weights
        value = random_inputs(torch, tokens, weights[0])

        def run() -> None:
            for weight in weights:
                torch.nn.functional.linear(value, weight)

        return self._timer.call(run)


class TorchTwoOfFour:
    """cuSPARSELt, one product after another; ``kernel`` tells the algorithm of the last ``at``.

    *rows*: whether outputs are written in rows, as a contiguous tensor has them, or in columns.
    """

    kernel = "cuSPARSELt"

    def __init__(self, torch: Any, timer: GpuTimer, weights: Sequence[Any], *, rows: bool = False) -> None:
        self._torch, self._timer, self._rows = torch, timer, rows
        self._packed = [torch._cslt_compress(weight) for weight in weights]
        self._reference = weights[0]

    def at(self, tokens: int) -> Call:
        """See Product. Raises EngineError where the product is wrong, or refused."""
        torch = self._torch
        filled = -(-tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
        value = random_inputs(torch, filled, self._reference).t()
        first, rows = self._packed[0], self._rows
        try:
            *chosen, _ = torch._C._cusparselt.mm_search(first, value, None, None, None, rows)
            found = torch._cslt_sparse_mm(first, value, None, None, None, rows, *chosen)
        except RuntimeError as error:
            raise EngineError(f"cuSPARSELt refuses the product: {str(error).splitlines()[0]}") from error
        check_product(found if rows else found.t(), torch.nn.functional.linear(value.t(), self._reference))
        self.kernel = ALGORITHM_WORDS.format(*chosen)

        def run() -> None:
            for packed in self._packed:
                torch._cslt_sparse_mm(packed, value, None, None, None, rows, *chosen)

        return self._timer.call(run)


def check_product(found: Any, expected: Any) -> None:
    """Raise EngineError where cuSPARSELt's product is not cuBLAS's, but for rounding."""
    if found.shape != expected.shape:
        raise EngineError(f"cuSPARSELt's product has the shape {tuple(found.shape)}, not {tuple(expected.shape)}.")
    error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    if not error <= TOLERANCE:
        raise EngineError(f"cuSPARSELt's product differs from cuBLAS's by {error:.1%} of the largest output.")


def random_inputs(torch: Any, tokens: int, weight: Any) -> Any:
    """Normally distributed (tokens, inputs), of *weight*'s type, the same each time."""
    generator = torch.Generator(device=DEVICE).manual_seed(SEED)
    shape = (tokens, weight.shape[1])
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=weight.dtype)


def random_pair(torch: Any, outputs: int, inputs: int, dtype: Any, *, device: str = DEVICE) -> tuple[Any, Any]:
    """Weights (outputs, inputs) on *device*, and the same with two of every four in a row set to zero by chance."""
    generator = torch.Generator(device=device).manual_seed(SEED)
    dense = torch.randn((outputs, inputs), generator=generator, device=device, dtype=dtype) * inputs**-0.5
    ways = torch.tensor(list(itertools.permutations((True, True, False, False))), device=device).unique(dim=0)
    drawn = torch.randint(len(ways), (outputs * inputs // 4,), generator=generator, device=device)
    return dense, dense * ways[drawn].reshape(outputs, inputs)


def fits(outputs: int, inputs: int) -> bool:
    """Whether cuSPARSELt takes a weight of this shape."""
    return not outputs % WIDTH_MULTIPLE and not inputs % WIDTH_MULTIPLE


class TorchProducts(Closing):
    """See serve.predict.products.Products."""

    name, dtype = "torch-cuda", "float16"

    def __init__(self, path: Path) -> None:
        self._torch: Any = load_torch()
        self._timer = GpuTimer(self._torch)
        self._folder = resolve_model(path)
        self._model: Any = None
        self._can_multiply = has_cusparselt(self._torch)
        self.why_none = (
            "of PyTorch's kernels on a GPU only 2:4 ones (cuSPARSELt) save time at the density of a trained model, and "
            "these zeros are multiplied like any other number; use --pattern 2:4 or --pattern structured"
            if self._can_multiply
            else "this PyTorch or GPU has no cuSPARSELt; it takes an NVIDIA GPU from Ampere on, and PyTorch for CUDA"
        )

    def model(self, batch: int, sequence: int) -> Call:
        """The whole model with random weights; the GPU's time, launches left out."""
        if self._model is None:
            self._model = _random_model(self._torch, self._folder)
        torch, model = self._torch, self._model
        generator = torch.Generator(device=DEVICE).manual_seed(SEED)
        size, shape = int(model.config.vocab_size), (batch, sequence)
        ids = torch.randint(size, shape, generator=generator, device=DEVICE)

        def run() -> None:
            with torch.inference_mode():
                model(input_ids=ids)

        return self._timer.call(run)

    def dense(self, weights: Weights) -> Product:
        """See Products."""
        return TorchDense(self._torch, self._timer, self._on_gpu(weights))

    def sparse(self, spec: str, weights: Weights) -> Product | None:
        """cuSPARSELt, for 2:4 and shapes that it takes."""
        if spec != "2:4" or not self._can_multiply or not fits(*weights[0].shape):
            return None
        return TorchTwoOfFour(self._torch, self._timer, self._on_gpu(weights))

    def _on_gpu(self, weights: Weights) -> list[Any]:
        return [self._torch.from_numpy(weight).to(DEVICE, self._torch.float16) for weight in weights]

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._model = None
        self._torch.cuda.empty_cache()


def has_cusparselt(torch: Any) -> bool:
    """Whether this build has cuSPARSELt with its search, and the GPU runs it."""
    if not hasattr(torch._C, "_cusparselt") or torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        torch._cslt_compress(torch.tensor([[1.0, 1, 0, 0] * 16] * 64, dtype=torch.float16, device=DEVICE))
    except RuntimeError:
        return False
    return True


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of the model that config.json describes, without its weights."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise EngineError(
            f"{folder} has no model.safetensors, and PyTorch, which reads its config.json, is not installed; "
            'install it with: pip install "sparse-pst[train,cpu]".'
        ) from error
    with torch.device("meta"):
        model = _from_config(folder)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _random_model(torch: Any, folder: Path) -> Any:
    torch.manual_seed(SEED)
    with torch.device(DEVICE):
        model = _from_config(folder)
    return model.to(torch.float16).eval()


def _from_config(folder: Path) -> Any:
    transformers = importlib.import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        config.use_cache = False
        return transformers.AutoModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{folder} is no model that transformers knows ({reason}); copy it again.") from error


def open_products(path: Path, *, variant: str, threads: int) -> TorchProducts:
    """On a GPU. Raises EngineError without one."""
    if variant not in ("", "cuda"):
        raise EngineError("pst predict measures PyTorch on an NVIDIA GPU alone; choose torch-cuda or onnxruntime.")
    return TorchProducts(path)
