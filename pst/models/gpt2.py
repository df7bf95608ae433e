"""GPT-2: Conv1D modules, stored inputs x outputs, with query, key and value side by side in c_attn."""

import re

from pst.models import Architecture

ARCHITECTURE = Architecture(
    prunable=re.compile(r"h\.\d+\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))$"),
    axis=0,
    fused={"attn.c_attn": 3},
)
