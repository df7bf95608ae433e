"""Tiny models of every architecture with several heads, and what the tests ask of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst.structured.choose import masked_matrix
from pst.structured.units import Member
from tests.encoders import ARCHITECTURES, make_encoder

__all__ = ["ARCHITECTURES", "logits", "make", "matrix", "move_"]


def make(folder: Path, model_type: str, head: str = "classification", **more: Any) -> Path:
    """Two layers of 32 features with four heads (Llama: two that are shared by two each) and 64 neurons."""
    sizes: dict[str, Any] = {"num_attention_heads": 4}
    sizes |= {"llama": {"num_key_value_heads": 2}, "gpt2": {"n_inner": 64}, "distilbert": {"hidden_dim": 64}}.get(
        model_type, {}
    )
    return make_encoder(folder, model_type, head, **(sizes | more))


def matrix(member: Member) -> tuple[Any, Tensor]:
    """What is attached to the member's matrix, with all that its method gave it, and its original."""
    return masked_matrix(member)


@torch.no_grad()
def move_(model: nn.Module) -> None:
    """Values as training would leave them."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def logits(model: Any) -> Tensor:
    """Of three rows, two of which are padded."""
    ids = torch.randint(5, 30, (3, 17), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, 14:] = 0
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return found
