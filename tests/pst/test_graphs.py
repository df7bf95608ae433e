"""Steps recorded as CUDA graphs train as the same steps do that are not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pst.graphs import RecordedSteps, padded_length
from pst.methods.pst import PST
from pst.objective import Objective
from pst.pending import Pending, moved
from pst.sparsify import set_sparsity_, sparsify_

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.mark.parametrize(("longest", "most", "expected"), [(1, 64, 16), (16, 64, 16), (17, 64, 32), (60, 62, 62)])
def test_lengths_are_rounded_up_but_never_beyond_the_model(longest: int, most: int, expected: int) -> None:
    assert padded_length(longest, most) == expected


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = BertForSequenceClassification(config)
    return model


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=99, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def _batches(count: int, *, language: bool) -> list[dict[str, Tensor]]:
    """Two shapes in turn, with padding."""
    random = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        ids = torch.randint(1, 99, (8, 16 + 16 * (index % 2)), generator=random)
        mask = (torch.arange(ids.shape[1]) < torch.randint(4, ids.shape[1], (8, 1), generator=random)).long()
        labels = ids if language else torch.randint(2, (8,), generator=random)
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return [{name: value.cuda() for name, value in one.items()} for one in made]


def _train(model: nn.Module, pattern: str, *, record: bool) -> tuple[list[float], RecordedSteps | None]:
    method = PST(lr=1e-3, lr_update=1e-3, lr_scores=1e-2)
    sparsify_(model, method=method, pattern=pattern, generator=torch.Generator().manual_seed(2))
    model.cuda().train()
    groups = method.param_groups(model)
    trainable = [parameter for one in groups for parameter in one["params"]]
    optimizer = torch.optim.AdamW(groups, fused=True, capturable=True)
    for one in optimizer.param_groups:
        one["lr"] = torch.tensor(one["lr"], device="cuda")

    objective = Objective(label_smoothing=0.1)  # beside which the model computes a loss that nobody uses

    def step(batch: dict[str, Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = objective(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        return loss.detach()

    recorded = RecordedSteps(step) if record else None
    losses = []
    for index, batch in enumerate(_batches(16, language=hasattr(model, "lm_head"))):
        set_sparsity_(model, min(0.5, index / 20))
        losses.append(float((recorded or step)(batch)))
    return losses, recorded


@on_gpu
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("make", [_bert, _gpt2])
def test_recorded_steps_train_alike(make: Callable[[], nn.Module], pattern: str) -> None:
    """Masks and learning rates change between the replays, as in training."""
    base = make()
    plain, other = copy.deepcopy(base), copy.deepcopy(base)
    expected, _ = _train(plain, pattern, record=False)
    found, recorded = _train(other, pattern, record=True)
    assert recorded is not None
    assert len(recorded.graphs) == 2
    assert found == pytest.approx(expected, rel=2e-3)
    for (name, mine), theirs in zip(other.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]


@on_gpu
def test_what_a_recorded_step_says_can_be_read_after_the_next() -> None:
    """The next replay writes to the same place."""
    count = torch.zeros(1, device="cuda")

    def step(batch: dict[str, Tensor]) -> Tensor:
        return count.add_(batch["x"]).clone()

    recorded = RecordedSteps(step)
    gpu: Any = torch.cuda
    gpu._sleep(200_000_000)
    found = [Pending(recorded({"x": moved(torch.ones(1), count.device)})) for _ in range(8)]
    assert len(recorded.graphs) == 1
    assert [one.get() for one in found] == [[value] for value in range(1, 9)]


@on_gpu
def test_a_step_that_waits_for_the_gpu_runs_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    linear = nn.Linear(4, 1).cuda()

    def step(batch: dict[str, Tensor]) -> Tensor:
        value: Tensor = linear(F.dropout(batch["x"], 0.5) * 0 + batch["x"]).mean()
        if value.item() > 1e9:  # what a recording cannot know
            raise AssertionError
        return value.detach()

    recorded, batch = RecordedSteps(step), {"x": torch.randn(3, 4, device="cuda")}
    values = [float(recorded(batch)) for _ in range(5)]
    assert recorded.refused
    assert not recorded.graphs
    assert len(set(values)) == 1
    assert "without CUDA graphs" in capsys.readouterr().err
