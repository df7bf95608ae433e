"""Several processes that train one model, started by ``torchrun`` or ``accelerate launch`` (both set WORLD_SIZE, ...).

Data parallel: every process holds the whole model, takes its share of each batch, and adds its gradients to those of
the others. All of them then make the same step, so the weights stay equal. Masks are chosen by each from equal scores;
the first process's are handed to the others all the same, so that no difference in rounding can ever split them.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pst.errors import ConfigError, PSTError
from pst.masked_weight import MaskedWeight

T = TypeVar("T")

BUCKET = 2**24
"""Elements that are summed in one exchange: 64 MiB of float32."""
TIMEOUT = timedelta(minutes=30)
"""Longest wait for another process; the first one may evaluate or write while the others wait."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among all that train together."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of *items*: every count-th."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """The *value* of every process, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def first_does(self, what: Callable[[], T]) -> T:
        """What *what* returns to the first process, which alone calls it; a PSTError of its is raised in every one."""
        if self.count == 1:
            return what()
        outcome: tuple[Any, PSTError | None] = (None, None)
        if self.first:
            try:
                outcome = what(), None
            except PSTError as error:
                outcome = None, error
        value, refusal = self.gather(outcome)[0]
        if refusal is not None:
            raise refusal
        return cast(T, value)

    def any(self, value: bool, device: torch.device) -> bool:
        """Whether *value* holds in any process."""
        if self.count == 1:
            return value
        flag = torch.tensor(int(value), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def sum_(self, tensor: Tensor) -> Tensor:
        """*tensor*, in place the sum over all processes."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def sum_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes; one that has none counts as zeros."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (sum(g.numel() for g in bucket) + parameter.numel() > BUCKET):
                _sum_together_(bucket)
                bucket = []
            bucket.append(parameter.grad)
        if bucket:
            _sum_together_(bucket)

    @torch.no_grad()
    def share_(self, tensor: Tensor) -> None:
        """Give every process the first one's *tensor*, in place."""
        if self.count > 1:
            whole = tensor.contiguous()
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)

    @torch.no_grad()
    def share_masks_(self, model: nn.Module) -> None:
        """Give every process the first one's masks."""
        if self.count > 1:
            for module in model.modules():
                if isinstance(module, MaskedWeight):
                    dist.broadcast(module.mask.view(torch.uint8), src=0)  # not every backend knows bool


def _sum_together_(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The group that the launcher has started, or a single process; *device* is TrainConfig's.

    Raises ConfigError under FSDP, which splits the weights that a mask has to see whole.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in {"1", "true"} or "FSDP_VERSION" in os.environ:
        raise ConfigError(
            "FSDP splits each weight over the processes, but its mask is chosen from the whole weight; "
            "launch with plain data parallelism (accelerate config: multi-GPU, or torchrun)."
        )
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"The launcher started more processes on this machine than it has GPUs ({torch.cuda.device_count()}); "
                "start one a GPU."
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(rank=dist.get_rank(), count=count, local_rank=local_rank)
    finally:
        dist.destroy_process_group()
