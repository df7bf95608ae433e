"""DistilBERT: six linears a layer; embeddings and head (pre_classifier, classifier) stay dense.

Heads lie one after another along the outputs of q_lin, k_lin and v_lin, and along the inputs of out_lin.
"""

import re

from pst.models import Architecture

ARCHITECTURE = Architecture(
    prunable=re.compile(r"transformer\.layer\.\d+\.(attention\.(q|k|v|out)_lin|ffn\.lin[12])$"),
)
