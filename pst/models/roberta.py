"""RoBERTa: the linears of BERT under the same names; embeddings, pooler and head stay dense.

Heads lie one after another along the outputs of query, key and value, and along the inputs of attention.output.dense.
"""

from pst.models.bert import ARCHITECTURE

__all__ = ["ARCHITECTURE"]
