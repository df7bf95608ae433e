"""The key/value cache of a decoder as plain tensors, so that one graph serves the prompt and each next token.

    input_ids        (batch_size, sequence_length)                             the tokens that are new
    attention_mask   (batch_size, past_sequence_length + sequence_length)      0 for padding, of the past as well
    position_ids     (batch_size, sequence_length)                             of the new tokens, padding not counted
    past_key_values.N.key, .value    (batch_size, heads, past_sequence_length, head_width)   of layer N
    logits           (batch_size, sequence_length, vocabulary)
    present.N.key, .value            (batch_size, heads, past_sequence_length + sequence_length, head_width)

The names are Optimum's. A prompt has a past of length 0. Batches are padded on the left. What the graph gives at
padding is finite, but means nothing: where a row of the mask lets a token see nothing, not even PyTorch's own
implementations of attention agree.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from pst.errors import ModelError

PAST, PRESENT = "past_key_values", "present"
PAST_LENGTH, LENGTH = "past_sequence_length", "sequence_length"
TOTAL_LENGTH = f"{PAST_LENGTH} + {LENGTH}"
INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True, kw_only=True)
class CacheLayer:
    """The sizes of one layer's keys and values, without those that vary."""

    heads: int
    """Of keys and values; fewer than those of the queries where queries share them."""
    key_width: int
    value_width: int

    def empty(self, batch_size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        """Zeros for *length* tokens: keys and values, (batch_size, heads, length, width) each."""
        shape = (batch_size, self.heads, length)
        return torch.zeros(*shape, self.key_width), torch.zeros(*shape, self.value_width)


@torch.inference_mode()
def cache_layers(model: Any, *, where: str) -> tuple[CacheLayer, ...]:
    """The layers of *model*'s cache, as a forward pass of three tokens leaves it.

    Raises ModelError, naming *where*: the model sees tokens that follow, keeps no cache, or one that is not made of
    every token's keys and values (sliding windows, recurrent states).
    """
    kind = type(model).__name__
    tokens = torch.tensor([[0, 1, 0], [0, 1, 1]])
    try:
        output = model(input_ids=tokens, position_ids=torch.arange(3).expand(2, 3), use_cache=True)
    except TypeError as error:
        raise ModelError(
            f"{where} is a {kind}, which takes no position_ids; a decoder needs them to be exported with its cache."
        ) from error
    cache = output.get("past_key_values")
    if not torch.equal(output.logits[0, 0], output.logits[1, 0]):
        raise ModelError(
            f"{where} is no causal language model: what a {kind} predicts depends on the tokens that follow. "
            "Export its encoder with --task feature_extraction."
        )
    layers = list(getattr(cache, "layers", ()))
    odd = next((layer for layer in layers if type(layer) is not DynamicLayer), None)
    if odd is not None or not layers:
        held = "no key/value cache" if odd is None else f"a cache of another form ({type(odd).__name__})"
        raise ModelError(
            f"{where} is a {kind} with {held}; text_generation exports models that keep the keys and values of every "
            "token in every layer, such as GPT-2 and Llama."
        )
    return tuple(
        CacheLayer(heads=layer.keys.shape[1], key_width=layer.keys.shape[3], value_width=layer.values.shape[3])
        for layer in layers
    )


def cache_names(prefix: str, layers: int) -> tuple[str, ...]:
    """``prefix.0.key``, ``prefix.0.value``, ``prefix.1.key``, ..."""
    return tuple(f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value"))


def run_cached(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The model's answer in the order of the graph's outputs; *past* is key, value, key, value, ... of all layers."""
    cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
    output = model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
        use_cache=True,
    )  # fmt: skip
    return (output.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))
