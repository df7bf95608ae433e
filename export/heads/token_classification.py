"""A label for each token."""

from export.heads import Head

HEAD = Head(
    task="token_classification",
    auto_class="AutoModelForTokenClassification",
    endings=("ForTokenClassification",),
    outputs=("logits",),
    labelled=True,
    agrees_along=-1,
)
