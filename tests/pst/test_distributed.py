"""Two real processes against one: the same masks, the same weights, the same metrics.

Over gloo on the processor, and over NCCL where there are two GPUs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pst.distributed import Processes
from pst.errors import ConfigError
from pst.train import train
from tests.conftest import save_tokenizer
from tests.pst.training import checkpoint_steps, log_lines, options, report, tensors, weights

RAMP = {"sparsity_initial": 0.0, "sparsity_warmup": 0.1, "sparsity_cooldown": 0.3}
"""Masks that change at most of the steps."""
ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
LAUNCH += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # a free port

NCCL = pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs"))
DEVICES = pytest.mark.parametrize("device", ["cpu", NCCL])

MASKS = """
import json, sys
from pathlib import Path
import torch
from pst import train as module
from pst.config import TrainConfig

config, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
choose, seen = module.set_sparsity_, []

def told(model, sparsity, **options):
    check = choose(model, sparsity, **options)
    state = model.state_dict()
    seen.append({name: value.clone() for name, value in state.items() if not name.endswith(".sparsity")})
    return check

module.set_sparsity_ = told
module.train(TrainConfig(**config), folder / "run")
import os
torch.save(seen, folder / f"rank{os.environ['RANK']}.pt")
"""


@pytest.fixture(scope="module")
def still_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without dropout, which would differ between the processes."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("still_bert")
    size = save_tokenizer(folder, model_max_length=64)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def launched(*command: str, code: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*LAUNCH, *command], capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert (done.returncode == 0) == (code == 0), done
    return done.stdout + done.stderr


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """But for the bias of the keys: softmax cancels it, so its gradient is mere rounding, which Adam scales up."""
    assert one.keys() == other.keys()
    for name in (name for name in one if not name.endswith("key.bias")):
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


def flags(model: Path, data: Path, **changes: Any) -> list[str]:
    chosen = {"batch_size": 9, "device": "cpu", **RAMP, **changes}  # 9: one process has a row more than the other
    sets = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    return ["--model", str(model), "--data", str(data), "--sparsity", "0.5", "--steps", "40", *sets]


@DEVICES
def test_two_processes_do_what_one_does(still_bert: Path, reviews_file: Path, tmp_path: Path, device: str) -> None:
    same = {"eval_every": 20, "device": device, "calibration": 0}
    one = train(options(still_bert, reviews_file, **RAMP, **same, steps=40, batch_size=9), tmp_path / "one")
    said = launched("-m", "cli", "train", *flags(still_bert, reviews_file, **same), "-o", str(tmp_path / "two"))
    assert said.count(f"{tmp_path / 'two' / 'model'}: accuracy") == 1  # one of them speaks
    assert report(tmp_path / "two")["processes"] == 2
    assert report(tmp_path / "two")["metrics"] == one.metrics
    mine, theirs = tensors(tmp_path / "one" / "model"), tensors(tmp_path / "two" / "model")
    pruned = 0
    for name, weight in mine.items():
        if name.endswith(".weight") and ".layer." in name and weight.ndim == 2:
            assert torch.equal(weight == 0, theirs[name] == 0), name
            pruned += 1
    assert pruned == 12
    assert_close(mine, theirs)
    for line, other in zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "two"), strict=True):
        assert other == pytest.approx(line, rel=1e-4) if "eval" not in line else other == line


@DEVICES
def test_two_processes_learn_from_the_start_as_one_does(
    still_bert: Path, reviews_file: Path, tmp_path: Path, device: str
) -> None:
    dense = train(options(still_bert, reviews_file, method="dense", steps=60, lr=1e-2), tmp_path / "dense").model
    same: dict[str, Any] = {"pattern": "2:4", "device": device, "calibration": 0}
    one = train(options(dense, reviews_file, **RAMP, **same, steps=40, batch_size=9), tmp_path / "one")
    launched("-m", "cli", "train", *flags(dense, reviews_file, **same), "-o", str(tmp_path / "two"))
    assert report(tmp_path / "two")["processes"] == 2
    assert report(tmp_path / "two")["teacher"] == report(tmp_path / "one")["teacher"] == "start"
    assert report(tmp_path / "two")["metrics"] == one.metrics
    mine, theirs = tensors(tmp_path / "one" / "model"), tensors(tmp_path / "two" / "model")
    assert all(torch.equal(weight == 0, theirs[name] == 0) for name, weight in mine.items() if weight.ndim == 2)
    assert_close(mine, theirs)


def test_two_calibrated_processes_do_nearly_the_same(still_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    """Calibration looks at sums over both, rounded in another order: masks may differ where two entries are as good."""
    one = train(options(still_bert, reviews_file, **RAMP, steps=40, batch_size=9), tmp_path / "one")
    launched("-m", "cli", "train", *flags(still_bert, reviews_file), "-o", str(tmp_path / "two"))
    assert report(tmp_path / "two")["metrics"] == pytest.approx(one.metrics, abs=0.05)
    mine, theirs = tensors(tmp_path / "one" / "model"), tensors(tmp_path / "two" / "model")
    pruned = [name for name in mine if name.endswith(".weight") and ".layer." in name and mine[name].ndim == 2]
    assert len(pruned) == 12
    for name in pruned:
        assert ((mine[name] == 0) != (theirs[name] == 0)).float().mean() < 0.03, name
        assert (mine[name] == 0).sum() == (theirs[name] == 0).sum()


@DEVICES
def test_masks_and_weights_stay_equal(tiny_bert: Path, reviews_file: Path, tmp_path: Path, device: str) -> None:
    """With dropout, after every one of many steps, to the bit."""
    config = {"model": str(tiny_bert), "data": str(reviews_file), "sparsity": 0.6, "steps": 60, "batch_size": 8}
    script = tmp_path / "masks.py"
    script.write_text(MASKS)
    launched(str(script), json.dumps(config | {"device": device, "lr_scores": 0.05}), str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", map_location="cpu") for rank in range(2))
    assert len(first) == len(second) == 61
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    masks = [name for name in first[0] if name.endswith(".mask")]
    assert masks
    assert any(not torch.equal(first[30][name], first[60][name]) for name in masks)  # they did move


@DEVICES
def test_an_interrupted_pair_goes_on(tiny_bert: Path, reviews_file: Path, tmp_path: Path, device: str) -> None:
    """Dropout included: each process has its own random state in the checkpoint."""
    arguments = flags(tiny_bert, reviews_file, checkpoint_every=0, device=device)
    launched("-m", "cli", "train", *arguments, "-o", str(tmp_path / "whole"))
    output = tmp_path / "stopped"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*LAUNCH, "-m", "cli", "train", *arguments, "-o", str(output)]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and not (output / "metrics.jsonl").exists():
            time.sleep(0.01)
        while running.poll() is None and not (output / "metrics.jsonl").read_text():  # ten steps
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
    if not checkpoint_steps(output):
        pytest.skip("the run was over before the signal came")
    launched("-m", "cli", "train", "--resume", "-o", str(output))
    assert weights(output) == weights(tmp_path / "whole")


def test_gradient_accumulation(still_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    train(options(still_bert, reviews_file, steps=12), tmp_path / "whole")
    train(options(still_bert, reviews_file, steps=12, accumulate=3), tmp_path / "parts")
    assert_close(tensors(tmp_path / "whole" / "model"), tensors(tmp_path / "parts" / "model"))


def test_a_single_process_exchanges_nothing() -> None:
    alone = Processes()
    assert alone.first
    assert alone.gather({"a": 1}) == [{"a": 1}]
    assert alone.share([3, 1, 2]) == [3, 1, 2]
    tensor = torch.ones(3)
    assert alone.sum_(tensor) is tensor
    assert alone.any(True, torch.device("cpu"))
    assert not alone.any(False, torch.device("cpu"))


def test_fsdp_is_refused(tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"FSDP splits each weight .* launch with plain data parallelism"):
        train(options(tiny_bert, reviews_file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_in_one_process_ends_both(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    said = launched("-m", "cli", "train", *flags(tiny_bert, reviews_file), "-o", str(tmp_path / "full"), code=2)
    assert "already holds a result, which is kept" in said
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]
    assert "[rank" not in said  # whose traceback would say no more than that the first one is gone


def test_a_folder_that_cannot_be_made_ends_both(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    said = launched("-m", "cli", "train", *flags(tiny_bert, reviews_file), "-o", str(tmp_path / "file/run"), code=2)
    assert "a part of that path is a file" in said
    assert "[rank" not in said
