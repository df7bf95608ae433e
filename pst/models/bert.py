"""BERT and MiniLM: six linears a layer; embeddings, pooler and head stay dense."""

import re

from pst.models import Architecture, Layout

ARCHITECTURE = Architecture(
    prunable=re.compile(
        r"encoder\.layer\.\d+\."
        r"(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)$"
    ),
    layout=Layout(
        block=re.compile(r"encoder\.layer\.\d+$"),
        attention="attention.self",
        attention_inputs=("attention.self.query", "attention.self.key", "attention.self.value"),
        attention_output="attention.output.dense",
        feed_forward_inputs=("intermediate.dense",),
        feed_forward_output="output.dense",
        crossed="crossattention",
    ),
)
