"""Prompts and targets: their tokens against a literal loop, whole runs, and rows and models that are refused."""

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch

import pst.train
from pst import tasks
from pst.batches import training_rows
from pst.data import in_validation
from pst.distributed import Processes
from pst.errors import ConfigError, DataError, ModelError
from pst.objective import IGNORED
from pst.scratch import make_gpt2
from pst.sequences import load_causal
from pst.tasks.data_to_text import Pairs, encode, encode_prompts, load
from pst.train import InterruptedRun, train
from tests.pst.tasks.conftest import fact_rows, told, write_rows
from tests.pst.training import log_lines, report, tensors, weights

ROOT = Path(__file__).resolve().parents[3]
E2E = ROOT.parent / "shared" / "data" / "e2e_nlg"


@pytest.fixture(scope="module")
def tokenizer(tiny_lm: Path) -> Any:
    return load_causal(str(tiny_lm))[1]


def pairs(*rows: tuple[str, str]) -> Pairs:
    return Pairs(prompts=[row[0] for row in rows], targets=[row[1] for row in rows], source="rows")


# -- tokens --------------------------------------------------------------------------------------------------------


def test_rows_are_prompt_end_target_end(tokenizer: Any) -> None:
    rows = pairs(*((row["meaning_representation"], row["human_reference"]) for row in fact_rows()))
    encoded = encode(tokenizer, rows, max_length=64)
    batch = encoded.batch(list(range(12)))
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end  # so that labels cannot go by the token
    for row, (prompt, target) in enumerate(zip(rows.prompts, rows.targets, strict=True)):
        asked, said = tokenizer(prompt)["input_ids"], tokenizer(target)["input_ids"]
        assert encoded.ids[row] == [*asked, end, *said, end]
        assert encoded.ids[row][: len(asked) + 1] == tokenizer(prompt + tokenizer.eos_token)["input_ids"]
        labels = [token for token in batch["labels"][row].tolist() if token != IGNORED]
        assert labels == [*said, end]
        assert batch["labels"][row, : len(asked) + 1].eq(IGNORED).all()
        assert encoded.weight([row]) == len(said) + 1
    assert encode_prompts(tokenizer, ["The Mill"], most=64) == [[*tokenizer("The Mill")["input_ids"], end]]


def test_a_bos_of_its_own_comes_first(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"bos_token": "<s>"})
    bos = other.bos_token_id
    assert bos != other.eos_token_id
    encoded = encode(other, pairs(("The Mill", "French")), max_length=64)
    plain = encode(tokenizer, pairs(("The Mill", "French")), max_length=64)
    assert encoded.ids[0] == [bos, *plain.ids[0]]
    assert encoded.starts[0] == plain.starts[0] + 1
    assert encode_prompts(other, ["The Mill"], most=64)[0][0] == bos
    assert len(encode_prompts(other, ["The Mill"], most=3)[0]) == 3


def test_a_long_row_loses_the_end_of_its_prompt(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, target, end = "name : The Vaults | food : Indian", "The Vaults .", tokenizer.eos_token_id
    asked, said = tokenizer(prompt)["input_ids"], tokenizer(target)["input_ids"]
    whole = len(asked) + len(said) + 2
    for length in range(3, whole + 2):
        encoded = encode(tokenizer, pairs((prompt, target)), max_length=length)
        kept = said[: length - 2]
        cut = asked[: length - 2 - len(kept)]
        assert encoded.ids[0] == [*cut, end, *kept, end]
        assert len(encoded.ids[0]) == min(length, whole)
        assert encoded.starts[0] == len(cut) + 1
        said_so = f"1 of 1 rows (rows) are longer than max_length {length}; prompts are cut." in capsys.readouterr().err
        assert said_so == (length < whole)


def test_white_space_around_texts_goes(tokenizer: Any) -> None:
    ragged, neat = (encode(tokenizer, pairs(row), max_length=64) for row in ((" a b\n", "\tc "), ("a b", "c")))
    assert ragged.ids == neat.ids


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("mr", "ref"), ("input", "target"), ("prompt", "completion"), ("source", "target")])
def test_usual_names(names: tuple[str, str], tmp_path: Path) -> None:
    rows = [dict(zip(names, row.values(), strict=True)) for row in fact_rows()]
    config = told(tmp_path, write_rows(tmp_path / "rows.jsonl", rows), validation=str(tmp_path / "rows.jsonl"))
    found = load(config, split="train")
    assert found.prompts == [row["meaning_representation"] for row in fact_rows()]
    assert found.targets == [row["human_reference"] for row in fact_rows()]
    assert load(config, split="validation").fingerprint == found.fingerprint


