"""BERT and MiniLM: six linears a layer; embeddings, pooler and head stay dense."""

import re

from pst.models import Architecture

ARCHITECTURE = Architecture(
    prunable=re.compile(
        r"encoder\.layer\.\d+\."
        r"(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)$"
    ),
)
