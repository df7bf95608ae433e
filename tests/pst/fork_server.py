"""A process with everything imported that forks one child a training run, so that twenty kills take seconds.

Reads one JSON request a line from stdin and answers each with one JSON line on stdout. A request:

    config      fields of TrainConfig                   output, resume      as of pst.train.train
    pause       seconds in the middle of each checkpoint's bytes
    stop        null, or {"signal": "SIGKILL", "event": "half", "count": 2, "delay": 0.01}: send the signal *delay*
                seconds after the second event of that name; without "delay" the child sends it to itself, at that
                very instruction

The events: "step" (before each step), "half" (half of a checkpoint is written), "replace" and "replaced" (around each
rename of a file), "rename" and "renamed" (around that of the finished model).
The answer: code (exit status, negative for a signal), and error (class and message of what train raised, or "").
"""

import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EVENTS = ("step", "half", "replace", "replaced", "rename", "renamed")


def child(request: dict[str, Any], examples: Any, report: int) -> str:
    """Train, writing one byte to *report* at each event; returns what train raised."""
    import torch

    import pst.train
    from pst.batches import training_rows
    from pst.config import TrainConfig

    stop = request["stop"] or {}
    counts = dict.fromkeys(EVENTS, 0)

    def event(name: str) -> None:
        counts[name] += 1
        os.write(report, bytes([EVENTS.index(name)]))
        if name == stop.get("event") and counts[name] == stop["count"] and "delay" not in stop:
            os.kill(os.getpid(), getattr(signal, stop["signal"]))

    batches, save = training_rows, torch.save
    renames = {"replace": os.replace, "rename": os.rename}

    def told_rows(*args: Any, **options: Any) -> Iterator[Any]:
        for rows in batches(*args, **options):
            event("step")
            yield rows

    def slow_save(content: Any, file: Any) -> None:
        buffer = io.BytesIO()
        save(content, buffer)
        data = buffer.getvalue()
        file.write(data[: len(data) // 2])
        file.flush()
        event("half")
        time.sleep(request["pause"])
        file.write(data[len(data) // 2 :])

    def told(name: str) -> Any:
        def rename(*args: Any) -> None:
            event(name)
            renames[name](*args)
            event(f"{name}d")

        return rename

    changed: Any = (pst.train, "training_rows", told_rows), (torch, "save", slow_save)
    for module, name, value in (*changed, (os, "replace", told("replace")), (os, "rename", told("rename"))):
        setattr(module, name, value)
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in request["config"].items()}
    config = TrainConfig(**fields)
    try:
        pst.train.train(config, Path(request["output"]), resume=request["resume"], examples=examples)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run(request: dict[str, Any], examples: Any) -> dict[str, Any]:
    """Fork a child for *request*, stop it where the request says, and wait for its end."""
    (events, report), (errors, error) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(events)
            os.write(error, child(request, examples, report).encode())
        finally:
            os._exit(0)
    os.close(report)
    os.close(error)
    stop = request["stop"]
    seen = 0
    while data := os.read(events, 1):  # until the child is gone
        if stop and "delay" in stop:
            seen += EVENTS[data[0]] == stop["event"]
            if seen == stop["count"]:
                time.sleep(stop["delay"])
                os.kill(pid, getattr(signal, stop["signal"]))
                stop = None
    with open(errors, "rb") as file:
        message = file.read().decode()
    os.close(events)
    _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "error": message}


def main() -> None:
    """Answer requests until stdin ends."""
    import torch
    import transformers.models.bert.modeling_bert  # noqa: F401 - imported once here, not once a child

    from pst import data
    from pst.config import TrainConfig
    from pst.tasks.classification import data_spec

    torch.set_num_threads(1)
    loaded: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        path = request["config"]["data"]
        if path not in loaded:
            spec = data_spec(TrainConfig(data=path))
            loaded[path] = data.load(spec, split="train"), data.load(spec, split="validation")
        print(json.dumps(run(request, loaded[path])), flush=True)


if __name__ == "__main__":
    main()