def test_named_columns(tmp_path: Path) -> None:
    rows = [{"facts": "a", "text": "b", "input": "c", "target": "d", "output": "e"}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    for columns, expected in {
        ("facts", "text"): ("a", "b"),
        ("", ""): ("c", "d"),
        ("", "output"): ("c", "e"),
        ("text", "facts"): ("b", "a"),
    }.items():
        config = told(data, data, validation=str(data), input_column=columns[0], target_column=columns[1])
        found = load(config, split="train")
        assert (found.prompts, found.targets) == ([expected[0]], [expected[1]])


def test_no_prompt_falls_on_both_sides(tmp_path: Path) -> None:
    rows = [{"input": f"prompt {i % 40}", "target": f"target {i}"} for i in range(100)]
    config = told(tmp_path, write_rows(tmp_path / "rows.jsonl", rows), validation_fraction=0.3)
    train_rows, held_out = load(config, split="train"), load(config, split="validation")
    assert sorted(train_rows.targets + held_out.targets) == sorted(row["target"] for row in rows)
    assert set(held_out.prompts) == {f"prompt {i}" for i in range(40) if in_validation(f"prompt {i}", 0.3)}
    assert not set(held_out.prompts) & set(train_rows.prompts)


def test_limit_keeps_rows_to_train_and_whole_prompts_to_measure(facts: Path) -> None:
    config = told(facts, facts, limit=3)
    assert len(load(config, split="train")) == 3
    kept = load(config, split="validation").by_prompt()
    assert list(kept) == [list(load(told(facts, facts), split="validation").by_prompt())[i] for i in (0, 2, 5)]
    assert [len(targets) for targets in kept.values()] == [2, 2, 1]


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([{"mr": "a", "text": "b"}], {}, r"no columns with usual names .*has mr, text\).*target_column"),
        ([{"mr": "a", "ref": "b"}], {"input_column": "facts"}, r"'facts' is not in .* input_column"),
        ([{"mr": "a", "ref": "b"}], {"target_column": "text"}, r"'text' is not in .* target_column"),
        ([{"mr": "a", "ref": "b"}, {"mr": "c", "ref": " "}], {}, r"Row 2 .* empty target \(ref\)"),
        ([{"mr": "a", "ref": "b"}, {"mr": None, "ref": "d"}], {}, r"Row 2 .* empty prompt \(mr\)"),
        ([{"mr": "a", "ref": 3}], {}, r"'ref' .* int values \(row 1\), not text"),
    ],
)
def test_rows_that_are_refused(rows: list[dict[str, Any]], options: dict[str, Any], says: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=says):
        load(told(data, data, validation=str(data), **options), split="train")


def test_too_few_prompts_to_split(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"mr": "a", "ref": "b"}])
    with pytest.raises(DataError, match=r"too few distinct prompts .* validation=FILE"):
        load(told(data, data, validation_fraction=1e-9), split="validation")


