"""Llama and its kin (SmolLM2): seven linears a layer; embeddings, which may be the head as well, and head stay dense.

Heads lie one after another along the outputs of q_proj, k_proj and v_proj, and along the inputs of o_proj. k_proj and
v_proj may have fewer: each of their heads serves as many heads of q_proj in a row. gate_proj and up_proj are multiplied
with each other, output by output, so a neuron is a row of both and a column of down_proj.
"""

import re

from pst.models import Architecture, Layout

ARCHITECTURE = Architecture(
    prunable=re.compile(r"layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)$"),
    layout=Layout(
        block=re.compile(r"layers\.\d+$"),
        attention="self_attn",
        attention_inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_output="self_attn.o_proj",
        feed_forward_inputs=("mlp.gate_proj", "mlp.up_proj"),
        feed_forward_output="mlp.down_proj",
        heads_fields=("num_attention_heads", "num_key_value_heads"),
    ),
)
