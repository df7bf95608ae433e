"""GPT-2: Conv1D modules, stored inputs x outputs, with query, key and value side by side in c_attn."""

import re

from pst.models import Architecture, Layout

ARCHITECTURE = Architecture(
    prunable=re.compile(r"h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))$"),
    axis=0,
    fused={"attn.c_attn": 3},
    layout=Layout(
        block=re.compile(r"h\.\d+$"),
        attention="attn",
        attention_inputs=("attn.c_attn",),
        attention_output="attn.c_proj",
        feed_forward_inputs=("mlp.c_fc",),
        feed_forward_output="mlp.c_proj",
        fused=3,
        crossed="crossattention",
        neurons_field="n_inner",
    ),
)
