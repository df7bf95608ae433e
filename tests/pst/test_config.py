"""The training options: what each method fills in, what contradicts what, and every bound."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pst.config import TrainConfig
from pst.errors import ConfigError, PatternError


def config(**options: Any) -> TrainConfig:
    given: dict[str, Any] = {"model": "m", "data": "d", "sparsity": 0.9} | options
    return TrainConfig(**given)


# -- filling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pst", "magnitude", "dense"])
def test_filling_leaves_open_what_the_run_decides(method: str) -> None:
    filled = config(method=method).filled()
    left = [each.name for each in fields(filled) if getattr(filled, each.name) is None]
    assert left == ["budget", "max_length", "dropout", "checkpoint_every"]
    assert filled.filled() == filled


def test_each_method_brings_its_own_rates() -> None:
    from pst.methods import dense, magnitude, pst

    for method, module in (("pst", pst), ("magnitude", magnitude), ("dense", dense)):
        filled = config(method=method).filled()
        assert {name: getattr(filled, name) for name in module.DEFAULTS} == module.DEFAULTS
    filled = config().filled()
    assert (filled.epochs, filled.seed, filled.r1) == (3.0, 0, 8)
    assert filled.lr_scores != filled.lr_update  # a rate of their own for the scores
    assert config(method="dense").filled().lr_scores == 0.0


def rates(**given: Any) -> dict[str, Any]:
    filled = config(**given).filled()
    return {name: getattr(filled, name) for name in ("lr", "lr_update", "lr_scores")}


def test_a_model_that_knows_the_task_is_halved_at_lower_rates(tmp_path: Path) -> None:
    from pst.methods.pst import DEFAULTS, FINETUNED, TAUGHT

    usual = {name: DEFAULTS[name] for name in FINETUNED}
    (tmp_path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    knows = {"model": str(tmp_path), "sparsity": None}
    assert rates(**knows | {"pattern": "2:4", "teacher": "off"}) == FINETUNED
    assert rates(**knows | {"sparsity": 0.5}) == FINETUNED
    assert rates(**knows | {"sparsity": 0.9}) == usual
    assert rates(**knows | {"pattern": "block:4x4", "sparsity": 0.5}) == usual
    assert rates(**knows | {"pattern": "2:4", "start": "pretrained"}) == usual
    assert rates(**knows | {"sparsity": 0.5, "lr_scores": 0.5}) == FINETUNED | {"lr_scores": 0.5}
    taught = config(**knows | {"pattern": "2:4"}).filled()
    assert {name: getattr(taught, name) for name in TAUGHT} == TAUGHT
    assert rates(**knows | {"pattern": "2:4"}) == usual
    for alone in ({"sparsity": 0.5}, {"pattern": "2:4", "teacher": "off"}, {"pattern": "3:4", "start": "pretrained"}):
        filled = config(**knows | alone).filled()
        assert (filled.teacher, filled.distill_weight, filled.distill_hidden, filled.dropout) == ("", 0.5, 1.0, None)
    given = config(**knows | {"pattern": "2:4", "teacher": "other", "distill_weight": 0.2}).filled()
    assert (given.teacher, given.distill_weight, given.dropout) == ("other", 0.2, 0.0)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    assert rates(**knows | {"pattern": "2:4"}) == usual
    assert rates(**knows | {"pattern": "2:4", "start": "finetuned", "teacher": "off"}) == FINETUNED


def test_faithful_and_other_methods_do_not_ask_where_a_model_starts() -> None:
    for given in ({"faithful": True}, {"method": "magnitude"}):
        assert rates(sparsity=0.5, start="finetuned", **given) == rates(sparsity=0.5, start="pretrained", **given)


def test_faithful_fills_in_the_published_values() -> None:
    filled = config(faithful=True).filled()
    published = {
        "lr": 3e-5, "lr_update": 3e-5, "lr_scores": 3e-5, "r1": 8, "r2": 8, "alpha": "one", "beta": 1.0, "epochs": 20.0,
        "lr_warmup": 0.0, "seed": 43, "batch_size": 32, "sparsity_initial": 0.0, "sparsity_warmup": 0.1,
        "sparsity_cooldown": 0.3, "max_length": None, "mask_every": 1,
    }  # fmt: skip
    assert {name: getattr(filled, name) for name in published} == published
    assert filled.faithful


@pytest.mark.parametrize("faithful", [False, True])
def test_what_is_given_is_kept(faithful: bool) -> None:
    given: dict[str, Any] = {
        "lr": 0.1, "lr_update": 0.0, "lr_scores": 0.3, "r1": 1, "r2": 2, "alpha": "mean", "epochs": 0.5, "seed": 0,
        "lr_warmup": 1.0, "max_length": 64,
    }  # fmt: skip
    filled = config(faithful=faithful, **given).filled()
    assert {name: getattr(filled, name) for name in given} == given


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("1:3", 1 - 1 / 3)])
def test_n_of_m_fixes_the_sparsity(pattern: str, sparsity: float) -> None:
    assert config(pattern=pattern, sparsity=None).filled().sparsity == sparsity
    assert config(pattern=pattern, sparsity=round(sparsity, 7)).filled().sparsity == sparsity


def test_dense_has_neither_pattern_nor_sparsity() -> None:
    filled = config(method="dense", sparsity=None).filled()
    assert (filled.pattern, filled.sparsity) == ("dense", 0.0)
    assert config(method="dense", sparsity=0.9, pattern="2:4", sparsity_initial=0.3).filled().sparsity == 0.0


# -- contradictions ------------------------------------------------------------------------------------------------


def test_two_of_four_with_another_sparsity_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"Pattern 2:4 has sparsity 0\.5, but 0\.9 was asked for; leave --sparsity out"
    ):
        config(pattern="2:4").filled()


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4"])
def test_a_pattern_without_a_sparsity_of_its_own_needs_one(pattern: str) -> None:
    with pytest.raises(ConfigError, match=f"Pattern {pattern} needs a sparsity, for example --sparsity 0.9"):
        config(pattern=pattern, sparsity=None).filled()
    assert config(pattern=pattern, sparsity=0.0).filled().sparsity == 0.0


@pytest.mark.parametrize("missing", ["model", "data"])
def test_a_model_and_data_are_needed(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"No {missing} is given; say which with --{missing}"):
        config(**{missing: ""}).filled()


def test_unknown_method_and_pattern_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"Unknown method 'lottery'; use one of dense, .*pst"):
        config(method="lottery").filled()
    with pytest.raises(
        PatternError, match=r"Unknown pattern 'foo'; use one of 2:4, block:4x4, structured, unstructured"
    ):
        config(pattern="foo").filled()
    with pytest.raises(PatternError, match="Pattern '4:2' is not usable"):
        config(pattern="4:2").filled()


@pytest.mark.parametrize("method", ["dense", "magnitude"])
def test_faithful_is_of_pst_alone(method: str) -> None:
    with pytest.raises(ConfigError, match=f"--faithful is the published PST; it does not go with method {method}"):
        config(method=method, faithful=True).filled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity_initial": -0.1}, r"initial sparsity -0\.1 must lie between 0 and the final sparsity 0\.9"),
        ({"sparsity_warmup": 0.8}, r"warm-up 0\.8 and cool-down 0\.5; .* together at most 1"),
        ({"sparsity_cooldown": -0.3}, r"cool-down -0\.3; both are fractions of training"),
    ],
)
def test_a_schedule_that_leads_nowhere_is_refused_before_anything_is_loaded(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options).filled()


def test_a_start_above_the_end_is_a_start_at_the_end() -> None:
    assert config(sparsity_initial=0.5, sparsity=0.3).filled().sparsity == 0.3
    assert config(sparsity_initial=0.6, pattern="2:4", sparsity=None).filled().sparsity == 0.5


# -- bounds --------------------------------------------------------------------------------------------------------

LOWEST = {
    "batch_size": 1, "mask_every": 1, "steps": 0, "limit": 0, "eval_every": 0, "checkpoint_every": 0, "r1": 1, "r2": 1,
    "max_length": 3, "seed": 0,
}  # fmt: skip
FINITE = ["epochs", "lr", "lr_update", "lr_scores", "weight_decay", "max_grad_norm"]


@pytest.mark.parametrize(("name", "lowest"), LOWEST.items())
def test_whole_numbers_have_a_lowest_value(name: str, lowest: int) -> None:
    assert getattr(config(**{name: lowest}), name) == lowest
    with pytest.raises(ConfigError, match=f"{name} is {lowest - 1}; it must be at least {lowest}"):
        config(**{name: lowest - 1})


@pytest.mark.parametrize("name", FINITE)
def test_rates_are_finite_and_not_negative(name: str) -> None:
    assert getattr(config(**{name: 0.0}), name) == 0.0
    for value in (-1e-9, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=f"{name} is .*; it must be a finite number of at least 0"):
            config(**{name: value})


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("sparsity", [0.0, 0.999], [-0.1, 1.0, float("nan")]),
        ("lr_warmup", [0.0, 1.0], [-0.1, 1.1, float("nan")]),
        ("beta", [-1.0, 0.0, 2.0], [float("inf"), float("nan")]),
        ("seed", [2**32 - 1], [2**32, 10**20]),
        ("validation_fraction", [0.01, 0.99], [0.0, 1.0, -1.0, float("nan")]),
        ("device", ["auto", "cpu", "cuda", "cuda:1"], ["gpu", "", "CPU", "mps"]),
    ],
)
def test_every_other_bound(name: str, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        assert getattr(config(**{name: value}), name) == value
    for value in outside:
        with pytest.raises((ConfigError, PatternError), match=rf"(?i){name} (is )?.*(outside|must|use|from)"):
            config(**{name: value})


def test_every_option_has_a_line_of_help() -> None:
    assert all(len(each.metadata["help"]) > 10 for each in fields(TrainConfig))
