"""The callback in a real Trainer against a plain loop of the verbs that it stands for."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from pst import kernels
from pst.callback import PSTCallback
from pst.errors import ConfigError, ModelError, PatternError
from pst.masked_weight import MaskedWeight
from pst.materialize import masked_weights
from pst.methods.magnitude import Magnitude
from pst.methods.pst import PST
from pst.patterns import parse_pattern
from pst.schedule import CubicSchedule
from pst.sparsify import merge_, prunable_weights, set_sparsity_, sparsify_

STEPS, ROWS = 10, 4


def loaded(folder: Path) -> Any:
    """Without dropout: data loaders and evaluation draw from the same generator, each Trainer in its own way."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def examples(count: int = 24) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(5, 30, (6,), generator=generator),
            "attention_mask": torch.ones(6, dtype=torch.int64),
            "labels": torch.randint(2, (), generator=generator),
        }
        for _ in range(count)
    ]


class InOrder(Trainer):  # type: ignore[misc]
    """Rows in their order, so that a plain loop can see the same batches."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(model: Any, pst: PSTCallback, output: Path, *others: TrainerCallback, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": ROWS, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "lr_scheduler_type": "constant", "seed": 1,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(str(output), **settings | changes)
    return InOrder(
        model, arguments, train_dataset=examples(), eval_dataset=examples(8), callbacks=[pst, *others],
        optimizers=(pst.optimizer, None),
    )  # fmt: skip


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Watch(TrainerCallback):  # type: ignore[misc]
    """Calls *see* after each optimizer step."""

    def __init__(self, see: Callable[[int], None]) -> None:
        self.see = see

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.see(state.global_step)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_does_what_the_loop_does(accumulation: int, tiny_bert: Path, tmp_path: Path) -> None:
    method = PST(r1=2, r2=4, lr=1e-3, lr_update=1e-3, lr_scores=1e-2)
    model = loaded(tiny_bert)
    torch.manual_seed(5)
    pst = PSTCallback(model, sparsity=0.7, method=method)
    trainer(model, pst, tmp_path, gradient_accumulation_steps=accumulation).train()

    plain = loaded(tiny_bert)
    torch.manual_seed(5)
    sparsify_(plain, method=method)
    optimizer = torch.optim.AdamW(method.param_groups(plain), weight_decay=0.0)
    schedule = CubicSchedule(initial=0.0, final=0.7, steps=STEPS)
    rows, size = examples(), ROWS * accumulation
    plain.train()
    for step in range(STEPS):
        set_sparsity_(plain, schedule(step))
        for part in range(accumulation):
            first = (step * size + part * ROWS) % len(rows)
            batch = {name: torch.stack([row[name] for row in rows[first : first + ROWS]]) for name in rows[0]}
            (plain(**batch).loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    set_sparsity_(plain, 0.7)
    merge_(plain)
    mine, theirs = state(model), state(plain)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        if not name.endswith("key.bias"):  # its gradient is rounding alone
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
    for item in prunable_weights(model):
        assert int((item.weight == 0).sum()) == int(item.weight.numel() * 0.7)


def test_counts_at_every_step(tiny_bert: Path, tmp_path: Path) -> None:
    model = loaded(tiny_bert)
    pst = PSTCallback(model, sparsity=0.9, sparsity_initial=0.2, sparsity_warmup=0.0, sparsity_cooldown=0.5)
    schedule = CubicSchedule(initial=0.2, final=0.9, steps=STEPS, warmup=0.0, cooldown=0.5)
    seen = []

    def see(step: int) -> None:
        for _, attached in masked_weights(model):
            mask: Any = attached.mask
            assert int((~mask).sum()) == int(mask.numel() * schedule(step - 1))
        seen.append(step)

    trainer(model, pst, tmp_path, Watch(see)).train()
    assert seen == list(range(1, STEPS + 1))


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_gpt2"])
def test_the_saved_folder_is_plain(base: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = loaded(request.getfixturevalue(base))
    pst = PSTCallback(model, pattern="2:4", method=Magnitude())
    with pytest.raises(ConfigError, match="not come to its end"):
        pst.save(tmp_path / "early")
    whole = trainer(model, pst, tmp_path / "run")
    whole.train()
    whole.save_model(str(tmp_path / "trainer"))
    pst.save(tmp_path / "ours")
    for folder in ("trainer", "ours"):
        again = loaded(tmp_path / folder)
        for item in prunable_weights(again):
            assert parse_pattern("2:4").holds(item.weight.detach().numpy(), axis=item.axis)
        assert all(torch.equal(value, state(model)[name]) for name, value in state(again).items())
    assert (tmp_path / "ours" / "sparsity.json").is_file()


def test_a_checkpoint_goes_on(tiny_bert: Path, tmp_path: Path) -> None:
    """Masks, low-rank tensors, optimizer and random states come back: the end is the same."""

    def run(output: Path, **options: Any) -> dict[str, torch.Tensor]:
        model = loaded(tiny_bert)
        pst = PSTCallback(model, sparsity=0.8, mask_every=4)
        trainer(model, pst, output, save_strategy="steps", save_steps=6).train(**options)
        return state(model)

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "other", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_evaluating_in_between_changes_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    ends = []
    for name, changes in (("with", {"eval_strategy": "steps", "eval_steps": 3}), ("without", {})):
        model = loaded(tiny_bert)
        torch.manual_seed(5)
        pst = PSTCallback(model, sparsity=0.8)
        trainer(model, pst, tmp_path / name, **changes).train()
        ends.append(state(model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


class Stages(TrainerCallback):  # type: ignore[misc]
    """Behind a PSTCallback: notes where the Trainer has come to, and spoils a score for the masks of step *at*."""

    def __init__(self, model: Any, at: int) -> None:
        self.model, self.at = model, at
        self.begun: list[int] = []
        self.evaluated: list[int] = []
        self.saved: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.begun.append(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.evaluated.append(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.saved.append(state.global_step)
        if state.global_step == self.at:
            part = next(part for part in self.model.modules() if isinstance(part, MaskedWeight))
            part.get_buffer("Q")[0] = math.nan


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_scores_that_are_not_finite_end_the_run_before_it_evaluates_or_saves(
    at: int, later: bool, tiny_bert: Path, tmp_path: Path
) -> None:
    """With the kernels, as on a GPU, a step begins before it is known; the last masks (4) belong to no step."""
    if later:
        pytest.importorskip("triton", reason="the kernels need Triton")
    device = "cuda" if later and torch.cuda.is_available() else "cpu"  # where there is a GPU, nothing is interpreted
    model = loaded(tiny_bert)
    pst = PSTCallback(model, sparsity=0.8)
    stages = Stages(model, at)
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    given = {"max_steps": 4, "per_device_train_batch_size": 2, "use_cpu": device == "cpu"}
    run = trainer(model, pst, tmp_path / "run", stages, **every, **given)
    with kernels.forced(True) if later else nullcontext(), pytest.raises(
        ModelError, match=rf"^Step {at}: The scores of .*\.weight hold NaN or infinity: training diverged"
    ):  # fmt: skip
        run.train()
    assert stages.begun == list(range(at + 1 if later and at < 4 else at))
    assert stages.evaluated == stages.saved == list(range(1, at + 1))
    assert sorted(folder.name for folder in (tmp_path / "run").iterdir()) == [
        f"checkpoint-{step}" for step in range(1, at + 1)
    ]
    with pytest.raises(ConfigError, match="not come to its end"):
        pst.save(tmp_path / "out")


def test_a_step_that_is_broken_off_is_looked_at_all_the_same(tiny_bert: Path, tmp_path: Path) -> None:
    """It is stopped while it accumulates gradients, and the epoch's end would save it."""
    pytest.importorskip("triton", reason="the kernels need Triton")

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_substep_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            control.should_training_stop = True

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = loaded(tiny_bert)
    pst = PSTCallback(model, sparsity=0.8)
    next(part for part in model.modules() if isinstance(part, MaskedWeight)).get_buffer("Q")[0] = math.nan
    given = {"gradient_accumulation_steps": 2, "save_strategy": "epoch", "use_cpu": device == "cpu"}
    run = trainer(model, pst, tmp_path / "run", Stop(), per_device_train_batch_size=2, **given)
    with kernels.forced(True), pytest.raises(ModelError, match=r"^Step 0: The scores of "):
        run.train()
    assert list((tmp_path / "run").iterdir()) == []


