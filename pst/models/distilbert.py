"""DistilBERT: six linears a layer; embeddings and head (pre_classifier, classifier) stay dense.

Heads lie one after another along the outputs of q_lin, k_lin and v_lin, and along the inputs of out_lin.
"""

import re

from pst.models import Architecture, Layout

ARCHITECTURE = Architecture(
    prunable=re.compile(r"transformer\.layer\.\d+\.(attention\.(q|k|v|out)_lin|ffn\.lin[12])$"),
    layout=Layout(
        block=re.compile(r"transformer\.layer\.\d+$"),
        attention="attention",
        attention_inputs=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_output="attention.out_lin",
        feed_forward_inputs=("ffn.lin1",),
        feed_forward_output="ffn.lin2",
        neurons_field="hidden_dim",
    ),
)
