"""The model that training starts from as the teacher: when it is asked, what it changes, and when it is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pst.batches import Encoded
from pst.dropout import set_dropout_
from pst.tasks import Prepared
from pst.teacher import knows_task
from pst.train import train
from tests.pst.training import options, report, weights

LABELS = [0, 0, 0, 1, 0, 2, 0, 1]


class Answers(nn.Module):
    """Gives every row the same *logits*, and the loss of that."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.logits.expand(len(labels), -1)
        if len(self.logits) == 1:
            loss = nn.functional.mse_loss(logits[:, 0], labels)
        else:
            loss = nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"loss": loss})()


def prepared(labels: Tensor, task: str, rows: Any = None) -> Prepared:
    encoded = Encoded(columns={"input_ids": [[1, 2]] * len(labels)}, labels=labels, padding={"input_ids": 0})
    return Prepared(
        model=nn.Identity(), tokenizer=None, max_length=2, train=rows or encoded, evaluate=lambda *_, **__: {},
        task=task, fingerprints={}, data={},
    )  # fmt: skip


def knows(teacher: nn.Module, data: Prepared) -> bool:
    return knows_task(teacher, data, batch_size=3, device=torch.device("cpu"))


def test_label_shares_are_what_a_classifier_has_to_beat() -> None:
    data = prepared(torch.tensor(LABELS), "classification")
    shares = [math.log(5 / 8), math.log(2 / 8), math.log(1 / 8)]
    assert not knows(Answers([0.0, 0.0, 0.0]), data)
    assert not knows(Answers([share + 0.1 * (place == 1) for place, share in enumerate(shares)]), data)

    class Better(Answers):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            right = nn.functional.one_hot(labels, 3) * 0.1
            loss = nn.functional.cross_entropy(self.logits + right, labels)
            return type("Output", (), {"loss": loss})()

    assert knows(Better(shares), data)
    assert not knows(Answers([9.0, 0.0]), prepared(torch.zeros(5, dtype=torch.int64), "classification"))


def test_the_spread_of_scores_is_what_a_regression_has_to_beat() -> None:
    scores = torch.tensor([1.0, 2.0, 4.0, 5.0])
    data = prepared(scores, "regression")
    assert not knows(Answers([2.0]), data)

    class Close(nn.Module):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return type("Output", (), {"loss": torch.tensor(2.4)})()

    assert float(scores.var(correction=0)) == 2.5
    assert knows(Close(), data)


def test_a_language_model_is_not_asked() -> None:
    assert knows(nn.Identity(), prepared(torch.zeros(2), "language_modeling", rows=object()))


def test_2_to_4_of_a_model_that_knows_the_task_learns_from_it(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = train(options(tiny_bert, reviews_file, method="dense", steps=60, lr=1e-2), tmp_path / "dense").model
    half = {"pattern": "2:4", "sparsity": None, "calibration": 0}
    train(options(dense, reviews_file, **half), tmp_path / "default")
    assert f"{dense} teaches what becomes of it; --teacher off does without" in " ".join(
        capsys.readouterr().err.split()
    )
    named = {"teacher": str(dense), "distill_weight": 0.9, "distill_hidden": 10.0, "dropout": 0.0}
    train(options(dense, reviews_file, **half, **named), tmp_path / "named")
    train(options(dense, reviews_file, **half, teacher="off"), tmp_path / "alone")
    assert [report(tmp_path / name)["teacher"] for name in ("default", "named", "alone")] == ["start", str(dense), ""]
    assert weights(tmp_path / "default") == weights(tmp_path / "named") != weights(tmp_path / "alone")


def test_a_start_that_does_not_know_the_task_is_no_teacher(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = {"pattern": "2:4", "sparsity": None, "calibration": 0}
    train(options(tiny_bert, reviews_file, **half), tmp_path / "default")
    train(options(tiny_bert, reviews_file, **half, start="pretrained"), tmp_path / "pretrained")
    assert weights(tmp_path / "default") == weights(tmp_path / "pretrained")
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tiny_bert} does not know the task better than by its label shares, so it is no teacher, and" in said
    assert report(tmp_path / "default")["teacher"] == ""
    assert report(tmp_path / "default")["config"]["teacher"] == "start"
    train(options(tiny_bert, reviews_file, **half, start="pretrained", dropout=0.0), tmp_path / "none dropped")
    assert weights(tmp_path / "none dropped") != weights(tmp_path / "pretrained")


def test_dropout_of_layers_and_of_attention(tiny_bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    bert = AutoModelForSequenceClassification.from_pretrained(tiny_bert).train()
    ids = torch.randint(5, 30, (4, 9))
    assert not torch.equal(bert(ids).logits, bert(ids).logits)
    set_dropout_(bert, 0.0)
    assert torch.equal(bert(ids).logits, bert(ids).logits)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=40, attention_dropout=0.5, pad_token_id=0, **small)
    ).train()
    assert not torch.equal(llama(ids).logits, llama(ids).logits)
    set_dropout_(llama, 0.0)
    assert torch.equal(llama(ids).logits, llama(ids).logits)
