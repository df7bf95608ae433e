"""The loss against its terms written out, one row and one token at a time."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pst.errors import ModelError
from pst.loading import load_tokenizer
from pst.objective import Objective, hidden_loss, logits_loss, squares
from pst.sparsify import set_sparsity_, sparsify_
from pst.teacher import load_teacher
from pst.train import train
from tests.conftest import save_tokenizer
from tests.pst.training import options, report, weights


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def batch(rows: int = 5, tokens: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, tokens + 1, (rows,), generator=generator)
    return {
        "input_ids": torch.randint(5, 30, (rows, tokens), generator=generator),
        "attention_mask": (torch.arange(tokens) < lengths[:, None]).long(),
        "labels": torch.randint(2, (rows,), generator=generator),
    }


def divergence(z: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """KL(softmax(taught / T) || softmax(z / T)) of one row, times T^2."""
    p, q = torch.softmax(taught / temperature, -1), torch.softmax(z / temperature, -1)
    return (p * (p / q).log()).sum() * temperature**2


def test_logits_of_a_classifier() -> None:
    torch.manual_seed(0)
    z, taught, labels = torch.randn(6, 4), torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    expected = sum(divergence(*row, 3.0) for row in zip(z, taught, strict=True)) / 6
    torch.testing.assert_close(logits_loss(z, taught, labels, 3.0), expected)
    assert logits_loss(z, z, labels, 3.0).abs() < 1e-6
    torch.testing.assert_close(logits_loss(z[:, :1], taught[:, :1], labels, 3.0), ((z - taught)[:, 0] ** 2).mean())


def test_logits_of_a_language_model_count_at_targets_alone() -> None:
    torch.manual_seed(0)
    z, taught = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    labels = torch.tensor([[-100, -100, 4, 5, 6], [-100, 3, 2, -100, -100]])
    places = [(row, t) for row in range(2) for t in range(4) if labels[row, t + 1] != -100]
    expected = sum(divergence(z[place], taught[place], 2.0) for place in places) / len(places)
    torch.testing.assert_close(logits_loss(z, taught, labels, 2.0), expected)


def test_hidden_states_at_the_same_depth() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    states = tuple(torch.randn(2, 3, 4) for _ in range(3))  # 2 layers
    taught = tuple(torch.randn(2, 3, 4) for _ in range(7))  # 6 layers: 3 and 6 are as deep
    real = [(0, 0), (0, 1), (1, 0)]
    pairs = [(states[1], taught[3]), (states[2], taught[6])]
    shares = [sum((s - t)[p].square().sum() for p in real) / sum(t[p].square().sum() for p in real) for s, t in pairs]
    expected = torch.stack([torch.as_tensor(share) for share in shares]).mean()
    torch.testing.assert_close(hidden_loss(states, taught, mask), expected)


def test_hidden_states_of_parts_add_up() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    states, taught = (tuple(torch.randn(4, 3, 4) for _ in range(3)) for _ in range(2))
    parts = [(slice(0, 1), 0.25), (slice(1, 4), 0.75)]
    pairs = [(SimpleNamespace(hidden_states=tuple(state[rows] for state in taught)), mask[rows]) for rows, _ in parts]
    whole = sum((squares(*pair) for pair in pairs), torch.zeros(2))
    losses = [
        hidden_loss(tuple(state[rows] for state in states), lesson.hidden_states, real, whole=whole * share) * share
        for (rows, share), (lesson, real) in zip(parts, pairs, strict=True)
    ]
    torch.testing.assert_close(losses[0] + losses[1], hidden_loss(states, taught, mask))


def test_label_smoothing(tiny_bert: Path) -> None:
    model, inputs = loaded(tiny_bert), batch()
    z = model(**inputs).logits
    plain = F.cross_entropy(z, inputs["labels"])
    assert torch.equal(Objective()(model, inputs), plain)
    spread = -torch.log_softmax(z, -1).mean()  # the loss against equal probabilities
    torch.testing.assert_close(Objective(label_smoothing=0.1)(model, inputs), 0.9 * plain + 0.1 * spread)


def test_parts_add_up(tiny_bert: Path) -> None:
    model, inputs = loaded(tiny_bert), batch()
    teacher = load_teacher(str(tiny_bert), model, load_tokenizer(str(tiny_bert)))
    sparsify_(model)
    set_sparsity_(model, 0.5)
    one, none = (Objective(teacher=teacher, weight=weight)(model, inputs) for weight in (1.0, 0.0))
    torch.testing.assert_close(none, Objective()(model, inputs))
    assert one > 0.01
    both = Objective(teacher=teacher, weight=0.25)(model, inputs)
    torch.testing.assert_close(both, 0.75 * none + 0.25 * one)
    logits_alone = Objective(teacher=teacher, weight=1.0, hidden=0.0)(model, inputs)
    states = model(**inputs, output_hidden_states=True).hidden_states
    taught = teacher(**inputs, output_hidden_states=True).hidden_states
    hidden = hidden_loss(states, taught, inputs["attention_mask"])
    torch.testing.assert_close(one - logits_alone, hidden)
    more = Objective(teacher=teacher, weight=1.0, hidden=3.0)(model, inputs)
    torch.testing.assert_close(more - logits_alone, 3 * hidden)


def test_the_teacher_neither_trains_nor_drops(tiny_bert: Path) -> None:
    model, inputs = loaded(tiny_bert), batch()
    teacher = load_teacher(str(tiny_bert), model, load_tokenizer(str(tiny_bert)))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    Objective(teacher=teacher)(model.train(), inputs).backward()  # type: ignore[no-untyped-call]
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_run_with_a_teacher(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    dense = train(options(tiny_bert, reviews_file, method="dense", steps=6), tmp_path / "dense").model
    config = options(dense, reviews_file, teacher=str(dense), accumulate=2)
    train(config, tmp_path / "taught")
    train(options(dense, reviews_file), tmp_path / "alone")
    assert report(tmp_path / "taught")["config"]["teacher"] == str(dense)
    assert report(tmp_path / "taught")["sparsity"]["measured"] == pytest.approx(0.5)
    assert weights(tmp_path / "taught") != weights(tmp_path / "alone")


def test_teachers_that_cannot_teach(tiny_bert: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    model, tokenizer = loaded(tiny_bert), load_tokenizer(str(tiny_bert))
    with pytest.raises(ModelError, match="does not exist"):
        load_teacher(str(tmp_path / "none"), model, tokenizer)
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    size = save_tokenizer(tmp_path / "three", model_max_length=64)
    BertForSequenceClassification(BertConfig(vocab_size=size, num_labels=3, **tiny)).save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="has 3 outputs, the model 2"):
        load_teacher(str(tmp_path / "three"), model, tokenizer)
    BertModel(BertConfig(vocab_size=size, **tiny)).save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"has no head for this task \(BertModel\)"):
        load_teacher(str(tmp_path / "bare"), model, tokenizer)
    other = load_tokenizer(str(tiny_gpt2))
    other.add_tokens(["unheard"])
    with pytest.raises(ModelError, match="another vocabulary"):
        load_teacher(str(tiny_bert), model, other)


def test_a_teacher_of_another_width(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    size = save_tokenizer(tmp_path, model_max_length=64)
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=size, **tiny)).save_pretrained(tmp_path)
    model, inputs = loaded(tiny_bert), batch()
    teacher = load_teacher(str(tmp_path), model, load_tokenizer(str(tiny_bert)))
    with_hidden, without = (Objective(teacher=teacher, hidden=hidden)(model, inputs) for hidden in (1.0, 0.0))
    assert torch.equal(with_hidden, without)
