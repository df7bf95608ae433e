"""Mixed plans: what a file says, which weight gets what, and that masks, run folders and exports follow it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from export.manifest import Manifest
from export.pipeline import export
from pst import kernels
from pst.config import TrainConfig
from pst.errors import ArtifactError, ConfigError, PatternError
from pst.masked_weight import MaskedWeight
from pst.materialize import masked_weights
from pst.patterns import parse_pattern
from pst.plan import Plan, parse_plan, read_plan
from pst.prune import prune
from pst.run_folder import NOT_COMPARED
from pst.sparsify import merge_, prunable_weights, set_sparsity_, sparsify_
from pst.train import InterruptedRun, train
from tests.command_line import done
from tests.pst.oracle import keep_highest, keep_n_of_m
from tests.pst.training import log_lines, options, report, tensors

TEXT = """
attention = "dense"
intermediate = "2:4"
output = {pattern = "unstructured", sparsity = 0.9}
"""
LAYER = "bert.encoder.layer.0."
NAMES = [f"bert.encoder.layer.{layer}.{part}.weight" for layer in (0, 1, 11) for part in (
    "attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")]  # fmt: skip


def plan(text: str) -> Plan:
    return parse_plan(text, where="plan.toml")


def specs(text: str) -> list[str]:
    """What each of NAMES gets."""
    return [target.spec for target in plan(text).assign(NAMES).values()]


def load_bert(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT, ["dense", "dense", "2:4", "unstructured"] * 3),
        ('"attention.output" = "1:4"\noutput = "2:4"\ndefault = "dense"', ["dense", "1:4", "dense", "2:4"] * 3),
        # The first that matches decides, and the default is last wherever it stands.
        ('default = "dense"\noutput = "2:4"', ["dense", "2:4", "dense", "2:4"] * 3),
        # Whole parts alone: layer.1 is not layer.11, and out is not output.
        ('"layer.1" = "2:4"\ndefault = "dense"', ["dense"] * 4 + ["2:4"] * 4 + ["dense"] * 4),
        ('"*.[01].*.dense.weight" = "2:4"\ndefault = "dense"', ["dense", "2:4", "2:4", "2:4"] * 2 + ["dense"] * 4),
        ("'re:layer\\.\\d\\d\\.' = \"block:4x4\"\n", None),
        ("'re:layer\\.\\d\\d\\.' = {pattern = 'block:4x4', sparsity = 0.5}\ndefault = '4:8'",
         ["4:8"] * 8 + ["block:4x4"] * 4),
    ],
)  # fmt: skip
def test_the_first_entry_that_matches_decides(text: str, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match="needs a sparsity"):
            plan(text)
        return
    assert specs(text) == expected
    assert specs(plan(text).text) == expected  # as stored with a run
    assert plan(plan(text).text).text == plan(text).text


def test_what_is_stored_keeps_keys_that_need_quotes() -> None:
    text = plan("'re:\\.[01]\\.\"?ä' = {pattern = 'unstructured', sparsity = 0.25}").text
    assert plan(text).entries[0].key == 're:\\.[01]\\."?ä'
    assert plan(text).entries[0].target.sparsity == 0.25


def test_the_overview_counts_weights_and_parameters() -> None:
    sizes = dict.fromkeys(NAMES, 1024) | {NAMES[2]: 2048}
    assert plan(TEXT).overview(sizes) == [
        "attention -> dense: 6 weights, 6,144 parameters",
        "intermediate -> 2:4 50%: 3 weights, 4,096 parameters",
        "output -> unstructured 90%: 3 weights, 3,072 parameters",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "plan.toml is empty"),
        ("attention = ", "is not valid TOML"),
        ('a = "2:4"\na = "1:4"', "is not valid TOML"),
        ("attention = 3", "'attention' in plan.toml is 3"),
        ('attention = {patern = "2:4"}', "unknown key 'patern'; did you mean 'pattern'"),
        ('attention.self = "2:4"', "unknown key 'self'; put a name with dots in quotes, such as \"attention.self\""),
        ("attention = {sparsity = 0.5}", "names no pattern"),
        ('attention = "unstructured"', "needs a sparsity"),
        ('attention = {pattern = "2:4", sparsity = 0.9}', "2:4 has 0.5; leave the sparsity out"),
        ('attention = {pattern = "dense", sparsity = 0.9}', "dense has 0; leave the sparsity out"),
        ('attention = {pattern = "unstructured", sparsity = "0.9"}', "which is not a number"),
        ('attention = {pattern = "unstructured", sparsity = true}', "which is not a number"),
        ("'re:[' = \"2:4\"", "is not a regular expression"),
        ('attention = {pattern = "structured", sparsity = 0.5}', "use --pattern structured without a plan"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"plan\.toml") as caught:
        plan(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('atention = "2:4"\ndefault = "dense"', "matches no prunable weight; did you mean 'attention'"),
        ('"*.pooler.*" = "2:4"', "matches no prunable weight; a name is, for example, bert.encoder.layer.0"),
        ('output = "2:4"\n"attention.output" = "dense"\ndefault = "2:4"', "decided by 'output' before it; move it up"),
        ('attention = "2:4"', "has no entry for 6 weights"),
        ('default = "dense"', "leaves every weight dense"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(text).assign(NAMES)
    assert words in str(caught.value)


def test_bad_patterns_and_sparsities_name_the_entry() -> None:
    with pytest.raises(PatternError, match=r"'attention' in plan.toml: Unknown pattern '2;4'"):
        plan('attention = "2;4"')
    with pytest.raises(PatternError, match=r"'attention' in plan.toml: Sparsity 1\.5 is outside"):
        plan('attention = {pattern = "unstructured", sparsity = 1.5}')


def test_a_file_or_its_text(tmp_path: Path) -> None:
    (tmp_path / "a=b.toml").write_text(TEXT, encoding="utf-8")
    assert read_plan(str(tmp_path / "a=b.toml")).text == read_plan(TEXT).text
    (tmp_path / "windows.toml").write_text(TEXT, encoding="utf-8-sig", newline="\r\n")
    assert read_plan(str(tmp_path / "windows.toml")).text == read_plan(TEXT).text
    with pytest.raises(ConfigError, match="does not exist; give --plan an existing TOML file"):
        read_plan(str(tmp_path / "none.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_plan(str(tmp_path / "binary.toml"))


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(model="m", data="d", plan=TEXT, **changes)


def test_the_run_ends_at_the_largest_sparsity() -> None:
    full = config().filled()
    assert (full.pattern, full.sparsity) == ("mixed", 0.9)
    assert full.filled() == full  # what config.yaml holds is the same run again


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "2:4"}, "leave --pattern and --sparsity out"),
        ({"sparsity": 0.5}, "leave --pattern and --sparsity out"),
        ({"budget": "global"}, "a global budget has nothing to share out"),
        ({"method": "dense"}, "prunes nothing; leave --plan out"),
        ({"method": "fixed_mask"}, "keeps the zeros that the model has; leave --plan out"),
        ({"sparsity_warmup": 0.9, "sparsity_cooldown": 0.9}, "together at most 1"),
    ],
)
def test_options_that_a_plan_does_not_go_with(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes).filled()
    assert words in str(caught.value)


def by_name(model: Any) -> dict[str, MaskedWeight]:
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    return {names[module]: attached for module, attached in masked_weights(model)}  # type: ignore[misc]


def test_each_weight_follows_the_schedule_up_to_its_own_end(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, torch.Tensor]] = []
    for together in (False, True):  # as on the processor, and as on a GPU
        monkeypatch.setattr(kernels, "usable", lambda device, together=together: together)
        model = load_bert(tiny_bert)
        plain = {item.name: item.weight.detach().clone() for item in prunable_weights(model)}
        sparsify_(model, plan=plan(TEXT))
        with monkeypatch.context() as context:
            context.setattr("pst.patterns._select._together", lambda scores: False)
            context.setattr("pst.sparsify.scores_together", lambda model: {})
            for level, expected in ((0.3, (0.0, 0.3, 0.3)), (0.6, (0.0, 0.5, 0.6)), (0.9, (0.0, 0.5, 0.9))):
                set_sparsity_(model, level)
                for name, part in by_name(model).items():
                    wanted = expected[0 if "attention" in name else 1 if "intermediate" in name else 2]
                    assert float(part.sparsity) == pytest.approx(wanted)
                    assert int((~part.mask).sum()) == pytest.approx(wanted * part.mask.numel(), abs=4)
        masks = {name: part.mask.clone() for name, part in by_name(model).items()}
        first, second = LAYER + "intermediate.dense.weight", LAYER + "output.dense.weight"
        assert torch.equal(masks[first], keep_n_of_m(plain[first].abs(), 2, 4))
        assert torch.equal(masks[second], keep_highest(plain[second].abs(), 0.9))
        found.append(masks)
        with pytest.raises(PatternError, match="global budget has nothing to share out"):
            set_sparsity_(model, 0.5, budget="global")
        merge_(model)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_method_that_prefers_a_global_budget_follows_the_plan(tiny_bert: Path) -> None:
    from pst.methods.soft_movement import SoftMovement

    model = load_bert(tiny_bert)
    sparsify_(model, method=SoftMovement(), plan=plan(TEXT))
    set_sparsity_(model, 0.9)
    assert {float(part.sparsity) for part in by_name(model).values()} == {0.0, 0.5, 0.9}


def test_a_pattern_that_does_not_fit_names_the_weight(tiny_bert: Path) -> None:
    with pytest.raises(
        PatternError, match=r"layer\.0\.output\.dense\.weight has 64 weights .* which 5 does not divide"
    ):
        sparsify_(load_bert(tiny_bert), plan=plan('"*.[01].output.dense.*" = "3:5"\ndefault = "dense"'))


def check_folder(model: Path) -> None:
    """Each weight of *model* holds what TEXT gives it, and sparsity.json says so."""
    stated = json.loads((model / "sparsity.json").read_text())
    assert stated["pattern"] == "mixed"
    stored, sizes, zeros = tensors(model), 0, 0.0
    for row in stated["weights"]:
        name, weight = row["name"], stored[row["name"]]
        spec, sparsity = ("dense", 0.0) if "attention" in name else ("2:4", 0.5)
        spec, sparsity = ("unstructured", 0.9) if ".output." in name and "attention" not in name else (spec, sparsity)
        assert row["pattern"] == spec
        assert row["density"] == pytest.approx(1 - sparsity, abs=1e-3)
        assert int((weight == 0).sum()) == int(weight.numel() * sparsity)
        assert spec == "dense" or parse_pattern(spec).holds(weight.numpy(), axis=row["axis"])
        sizes, zeros = sizes + weight.numel(), zeros + sparsity * weight.numel()
    assert stated["sparsity"]["requested"] == pytest.approx(zeros / sizes)
    assert stated["sparsity"]["measured"] == pytest.approx(zeros / sizes, abs=1e-3)


@pytest.mark.parametrize("changes", [{}, {"method": "magnitude"}, {"calibration": 16}])
def test_a_run_with_a_plan(tiny_bert: Path, reviews_file: Path, tmp_path: Path, changes: dict[str, Any],
                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "plan.toml").write_text(TEXT, encoding="utf-8")
    settings = options(tiny_bert, reviews_file, plan=str(tmp_path / "plan.toml"), sparsity=None, **changes)
    train(settings, tmp_path / "run")
    assert "attention -> dense: 8 weights, 8,192 parameters" in capsys.readouterr().err
    check_folder(tmp_path / "run" / "model")
    assert report(tmp_path / "run")["config"]["plan"] == plan(TEXT).text
    assert log_lines(tmp_path / "run")[-2]["sparsity"] == pytest.approx(0.9)
    if not changes:
        before = tensors(tiny_bert)
        changed = tensors(tmp_path / "run" / "model")
        name = LAYER + "attention.self.query.weight"
        assert not torch.equal(before[name], changed[name]), "a dense weight trains through its update"


def test_a_run_with_a_plan_goes_on_without_the_file(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pst.settings import resolve

    file = tmp_path / "plan.toml"
    file.write_text(TEXT, encoding="utf-8")
    base = options(tiny_bert, reviews_file, plan=str(file), sparsity=None, calibration=16)
    train(base, tmp_path / "whole")
    stopping = stop_after(5, monkeypatch)
    with stopping, pytest.raises(InterruptedRun):
        train(base, tmp_path / "stopped")
    file.unlink()
    again = resolve(TrainConfig, file=tmp_path / "stopped" / "config.yaml")
    train(again, tmp_path / "stopped", resume=True)
    for name, tensor in tensors(tmp_path / "whole" / "model").items():
        assert torch.equal(tensor, tensors(tmp_path / "stopped" / "model")[name]), name
    assert "plan" not in NOT_COMPARED


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Within: a run is asked to stop once it has made *step* steps."""
    from contextlib import contextmanager

    import pst.train

    @contextmanager
    def stopped() -> Any:
        asked = iter(range(1, 1000))
        yield lambda: next(asked) >= step

    @contextmanager
    def within() -> Any:
        with monkeypatch.context() as context:
            context.setattr(pst.train, "stop_signals", stopped)
            yield

    return within()