def test_what_cannot_be(tiny_bert: Path, tmp_path: Path) -> None:
    model = loaded(tiny_bert)
    with pytest.raises(ConfigError, match=r"needs a sparsity, for example sparsity=0\.9"):
        PSTCallback(model)
    with pytest.raises(ConfigError, match=r"2:4 has sparsity 0\.5, not 0\.7"):
        PSTCallback(model, pattern="2:4", sparsity=0.7)
    with pytest.raises(ConfigError, match="together at most 1"):
        PSTCallback(model, sparsity=0.5, sparsity_warmup=0.8)
    with pytest.raises(ModelError, match=r"Sparsity 0\.99 cannot be reached"):
        PSTCallback(model, pattern="structured", sparsity=0.99)
    with pytest.raises(PatternError, match="Unknown pattern"):
        PSTCallback(model, pattern="checkers", sparsity=0.5)
    with pytest.raises(ConfigError, match="mask_every is 0"):
        PSTCallback(model, sparsity=0.5, mask_every=0)
    pst = PSTCallback(model, sparsity=0.5)
    with pytest.raises(ModelError, match="sparsified already"):
        PSTCallback(model, sparsity=0.5)
    whole = trainer(model, pst, tmp_path / "best", load_best_model_at_end=True, eval_strategy="steps", eval_steps=5,
                    save_strategy="steps", save_steps=5)  # fmt: skip
    with pytest.raises(ConfigError, match="load_best_model_at_end would bring back"):
        whole.train()
    own = Trainer(model, whole.args, train_dataset=examples(), eval_dataset=examples(8), callbacks=[pst])
    with pytest.raises(ConfigError, match=r"optimizer of its own.*optimizers=\(pst\.optimizer, None\)"):
        own.train()
    right = trainer(model, pst, tmp_path / "right")
    right.train()
    with pytest.raises(ConfigError, match="masks are merged; make a new"):
        right.train()
