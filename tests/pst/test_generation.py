"""Beam search and BLEU: against sacrebleu by hand, transformers' own processor, and one prompt at a time."""

import copy
import sys
from typing import Any

import pytest
import sacrebleu
import torch

from pst.errors import ConfigError
from pst.generation import NoRepeat, answer, bleu
from pst.masked_weight import MaskedMagnitude
from pst.methods.magnitude import Magnitude
from pst.scratch import make_gpt2
from pst.sequences import load_causal
from pst.sparsify import set_sparsity_, sparsify_

CPU = torch.device("cpu")
ANSWERS = ["The Vaults is a pub near the river .", "Blue Spice serves cheap food", "a place in the city centre"]
FIRST = ["The Vaults is a cheap pub near the river .", "Blue Spice has cheap food", "It is in the city centre ."]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("lm") / "model"
    make_gpt2(folder, ANSWERS, layers=2, width=32, heads=2, positions=64, vocabulary=300, seed=4)
    model, tokenizer = load_causal(str(folder))
    model.generation_config.max_new_tokens = 12
    torch.manual_seed(0)
    for parameter in model.parameters():  # as drawn for training it would repeat its last token for ever
        torch.nn.init.normal_(parameter, std=0.4)
    return model, tokenizer


def test_bleu_of_one_reference_each() -> None:
    assert bleu(ANSWERS, [[text] for text in FIRST]) == sacrebleu.corpus_bleu(ANSWERS, [FIRST]).score / 100
    assert bleu(ANSWERS, [[text] for text in ANSWERS]) == pytest.approx(1.0)


def test_bleu_of_several_references_each() -> None:
    second = ["The Vaults is near the river .", "Blue Spice serves food", "a place in the centre of the city"]
    both = [list(pair) for pair in zip(FIRST, second, strict=True)]
    assert bleu(ANSWERS, both) == sacrebleu.corpus_bleu(ANSWERS, [FIRST, second]).score / 100
    assert bleu(ANSWERS, both) > bleu(ANSWERS, [[text] for text in FIRST])


def test_bleu_of_a_number_of_references_that_varies() -> None:
    third = "Blue Spice serves cheap food and wine"
    references = [[FIRST[0]], [FIRST[1], "cheap food at Blue Spice", third], [FIRST[2], "the city centre"]]
    columns: Any = [FIRST, [None, references[1][1], references[2][1]], [None, third, None]]
    expected = sacrebleu.corpus_bleu(ANSWERS, columns, force=True).score / 100
    assert bleu(ANSWERS, references) == expected
    # the same reference twice says nothing new, so it can fill the places up as well
    filled = [[*texts, *[texts[0]] * (3 - len(texts))] for texts in references]
    assert bleu(ANSWERS, filled) == pytest.approx(expected)


def test_no_sacrebleu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match=r"pip install sacrebleu"):
        bleu(ANSWERS, [[text] for text in FIRST])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_repeat_is_that_of_transformers_on_the_answer(size: int) -> None:
    from transformers import NoRepeatNGramLogitsProcessor

    generator = torch.Generator().manual_seed(size)
    banned = 0
    for length in range(12):
        input_ids = torch.randint(3, (16, 5 + length), generator=generator)
        scores = torch.randn(16, 7, generator=generator)
        found = NoRepeat(size, start=5)(input_ids, scores.clone())
        expected = NoRepeatNGramLogitsProcessor(size)(input_ids[:, 5:], scores.clone()) if length else scores
        assert torch.equal(found, expected)
        banned += int(found.isinf().sum())
    assert banned > 10


@pytest.fixture
def outputs(lm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the model's generate gives, as it is called."""
    seen: list[torch.Tensor] = []
    generate = lm[0].generate

    def told(**inputs: Any) -> Any:
        seen.append(generate(**inputs))
        return seen[-1]

    monkeypatch.setattr(lm[0], "generate", told)
    return seen


def test_a_prompt_may_be_repeated_and_an_answer_may_not(lm: tuple[Any, Any], outputs: list[torch.Tensor]) -> None:
    model, tokenizer = lm
    model.generation_config.num_beams = 1
    prompt = list(range(20, 50))
    answer(model, tokenizer, [prompt], batch_size=1, device=CPU)
    answer(model, tokenizer, [prompt], no_repeat_ngram=1, batch_size=1, device=CPU)
    free, bound = (output[0, len(prompt) :].tolist() for output in outputs)
    assert len(set(free)) < len(free)
    assert len(set(bound)) == len(bound) == 12
    assert set(bound) & set(prompt)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_do_not_depend_on_their_neighbours(beams: int, batch_size: int, lm: tuple[Any, Any]) -> None:
    model, tokenizer = lm
    generator = torch.Generator().manual_seed(3)
    prompts = [[*torch.randint(1, 300, (2 + i % 4,), generator=generator).tolist(), 0] for i in range(8)]
    model.generation_config.num_beams = beams
    expected = []
    for prompt in prompts:
        output = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)))
        expected.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip())
    assert len(set(expected)) > 3
    model.train()
    state = torch.get_rng_state()
    assert answer(model, tokenizer, prompts, batch_size=batch_size, device=CPU) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    model.eval()


def test_few_sequences_side_by_side(
    lm: tuple[Any, Any], outputs: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = lm
    monkeypatch.setattr("pst.generation.BEAMS", 8)
    model.generation_config.num_beams = 4
    answer(model, tokenizer, [[5, 0]] * 5, batch_size=64, device=CPU)
    assert [len(output) for output in outputs] == [2, 2, 1]


def test_masked_weights_are_made_once_a_call(lm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = copy.deepcopy(lm[0]), lm[1]
    weights = sparsify_(model, method=Magnitude())
    set_sparsity_(model, 0.9)
    made = []
    masked = MaskedMagnitude.masked

    def told(self: MaskedMagnitude, weight: torch.Tensor) -> torch.Tensor:
        made.append(weight.shape)
        return masked(self, weight)

    monkeypatch.setattr(MaskedMagnitude, "masked", told)
    answer(model, tokenizer, [[5, 0], [6, 7, 0], [8, 0]], batch_size=1, device=CPU)
    assert len(made) == sum(item.parts for item in weights) == 2 * 6
