"""The first and the last token of an answer within the text."""

from export.heads import Head

HEAD = Head(
    task="question_answering",
    auto_class="AutoModelForQuestionAnswering",
    endings=("ForQuestionAnswering",),
    outputs=("start_logits", "end_logits"),
    agrees_along=-1,
)
