"""What the name of a torch engine asks for: ``torch``, then words with hyphens, in any order.

    cpu, cuda   the device; without one, a GPU where there is one
    fp16        weights and products in half precision; on a GPU
    compiled    torch.compile, on a GPU with CUDA graphs (mode reduce-overhead)
    sparse      weights that hold 2:4 in cuSPARSELt's kernels, the rest in fp16; on a GPU
    autotune    with sparse: of those weights the ones that are faster so at the announced shapes, which are timed

So ``torch-cuda-fp16-compiled`` is a fair dense baseline of ``torch-cuda-sparse-compiled``.
"""

from dataclasses import dataclass

from pst.errors import EngineError

WORDS = ("cpu", "cuda", "fp16", "compiled", "sparse", "autotune")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One combination of the words."""

    device: str
    """cpu, cuda, or nothing for the better one."""
    half: bool
    compiled: bool
    sparse: bool
    autotune: bool

    def name(self, device: str) -> str:
        """The engine's name on *device*, its words in one order."""
        words = [device, *(["fp16"] if self.half and not self.sparse else [])]
        last = (("sparse", self.sparse), ("autotune", self.autotune), ("compiled", self.compiled))
        words += [word for word, on in last if on]
        return "-".join(["torch", *words])


def parse_variant(text: str) -> Variant:
    """The part of an engine's name behind ``torch-``. Raises EngineError for words that are unknown or do not fit."""
    words = [word for word in text.split("-") if word and text != "auto"]
    unknown = [word for word in words if word not in WORDS]
    if unknown or len(set(words)) < len(words) or {"cpu", "cuda"} <= set(words):
        raise EngineError(
            f"torch-{text} is not an engine; choose torch, torch-cpu or torch-cuda, with -fp16, -compiled, "
            "-sparse or -sparse-autotune behind it where you want that."
        )
    if "autotune" in words and "sparse" not in words:
        raise EngineError(f"torch-{text} has nothing to tune; choose torch-cuda-sparse-autotune.")
    needs_gpu = [word for word in words if word in ("fp16", "sparse")]
    if needs_gpu and "cpu" in words:
        raise EngineError(f"PyTorch is quick with {needs_gpu[0]} on a GPU alone; choose torch-cpu or torch-cuda-fp16.")
    return Variant(
        device="cpu" if "cpu" in words else "cuda" if needs_gpu or "cuda" in words else "",
        half=bool(needs_gpu),
        compiled="compiled" in words,
        sparse="sparse" in words,
        autotune="autotune" in words,
    )
