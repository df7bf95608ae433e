"""The commands of docs/training.md run as they stand."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pst import methods
from tests.conftest import save_tokenizer, write_reviews

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def desk(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the guide's reader has: ./model, ./gpt2, reviews.csv, facts.jsonl and plan.toml."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(tiny_bert, folder / "model")
    size = save_tokenizer(folder / "gpt2", model_max_length=64)
    settings = json.loads((folder / "gpt2" / "tokenizer_config.json").read_text())
    (folder / "gpt2" / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "[SEP]"}))
    config = GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=3, eos_token_id=3)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    made = write_reviews(folder / "rows.jsonl", rows=60, seed=3).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in made.splitlines()]
    lines = ["text,label", *(f'"{row["sentence"]}",{row["label"]}' for row in rows)]
    (folder / "reviews.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    facts = [{"prompt": "good" if row["label"] else "bad", "completion": row["sentence"]} for row in rows]
    facts += [{"prompt": f"film {row['label']} {i}", "completion": row["sentence"]} for i, row in enumerate(rows)]
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts), encoding="utf-8")
    (plan,) = re.findall(r"```toml\n(.*?)```", GUIDE, flags=re.DOTALL)
    (folder / "plan.toml").write_text(plan, encoding="utf-8")
    return folder


@pytest.mark.parametrize("index", range(len(COMMANDS)))
def test_a_command_runs_as_it_stands(index: int, desk: Path) -> None:
    """In the order of the guide: later ones use what earlier ones wrote."""
    program, *words = shlex.split(COMMANDS[index].replace("--no-python pst", "-m cli"))
    command = [sys.executable, "-m", "cli" if program == "pst" else "torch.distributed.run", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=desk, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    output = desk / words[words.index("--output") + 1]
    written = {"compare": "report.md", "export": "model.onnx", "prune": "sparsity.json"}.get(
        words[0], "model/sparsity.json"
    )
    assert (output / written).is_file()


def test_its_generation_runs_as_it_stands(desk: Path) -> None:
    """On what the commands above wrote."""
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL) if "Generator" in code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=desk, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['")


def test_every_method_is_explained() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", GUIDE, flags=re.MULTILINE)) == set(methods.names())
