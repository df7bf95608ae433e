"""MPNet: six linears a layer; embeddings, the bias of relative positions that all layers share, and head stay dense.

Heads lie one after another along the outputs of q, k and v, and along the inputs of o.
"""

import re

from pst.models import Architecture

ARCHITECTURE = Architecture(
    prunable=re.compile(r"encoder\.layer\.\d+\.(attention\.attn\.[qkvo]|intermediate\.dense|output\.dense)$"),
)
