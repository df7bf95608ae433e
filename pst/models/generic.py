"""The rule for a model_type without a file of its own: every linear inside a numbered block.

Transformer blocks live in a ModuleList, so their names hold a number (``layers.3.mlp.up_proj``); embeddings, poolers
and heads do not. A linear that holds several matrices side by side is treated as one matrix.
"""

import re

from pst.models import Architecture

ARCHITECTURE = Architecture(prunable=re.compile(r"(^|\.)\d+\..+"))
