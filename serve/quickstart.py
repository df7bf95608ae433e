"""``pst quickstart``: every command of the pipeline in turn, on a real model and real reviews.

Each stage is the command a user would type, shown and run as such, so that what it does can be repeated by hand.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst.errors import PSTError, RunError
from pst.files import read_json
from pst.progress import note
from serve.http.client import ask
from serve.http.process import running_server
from serve.sample import model_folder, write_reviews

QUESTION = "A quietly devastating film, beautifully acted and impossible to forget."
MAX_LENGTH = 64
"""Tokens a review keeps; one in a thousand is longer."""
RECIPE = ("mask_every=4", "sparsity_initial=0.5", "sparsity_warmup=0", "sparsity_cooldown=0.7", "lr=1e-3")
"""Options for going sparse from a fine-tuned parent in few steps on a processor; LOG.md has the experiments."""
SHAPES = "1x32,8x64"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the closing table."""

    label: str
    dense: str
    sparse: str


def quickstart(output: Path, *, fresh: bool, sparsity: float, steps: int) -> str:
    """Run every stage into *output* and return the closing table with its verdict.

    Trained models that *output* holds are kept unless *fresh*. Raises PSTError of whichever stage fails.
    """
    start = time.monotonic()
    base = model_folder()
    data = output / "data"
    rows, held_out = write_reviews(data)
    note(f"Film reviews: {rows} to train on, {held_out} of other films to check with, in {data}.")
    if fresh:
        for name in ("dense", "sparse"):
            shutil.rmtree(output / name, ignore_errors=True)
    common = ["--data", str(data), "--steps", str(steps), "--resume", "--set", f"max_length={MAX_LENGTH}"]
    _pst("train", "--model", str(base), "--method", "dense", *common, "--output", str(output / "dense"))
    recipe = [word for option in RECIPE for word in ("--set", option)]
    _pst(
        "train", "--model", str(output / "dense" / "model"), "--sparsity", str(sparsity),
        *common, *recipe, "--output", str(output / "sparse"),
    )  # fmt: skip
    artifacts = [output / "artifacts" / name for name in ("dense", "sparse")]
    for artifact in artifacts:
        _pst("export", str(output / artifact.name), "--output", str(artifact), "--overwrite")
    report = output / "report"
    _pst(
        "bench", *map(str, artifacts), "--shapes", SHAPES, "--data", str(data), "--budget", "40",
        "--output", str(report), "--overwrite",
    )  # fmt: skip
    note(f"\n$ pst serve {artifacts[1]}")
    with running_server(artifacts[1]) as url:
        body = shlex.quote(json.dumps({"text": QUESTION}))
        note(f"$ curl {url}/v1/classify -H 'Content-Type: application/json' -d {body}")
        answer = ask(url, QUESTION)["predictions"][0]
    return "\n".join(
        [
            *_closing(report, answer),
            f"The whole report: {report / 'report.md'} and report.json in the same folder. "
            f"All of this took {time.monotonic() - start:.0f} s.",
        ]
    )


def _pst(*arguments: str) -> None:
    """Show and run one ``pst`` command; what it prints goes to stderr, where the progress is."""
    note(f"\n$ pst {shlex.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", "cli", *arguments], stdout=sys.stderr, check=False)
    if done.returncode == 130 or done.returncode < 0:
        raise KeyboardInterrupt
    if done.returncode:
        raise RunError(
            f"The quickstart stopped: 'pst {arguments[0]}' failed with exit code {done.returncode}, see above."
        )


def _closing(folder: Path, answer: dict[str, Any]) -> list[str]:
    """The table, the verdict and the answer, from what bench measured."""
    report = read_json(folder / "report.json", PSTError, "run the quickstart again.")
    dense, sparse = report["artifacts"]
    latency = {entry["artifact"]: entry["latency"] for entry in reversed(report["measurements"])}  # the first shape's
    shape = report["measurements"][0]["workload"]

    def row(label: str, show: Any) -> Row:
        return Row(label=label, dense=show(dense), sparse=show(sparse))

    rows = [
        Row(label="", dense="dense", sparse="sparse"),
        row("accuracy on other films", lambda item: f"{item['accuracy']['value']:.1%}"),
        row("zeros in the pruned weights", lambda item: f"{item['sparsity'] if item['pattern'] != 'dense' else 0:.1%}"),
        row("size on disk", lambda item: f"{item['size_bytes'] / 1e6:.1f} MB"),
        row(f"latency p50 at {shape}", lambda item: f"{latency[item['name']]['p50']:.2f} ms"),
        row(f"latency p99 at {shape}", lambda item: f"{latency[item['name']]['p99']:.2f} ms"),
    ]
    width = max(len(item.label) for item in rows)
    lines = [f"{item.label:<{width}}  {item.dense:>10}  {item.sparse:>10}" for item in rows]
    lines.insert(1, "-" * len(lines[0]))
    said = f'"{QUESTION}" is {answer["label"]} (score {answer["score"]:.2f}), says the sparse model.'
    return ["", *lines, "", *report["verdicts"], said]
