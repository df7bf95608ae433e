"""Token sequences: labels, weights and losses against literal loops, and which models can learn them."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pst.distributed import Processes
from pst.errors import ModelError
from pst.methods.magnitude import Magnitude
from pst.objective import IGNORED, Objective
from pst.scratch import make_gpt2
from pst.sequences import Sequences, load_causal, token_loss
from pst.sparsify import set_sparsity_, sparsify_
from tests.conftest import save_tokenizer

CPU = torch.device("cpu")
END = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "model"
    make_gpt2(path, ["a few words", "to learn from"], layers=2, width=16, heads=2, positions=32, vocabulary=280)
    return path


@pytest.fixture
def model(folder: Path) -> Any:
    return load_causal(str(folder))[0]


def rows(*, count: int, seed: int) -> Sequences:
    """Random rows of 3 to 12 tokens, in which the end of text stands anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, number: int = 1) -> list[int]:
        return torch.randint(low, high, (number,), generator=generator).tolist()

    ids = [draw(0, 280, draw(3, 13)[0]) for _ in range(count)]
    return Sequences(ids=ids, starts=[draw(1, len(row))[0] for row in ids], pad=END)


def literal_losses(model: nn.Module, sequences: Sequences, row: int) -> list[float]:
    """-log p of each target of one row, alone and unpadded, a position at a time."""
    ids, start = sequences.ids[row], sequences.starts[row]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return [-math.log(torch.softmax(logits[t - 1].double(), -1)[ids[t]].item()) for t in range(start, len(ids))]


def test_labels_are_the_targets_alone() -> None:
    sequences = rows(count=9, seed=1)
    chosen = [7, 0, 3]
    batch = sequences.batch(chosen)
    longest = max(len(sequences.ids[row]) for row in chosen)
    assert {name: tensor.shape for name, tensor in batch.items()} == dict.fromkeys(batch, (3, longest))
    for position, row in enumerate(chosen):
        for t in range(longest):
            there = t < len(sequences.ids[row])
            token = sequences.ids[row][t] if there else END
            target = there and t >= sequences.starts[row]
            assert batch["input_ids"][position, t] == token
            assert batch["attention_mask"][position, t] == int(there)
            assert batch["labels"][position, t] == (token if target else IGNORED)


def test_weight_counts_what_the_shifted_loss_counts() -> None:
    sequences = rows(count=20, seed=2)
    for chosen in ([0], [3, 5], list(range(20))):
        labels = sequences.batch(chosen)["labels"]
        assert sequences.weight(chosen) == int((labels[:, 1:] != IGNORED).sum()) == int((labels != IGNORED).sum())
    assert sequences.weight([]) == 0
    assert sequences.lengths().tolist() == [len(row) for row in sequences.ids]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_parts_add_up_to_the_whole(model: Any, smoothing: float) -> None:
    sequences, objective = rows(count=11, seed=3), Objective(label_smoothing=smoothing)
    everything = list(range(11))

    def gradient(parts: list[list[int]]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = sequences.weight(everything)
        losses = [objective(model, sequences.batch(part)) * (sequences.weight(part) / total) for part in parts]
        loss = torch.stack(losses).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), model.transformer.h[0].attn.c_attn.weight.grad.clone()

    loss, whole = gradient([everything])
    for parts in ([everything[:1], everything[1:]], [everything[i::4] for i in range(4)]):
        split_loss, split = gradient(parts)
        assert split_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_token_loss_is_the_mean_over_all_targets(model: Any, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pst.sequences.TOKENS", 40)  # three rows of twelve
    sequences = rows(count=15, seed=4)
    losses = [loss for row in range(15) for loss in literal_losses(model, sequences, row)]
    model.train()
    measured = token_loss(model, sequences, batch_size=batch_size, device=CPU, processes=Processes())
    assert model.training
    assert measured["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_token_loss_sees_the_masks(model: Any) -> None:
    sequences = rows(count=5, seed=5)
    sparsify_(model, method=Magnitude())
    options: dict[str, Any] = {"batch_size": 8, "device": CPU, "processes": Processes()}
    dense = token_loss(model, sequences, **options)
    set_sparsity_(model, 0.9)
    sparse = token_loss(model, sequences, **options)
    assert sparse != dense
    losses = [loss for row in range(5) for loss in literal_losses(model, sequences, row)]
    assert sparse["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_tokenizer_pads_and_ends_and_the_model_knows(folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "model"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": 277, "pad_token_id": None}))
    model, tokenizer = load_causal(str(source))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>",) * 2
    for found in (model.config, model.generation_config):
        assert (found.eos_token_id, found.pad_token_id, found.bos_token_id) == (END, END, END)


def bert(folder: Path, architecture: str) -> Path:
    import transformers

    size = save_tokenizer(folder, model_max_length=32)
    config = transformers.BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, is_decoder=architecture == "decoder", eos_token_id=3,
    )  # fmt: skip
    name = "BertLMHeadModel" if architecture == "decoder" else architecture
    getattr(transformers, name)(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM", "BertLMHeadModel"])
def test_an_encoder_is_refused(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no causal language model"):
        load_causal(str(bert(tmp_path / "bert", architecture)))


def test_an_encoder_that_looks_back_only(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = bert(tmp_path / "bert", "decoder")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(source)
    model, tokenizer = load_causal(str(source))
    assert (tokenizer.pad_token, model.config.eos_token_id) == ("[PAD]", 3)


def test_a_classifier_is_refused(tiny_gpt2: Path) -> None:
    with pytest.raises(ModelError, match=r"names GPT2ForSequenceClassification\)"):
        load_causal(str(tiny_gpt2))


def no_end(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in settings.items() if not name.endswith("_token")}))


def no_block(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "h.1.mlp.c_fc" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [(no_end, "no end-of-text token"), (no_block, "lack 2 tensors"), (no_weights, "cannot be read")],
)
def test_damaged_folders_are_refused(damage: Callable[[Path], None], says: str, folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(folder, tmp_path / "model"))
    damage(source)
    with pytest.raises(ModelError, match=says):
        load_causal(str(source))