def test_prune_by_a_plan_export_and_inspect(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(TEXT, encoding="utf-8")
    output = tmp_path / "out"
    plan_file = tmp_path / "plan.toml"
    said = done("prune", tiny_bert, "--plan", plan_file, "--data", reviews_file, "--compensate", "-o", output)
    assert "mixed by wanda" in said
    check_folder(output)
    rows = json.loads((output / "sparsity.json").read_text())["weights"]
    assert {row["pattern"] for row in rows if "output_error" in row} == {"2:4", "unstructured"}

    manifest = export(output, tmp_path / "artifact", linear_form="gemm")
    assert manifest.pattern == "mixed"
    assert {row.name: row.pattern for row in Manifest.load(tmp_path / "artifact").weights} == {
        row["name"]: row["pattern"] for row in rows
    }
    for path in (output, tmp_path / "artifact"):
        line = next(line for line in done("inspect", path).splitlines() if line.startswith(LAYER + "intermediate"))
        assert line.split()[-1] == "2:4"
        listed = json.loads(done("inspect", path, "--json"))["weights"]
        stated = {row["name"]: row["stated"] for row in listed}
        assert stated[LAYER + "output.dense.weight"] == "unstructured"
        assert stated["classifier.weight"] is None

    # A weight that does not hold what the plan gave it is not exported, whatever the others do.
    stated = json.loads((output / "sparsity.json").read_text())
    for row in stated["weights"]:
        row["pattern"] = "2:4" if row["name"] == LAYER + "output.dense.weight" else row["pattern"]
        row["pattern"] = "1:4" if row["name"] == LAYER + "intermediate.dense.weight" else row["pattern"]
    (output / "sparsity.json").write_text(json.dumps(stated))
    with pytest.raises(ArtifactError, match=r"Pattern 1:4 does not hold in .*layer\.0\.intermediate"):
        export(output, tmp_path / "wrong")


def test_prune_refuses_a_plan_beside_a_pattern(tiny_bert: Path, tmp_path: Path) -> None:
    for more in ({"pattern": "2:4"}, {"sparsity": 0.5}, {"budget": "global"}):
        with pytest.raises(ConfigError, match="plan"):
            prune(tiny_bert, tmp_path / "out", plan=TEXT, **more)
    assert not (tmp_path / "out").exists()
