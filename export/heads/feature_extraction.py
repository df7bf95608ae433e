"""No head: the vector of each token, from which embeddings are made."""

from export.heads import Head

HEAD = Head(
    task="feature_extraction",
    auto_class="AutoModel",
    endings=("Model",),
    outputs=("last_hidden_state",),
)
