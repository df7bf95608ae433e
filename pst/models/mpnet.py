"""MPNet: six linears a layer; embeddings, the bias of relative positions that all layers share, and head stay dense.

Heads lie one after another along the outputs of q, k and v, and along the inputs of o.
"""

import re

from pst.models import Architecture, Layout

ARCHITECTURE = Architecture(
    prunable=re.compile(r"encoder\.layer\.\d+\.(attention\.attn\.[qkvo]|intermediate\.dense|output\.dense)$"),
    layout=Layout(
        block=re.compile(r"encoder\.layer\.\d+$"),
        attention="attention.attn",
        attention_inputs=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        attention_output="attention.attn.o",
        feed_forward_inputs=("intermediate.dense",),
        feed_forward_output="output.dense",
    ),
)
