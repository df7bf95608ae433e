"""A label for a text, or a number where the model has a single label: a regression."""

from export.heads import Head

HEAD = Head(
    task="classification",
    auto_class="AutoModelForSequenceClassification",
    endings=("ForSequenceClassification",),
    outputs=("logits",),
    labelled=True,
    agrees_along=-1,
)
