"""Tiny random causal language models, dense and pruned, as folders."""

import json
from pathlib import Path
from typing import Any

from .conftest import save_tokenizer

KINDS = ("gpt2", "llama")


def make_decoder(folder: Path, kind: str, *, positions: int = 64, seed: int = 0) -> Path:
    """Write a random decoder of two layers and 32 features, with a vocabulary of 35 words; returns *folder*.

    Weights are large, so that what it predicts depends on what it reads.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    size = save_tokenizer(folder, model_max_length=positions)
    torch.manual_seed(seed)
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=positions, initializer_range=0.3, **ends
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=positions,
                initializer_range=0.3,
                **ends,
            )
        )
    model.save_pretrained(folder)
    return folder


def prune(folder: Path, pattern: str) -> Path:
    """Prune the model in *folder* by magnitude, whatever its class, and write its sparsity.json; returns *folder*.

    Half of the weights go, three quarters for 1:4.
    """
    import transformers
    from safetensors.torch import load_file, save_file

    from pst.patterns import parse_pattern
    from pst.sparsify import prunable_weights

    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, named).from_pretrained(folder)
    rows, sparsity = [], 0.75 if pattern == "1:4" else 0.5
    tensors = load_file(folder / "model.safetensors")
    for item in prunable_weights(model):
        weight = item.weight.data
        pruned = weight * parse_pattern(pattern).mask(weight.abs(), sparsity, axis=item.axis)
        tensors[item.name] = pruned.contiguous()
        density = float((pruned != 0).double().mean())
        rows.append({"name": item.name, "shape": list(weight.shape), "axis": item.axis, "density": density})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = {
        "schema_version": 1, "pattern": pattern, "sparsity": {"requested": sparsity, "measured": sparsity},
        "weights": rows,
    }  # fmt: skip
    (folder / "sparsity.json").write_text(json.dumps(report), encoding="utf-8")
    return folder
