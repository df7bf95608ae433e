"""ELECTRA, the discriminator: the linears of BERT under the same names.

What widens its narrow embeddings (embeddings_project), the head and the pooler of some heads stay dense. Heads lie one
after another along the outputs of query, key and value, and along the inputs of attention.output.dense.
"""

from pst.models.bert import ARCHITECTURE

__all__ = ["ARCHITECTURE"]
