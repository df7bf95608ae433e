"""The commands and requests of docs/generation.md run as they stand."""

import json
import re
import shlex
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

from serve.http import generate

from .command_line import ROOT, command, done, environment
from .conftest import FILLER
from .decoders import make_decoder

GUIDE = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
COMMANDS, REQUESTS = (block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.DOTALL))


def test_commands_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_decoder(tmp_path / "runs" / "gpt2", "gpt2", positions=96)
    (tmp_path / "text.txt").write_text("\n\n".join([" ".join(FILLER)] * 3), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert [line.split()[1] for line in COMMANDS] == ["export", "eval", "bench", "serve"]
    printed = [done(*shlex.split(line)[1:]) for line in COMMANDS[:-1]]
    assert "perplexity" in printed[1]
    assert "1x16 prompt" in printed[2]
    assert "4x16 +8 tokens" in printed[2]
    serve = shlex.split(COMMANDS[-1])
    server = subprocess.Popen(command(*serve[1:]), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        assert server.stderr.readline().startswith("Serving gpt2 at ")
        whole, events = (_send(line, port=serve[serve.index("--port") + 1]) for line in REQUESTS)
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    (generation,) = json.loads(whole)["generations"]
    assert set(generation) == {"text", "prompt_tokens", "new_tokens", "finish_reason"}
    assert all(name in GUIDE for name in generation)
    assert json.loads(events.strip().splitlines()[-1].removeprefix("data: ")).keys() == generation.keys()


def _send(line: str, *, port: str) -> str:
    """What the curl command would print."""
    words = shlex.split(line)
    (url,) = (word for word in words if word.startswith(f"localhost:{port}/"))
    with urllib.request.urlopen(urllib.request.Request(f"http://{url}", data=words[-1].encode()), timeout=60) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("generation_cpu", ("dense", "2of4", "structured")),
        ("generation_onnxruntime-sparse_cpu", ("dense", "2of4", "unstructured-80", "unstructured-90")),
    ],
)
def test_the_table_is_that_of_the_committed_report(name: str, columns: tuple[str, ...]) -> None:
    report = json.loads((ROOT / "benchmarks" / f"{name}_202611.json").read_text(encoding="utf-8"))
    rows = (line.strip("| ").split(" | ") for line in GUIDE.splitlines())
    quoted = {row[0]: row[1:] for row in rows if len(row) == 1 + len(columns)}
    assert len(report["measurements"]) == len(columns) * sum(row.count("×") > 1 for row in map(str, quoted.values()))
    for entry in report["measurements"]:
        column = columns.index(entry["artifact"])
        rate, time = entry["tokens_per_s"], entry["latency"]["p50"]
        expected = f"{rate:.1f} tokens/s" if entry["new_tokens"] else f"{time:.0f} ms"
        if entry["speedup"]:
            expected += ", {ratio:.2f}× ({low:.2f} to {high:.2f})".format(**entry["speedup"])
        assert quoted[entry["workload"]][column] == expected


def test_every_field_is_explained() -> None:
    table = GUIDE.partition("| field |")[2]
    fields = re.findall(r"^\| `(\w+)`(?: or `(\w+)`)? \|", table, flags=re.MULTILINE)
    assert [name for row in fields for name in row if name] == list(generate.FIELDS)
    assert f"{generate.MAX_NEW_TOKENS}, or what there is room for" in table