def test_models_that_are_refused(tiny_bert: Path, tiny_lm: Path, facts: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no causal language model"):
        train(told(tiny_bert, facts), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"max_new_tokens is 62, which leaves no room .* 64 positions"):
        train(told(tiny_lm, facts, max_new_tokens=62), tmp_path / "out")


def test_no_sacrebleu_is_said_before_the_training(
    tiny_lm: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match="pip install sacrebleu"):
        train(told(tiny_lm, facts), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tiny_lm: Path, facts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the facts by heart."""
    output = tmp_path_factory.mktemp("dense") / "run"
    train(told(tiny_lm, facts, steps=160, batch_size=12, lr=1e-2), output)
    return output


def answers(folder: Path, prompts: list[str]) -> list[str]:
    """In plain transformers, by what lies in the folder alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer([prompt + tokenizer.eos_token for prompt in prompts], padding=True, return_tensors="pt")
    output = model.generate(**inputs)
    return list(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def assert_said_by_plain_transformers(output: Path, facts: Path) -> None:
    questions = load(told(facts, facts), split="validation").by_prompt()
    given = list(questions.values())
    second = [texts[1] if len(texts) > 1 else None for texts in given]
    columns: Any = [[texts[0] for texts in given], second]
    expected = sacrebleu.corpus_bleu(answers(output / "model", list(questions)), columns).score / 100
    assert report(output)["metrics"]["bleu"] == pytest.approx(expected)


def test_it_learns_the_facts_and_says_them(dense: Path, facts: Path) -> None:
    metrics = report(dense)["metrics"]
    assert list(metrics) == ["bleu", "loss", "perplexity"]
    assert metrics["bleu"] > 0.95
    assert metrics["loss"] < 0.3  # two sentences for one prompt cannot both be certain
    questions = load(told(facts, facts), split="validation").by_prompt()
    for prompt, said in zip(questions, answers(dense / "model", list(questions)), strict=True):
        assert said in questions[prompt]
    assert_said_by_plain_transformers(dense, facts)


def test_what_the_run_leaves(dense: Path) -> None:
    said = report(dense)
    assert said["task"] == "data_to_text"
    assert said["data"]["train"]["rows"] == 12
    assert (said["data"]["validation"]["rows"], said["data"]["validation"]["prompts"]) == (12, 8)
    generation = json.loads((dense / "model" / "generation_config.json").read_text())
    assert (generation["num_beams"], generation["length_penalty"], generation["max_new_tokens"]) == (3, 0.8, 24)
    assert generation["eos_token_id"] == generation["pad_token_id"] == 0
    tokenizer = json.loads((dense / "model" / "tokenizer_config.json").read_text())
    assert (tokenizer["padding_side"], tokenizer["pad_token"]) == ("left", "<|endoftext|>")


def test_pst_keeps_half_of_each_matrix_and_answers(dense: Path, facts: Path, tmp_path: Path) -> None:
    rates = {"lr": 2e-3, "lr_update": 2e-3}
    config = told(dense / "model", facts, method="pst", sparsity=0.5, r1=2, r2=8, steps=60, batch_size=12, **rates)
    result = train(config, tmp_path / "run")
    saved, base = tensors(result.model), tensors(dense / "model")
    prunable = [f"transformer.h.{i}.{name}.weight" for i in range(2) for name in ("attn.c_attn", "attn.c_proj")]
    prunable += [f"transformer.h.{i}.mlp.{name}.weight" for i in range(2) for name in ("c_fc", "c_proj")]
    assert sorted(row["name"] for row in report(tmp_path / "run")["weights"]) == sorted(prunable)
    for name in prunable:
        for part in saved[name].chunk(3 if "c_attn" in name else 1, dim=1):  # stored inputs x outputs
            assert int((part == 0).sum()) == part.numel() // 2
    assert torch.equal(saved["transformer.wte.weight"], base["transformer.wte.weight"])
    assert result.metrics["bleu"] > 0.8
    assert_said_by_plain_transformers(tmp_path / "run", facts)


def test_distilling_from_the_dense_parent(dense: Path, facts: Path, tmp_path: Path) -> None:
    config = told(dense / "model", facts, method="pst", sparsity=0.9, teacher=str(dense / "model"), label_smoothing=0.1)
    assert 0 <= train(config, tmp_path / "run").metrics["bleu"] <= 1


def test_one_beam_is_saved_without_a_penalty(tiny_lm: Path, facts: Path, tmp_path: Path) -> None:
    train(told(tiny_lm, facts, num_beams=1, steps=1), tmp_path / "run")
    generation = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert generation["num_beams"] == 1
    assert "length_penalty" not in generation


def test_parts_of_a_batch_make_the_same_steps(tiny_lm: Path, facts: Path, tmp_path: Path) -> None:
    whole = train(told(tiny_lm, facts), tmp_path / "whole")
    parts = train(told(tiny_lm, facts, accumulate=4), tmp_path / "parts")
    assert parts.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-4)
    losses = [[line["loss"] for line in log_lines(tmp_path / name) if "loss" in line] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"method": "pst", "sparsity": 0.5}], ids=["dense", "pst"])
