"""GPT-2 on the E2E data, dense and sparse: the BLEU of each, from nothing but the data.

    python -m benchmarks.gpt2_e2e --data E2E --output runs/gpt2_e2e

E2E is a folder with train, validation and, where there are any, test rows: a prompt and a target each, several targets
for one prompt. The steps, whose results stay in OUTPUT, so that a second call goes on where the first was stopped, and
several calls with a method or sparsity each can run beside each other once the dense run is there (--methods alone):

    1. a GPT-2 of the given size with random weights, and a vocabulary learned from the training rows
    2. dense     that model, trained for --dense-epochs
    3. sparse    from the dense one, for --sparse-epochs, every method at every sparsity; the method "dense" trains the
                 dense one on for as long, so that the others are not compared with a model that saw less

Prints a table, and writes it with options, machine and versions to benchmarks/gpt2_e2e_<device>_<yyyymm>.json. BLEU is
sacrebleu's, in points from 0 to 100, after beam search with the options num_beams, length_penalty, no_repeat_ngram and
max_new_tokens of pst train, over the distinct prompts of the validation and of the test rows. Nothing is chosen by the
test rows: every run ends with its last step.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.reports import report_path
from pst import tables
from pst.compare.environment import environment
from pst.config import TrainConfig
from pst.errors import RunError
from pst.files import read_json, resolve_model, write_json
from pst.generation import answer, bleu
from pst.progress import note
from pst.scratch import make_gpt2
from pst.sequences import load_causal
from pst.settings import resolve
from pst.tasks.data_to_text import encode_prompts, load, longest_prompt, set_decoding
from pst.train import train

SAMPLES = 3
"""Answers to test prompts that stand in the report, for a person to read."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run what is not there yet, print the table; returns where the report lies."""
    options = _options(arguments)
    base = TrainConfig(data=str(options.data), task="data_to_text", device=options.device)
    sizes = {name: getattr(options, name) for name in ("layers", "width", "heads", "vocabulary", "positions", "seed")}
    scratch = options.output / "_".join(["scratch", *(f"{name}{value}" for name, value in sizes.items())])
    if not (scratch / "config.json").is_file():
        pairs = load(base, split="train")
        parameters = make_gpt2(scratch, [*pairs.prompts, *pairs.targets], **sizes)
        note(f"{scratch}: GPT-2 with {parameters:,} parameters and random weights.")

    def run(name: str, model: Path, *, sets: list[str], **flags: Any) -> tuple[dict[str, Any], Path]:
        given = {"model": str(model), "data": str(options.data), "device": options.device, "seed": options.seed}
        given |= {"task": "data_to_text", **flags}
        longest = f"max_length={options.positions}"
        config = resolve(TrainConfig, sets=[longest, *options.sets, *sets], flags=given)
        result = train(config, options.output / name, resume=True)
        row = {"name": name, **_summary(result.model), "seconds": result.seconds, "steps": result.steps}
        row |= {"peak_memory_bytes": result.peak_memory_bytes, "trainable_parameters": result.trainable_parameters}
        tested = options.output / name / "test.json"  # decoding takes longer than anything else that is kept
        if not tested.is_file():
            write_json(tested, _test(result.model, config))
        return row | read_json(tested, RunError, "delete it to decode again."), result.model

    first, dense = run("dense", scratch, sets=options.dense_sets, method="dense", epochs=options.dense_epochs)
    rows = [first]
    for method in options.methods:
        for sparsity in [None] if method == "dense" else options.sparsities:
            name = f"{method}_{sparsity:g}" if sparsity is not None else "dense_longer"
            sets = options.dense_sets if method == "dense" else options.sparse_sets
            flags = {"method": method, "sparsity": sparsity, "epochs": options.sparse_epochs}
            flags |= {"teacher": str(dense) if options.distil and method != "dense" else None}
            rows.append(run(name, dense, sets=sets, **flags)[0])
    print(_table(rows))
    machine = environment(command=shlex.join(["python", "-m", "benchmarks.gpt2_e2e", *options.given]), jobs=1)
    report = options.report or report_path("gpt2_e2e", machine, device=options.device)
    write_json(report, {"environment": machine, "model": sizes, "results": rows})
    print(f"Written to {report}.")
    return report


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the E2E rows")
    parser.add_argument("--output", type=Path, required=True, help="folder for the models and runs")
    parser.add_argument("--report", type=Path, help="JSON file to write, in place of the one in benchmarks/")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    for name, value in {"layers": 12, "width": 768, "heads": 12, "vocabulary": 4000, "positions": 192}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the GPT-2 ({value})")
    parser.add_argument("--methods", nargs="*", default=["dense", "pst"], help="dense pst")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.9], help="0.5 0.9")
    parser.add_argument("--dense-epochs", type=float, default=10.0, help="passes of the first run (10)")
    parser.add_argument("--sparse-epochs", type=float, default=5.0, help="passes of each later run (5)")
    parser.add_argument("--distil", action="store_true", help="sparse runs learn from the dense model as well")
    for name, which in {"": "every run", "dense-": "the dense runs", "sparse-": "the sparse runs"}.items():
        text = f"options of pst train for {which}"
        destination = f"{name}sets".replace("-", "_")
        parser.add_argument(f"--{name}set", dest=destination, nargs="+", default=[], metavar="KEY=VALUE", help=text)
    options = parser.parse_args(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    return options


def _summary(model: Path) -> dict[str, Any]:
    """What the run says of its result; the validation BLEU in points."""
    report = read_json(model / "sparsity.json", RunError, "train again.")
    metrics = report["metrics"]
    return {
        "method": report["method"],
        "sparsity": report["sparsity"],
        "bleu_validation": 100 * metrics["bleu"],
        "loss_validation": metrics["loss"],
        "perplexity_validation": metrics["perplexity"],
        "config": report["config"],
        "data": report["data"],
    }


def _test(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """BLEU on the test rows, where there are some, with the first answers."""
    file = next((path for path in sorted(Path(config.data).glob("test.*")) if tables.ending_of(path)), None)
    if file is None:
        return {"bleu_test": None}
    pairs = load(replace(config, validation=str(file)), split="validation")
    questions = pairs.by_prompt()
    model, tokenizer = load_causal(str(resolve_model(folder)))
    set_decoding(model, config)
    prompts = encode_prompts(tokenizer, list(questions), most=longest_prompt(model, config))
    device = torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else config.device)
    answers = answer(
        model.to(device), tokenizer, prompts, no_repeat_ngram=config.no_repeat_ngram, batch_size=64, device=device
    )
    samples = [{"prompt": prompt, "answer": text} for prompt, text in zip(questions, answers, strict=True)]
    return {
        "bleu_test": 100 * bleu(answers, list(questions.values())),
        "test": {"source": pairs.source, "prompts": len(questions), "sha256": pairs.fingerprint},
        "samples": samples[:SAMPLES],
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'run':<16} {'zeros':>7} {'BLEU val':>9} {'BLEU test':>9} {'loss':>7} {'trained':>12} {'seconds':>9}"]
    for row in rows:
        test = "-" if row["bleu_test"] is None else f"{row['bleu_test']:.2f}"
        lines.append(
            f"{row['name']:<16} {row['sparsity']['measured']:>7.2%} {row['bleu_validation']:>9.2f} {test:>9} "
            f"{row['loss_validation']:>7.4f} {row['trainable_parameters']:>12,} {row['seconds']:>9.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
