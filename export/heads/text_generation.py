"""The next token: a causal language model, with its key/value cache."""

from export.heads import Head

HEAD = Head(
    task="text_generation",
    auto_class="AutoModelForCausalLM",
    endings=("ForCausalLM", "LMHeadModel"),
    outputs=("logits",),
    agrees_along=-1,
    cached=True,
)
