"""Which cells a grid has, and what it refuses before anything runs."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pst.compare.grid import Cell, build, parse_names, parse_sparsities
from pst.errors import ConfigError, PatternError
from pst.methods import names
from pst.methods.pst import DEFAULTS, FAITHFUL, FINETUNED


def cells(**changes: Any) -> tuple[Cell, ...]:
    options: dict[str, Any] = {
        "model": "some/model", "data": "glue/cola", "methods": ("dense", "magnitude", "pst"),
        "patterns": ("unstructured", "2:4"), "sparsities": (0.5, 0.9), "seeds": 2, "runs": Path("out/runs"),
    }  # fmt: skip
    return build(**(options | changes))


def test_dense_once_a_seed_a_fixed_sparsity_once_and_the_others_at_each() -> None:
    found = [(cell.seed, cell.method, cell.pattern, cell.sparsity) for cell in cells(methods=("pst", "dense"))]
    one_seed = [("dense", "dense", 0.0)]
    one_seed += [("pst", "unstructured", 0.5), ("pst", "unstructured", 0.9), ("pst", "2:4", 0.5)]
    assert found == [(seed, *cell) for seed in range(2) for cell in one_seed]


def test_names_are_unique_and_fit_a_file_system() -> None:
    found = [cell.name for cell in cells(patterns=("unstructured", "2:4", "block:2x2"), sparsities=(0.5, 0.9, 0.95))]
    assert len(set(found)) == len(found) == 2 * (1 + 2 * 7)
    assert found[0] == "dense_seed0"
    assert "pst_2-4_0.5_seed1" in found
    assert "magnitude_block-2x2_0.95_seed0" in found


def test_every_cell_has_the_same_data_steps_batch_and_its_seed() -> None:
    for cell in cells(sets=("epochs=2", "batch_size=7")):
        assert (cell.config.epochs, cell.config.batch_size, cell.config.seed) == (2.0, 7, cell.seed)


def test_the_published_method_gets_the_epochs_and_seeds_of_the_others() -> None:
    assert FAITHFUL["epochs"] == 20.0
    found = cells(methods=("dense", "pst", "pst-faithful"))
    assert {cell.config.epochs for cell in found} == {3.0}
    faithful = [cell for cell in found if cell.config.faithful]
    assert {(cell.method, cell.config.method, cell.config.seed == cell.seed) for cell in faithful} == {
        ("pst-faithful", "pst", True)
    }
    assert {cell.config.lr_scores for cell in faithful} == {FAITHFUL["lr_scores"]}


def test_options_for_one_method() -> None:
    found = cells(sets=("lr=0.5", "pst.lr-update=0.25", "pst.lr=0.125"))
    rates = {cell.method: (cell.config.lr, cell.config.lr_update) for cell in found}
    assert rates == {"dense": (0.5, 0.0), "magnitude": (0.5, 0.0), "pst": (0.125, 0.25)}


def test_from_dense_and_teacher_name_the_dense_run_of_the_seed() -> None:
    for cell in cells(from_dense=True, teacher_from_dense=True):
        folder = f"out/runs/dense_seed{cell.seed}/model"
        expected = ("some/model", "", None) if cell.method == "dense" else (folder, folder, f"dense_seed{cell.seed}")
        assert (cell.config.model, cell.config.teacher, cell.dense) == expected


def test_sparse_runs_from_dense_ones_take_the_recipe_of_a_finetuned_start() -> None:
    def recipes(*, from_dense: bool) -> dict[tuple[str, float], tuple[Any, str | None]]:
        found = cells(patterns=("unstructured", "2:4"), sparsities=(0.5, 0.9), from_dense=from_dense)
        chosen = [cell for cell in found if cell.method == "pst"]
        return {(cell.pattern, cell.sparsity): (cell.config.lr, cell.config.teacher) for cell in chosen}

    usual = recipes(from_dense=False)
    assert usual == dict.fromkeys(usual, (DEFAULTS["lr"], ""))
    light, taught = (FINETUNED["lr"], ""), (DEFAULTS["lr"], "start")
    assert recipes(from_dense=True) == usual | {("unstructured", 0.5): light, ("2:4", 0.5): taught}


def test_every_method_there_is_can_be_named() -> None:
    choosing = tuple(name for name in names() if not hasattr(import_module(f"pst.methods.{name}"), "KEEPS_ZEROS"))
    assert {cell.method for cell in cells(methods=choosing)} == set(choosing) > {"dense", "magnitude", "pst"}
    for name in set(names()) - set(choosing):
        with pytest.raises(ConfigError, match=f"Method {name} keeps the zeros that its model has"):
            cells(methods=("dense", name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "nothing to compare; name --methods from "),
        ({"methods": ("pst", "lottery")}, "Unknown method 'lottery' in --methods; use "),
        ({"methods": ("magnitude-faithful",)}, "seed 0 is not possible: .*does not go with method magnitude"),
        ({"patterns": ()}, "nothing to prune to; name --patterns"),
        ({"sparsities": ()}, "unstructured needs --sparsities"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"methods": ("pst",), "from_dense": True}, "--from-dense needs the dense runs; add dense"),
        ({"methods": ("pst",), "teacher_from_dense": True}, "--teacher-from-dense needs the dense runs"),
        ({"teacher_from_dense": True, "sets": ("pst.teacher=x",)}, "name two teachers"),
        ({"sets": ("pst.steps=9",)}, "steps is the same for all methods"),
        ({"sets": ("movement.lr=1",), "methods": ("pst",)}, "is for 'movement', which is not among --methods pst"),
        ({"sets": ("seed=1",)}, "--set seed is not for a comparison; --seeds sets it"),
        ({"sets": ("pst.sparsity=0.1",)}, "--set pst.sparsity is not for a comparison; --sparsities sets it"),
        ({"sets": ("lr",)}, "--set lr is not of the form key=value or METHOD.key=value"),
        ({"sets": ("lrr=1",)}, "did you mean"),
        ({"sets": ("sparsity_warmup=0.8", "sparsity_cooldown=0.8")}, "The run magnitude, unstructured 50%, seed 0"),
        ({"model": ""}, "No model is given"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cells(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"patterns": ("3:2",)}, {"patterns": ("round",)}, {"sparsities": (0.5, 1.0)}, {"sparsities": (-0.1,)}],
)
def test_patterns_and_sparsities_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(PatternError):
        cells(**changes)


def test_lists_on_the_command_line() -> None:
    assert parse_names(" dense, pst,dense,") == ("dense", "pst")
    assert parse_sparsities("0.5,.9") == (0.5, 0.9)
    with pytest.raises(ConfigError, match="--sparsities is 'half'"):
        parse_sparsities("half")