def test_an_interruption_changes_nothing(
    changes: dict[str, Any], facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text for row in fact_rows() for text in row.values()]
    make_gpt2(tmp_path / "model", texts, layers=1, width=16, heads=2, positions=64, vocabulary=300, dropout=0.3)
    config = told(tmp_path / "model", facts, **changes)

    def signalled(*args: Any, first_step: int, **named: Any) -> Iterator[Any]:
        for step, rows in enumerate(training_rows(*args, first_step=first_step, **named), first_step):
            if step == 2:
                signal.raise_signal(signal.SIGINT)
            yield rows

    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(pst.train, "training_rows", signalled)
        with pytest.raises(InterruptedRun, match="Stopped at step 3 of 6"):
            train(config, tmp_path / "stopped")
    train(config, tmp_path / "stopped", resume=True)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert report(tmp_path / "stopped")["metrics"] == report(tmp_path / "whole")["metrics"]


def test_before_the_end_the_loss_has_to_do(tiny_lm: Path, facts: Path) -> None:
    prepared = tasks.prepare(told(tiny_lm, facts).filled())
    options: dict[str, Any] = {"batch_size": 8, "device": torch.device("cpu"), "processes": Processes()}
    interim: Any = prepared.evaluate(prepared.model, final=False, **options)
    assert list(interim) == ["loss", "perplexity"]
    assert prepared.evaluate(prepared.model, **options).items() >= interim.items()


def test_two_processes_answer_as_one(dense: Path, facts: Path, tmp_path: Path) -> None:
    config = told(dense / "model", facts, steps=2, lr=1e-4)
    one = train(config, tmp_path / "one")
    chosen = {name: getattr(config, name) for name in ("task", "batch_size", "num_beams", "max_new_tokens", "lr")}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "cli", "train", "--model", config.model, "--data", config.data]
    command += ["--method", "dense", "--steps", "2", "--set", "device=cpu", "-o", str(tmp_path / "two")]
    command += [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert report(tmp_path / "two")["processes"] == 2
    found = report(tmp_path / "two")["metrics"]
    assert found["bleu"] == pytest.approx(one.metrics["bleu"])
    assert found["loss"] == pytest.approx(one.metrics["loss"], rel=1e-3)


@pytest.mark.skipif(not E2E.is_dir(), reason="needs the E2E data in ../shared/data/e2e_nlg")
def test_the_real_data(tiny_lm: Path) -> None:
    config = told(tiny_lm, E2E)
    rows, held_out = load(config, split="train"), load(config, split="validation")
    assert (len(rows), len(held_out)) == (42061, 4672)
    questions = held_out.by_prompt()
    assert len(questions) == 547
    assert min(map(len, questions.values())) == 2 < max(map(len, questions.values()))
    few = load(told(tiny_lm, E2E, limit=50), split="validation").by_prompt()
    assert len(few) == 50
    assert all(few[prompt] == questions[prompt] for prompt in few)
