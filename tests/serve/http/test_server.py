"""The server as a real process, over real sockets."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pst.errors import ConfigError, EngineError
from serve.classify import Classifier
from serve.http.client import ask
from serve.http.process import running_server
from serve.http.server import address_of, bind, serve

from ...command_line import ready_url

ROOT = Path(__file__).resolve().parents[3]


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "serve.http", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.fixture(scope="module")
def url(bert_artifact: Path) -> Iterator[str]:
    with running_server(bert_artifact, threads=1) as address:
        yield address


def test_ready_and_named(url: str) -> None:
    assert status_of(f"{url}/v2/health/live") == 200
    assert status_of(f"{url}/v2/health/ready") == 200
    assert status_of(f"{url}/v2/models/bert") == 200


def test_ask(url: str) -> None:
    answer = ask(url, "a lovely film")
    assert answer["model"] == "bert"
    (prediction,) = answer["predictions"]
    assert prediction["label"] in {"NEGATIVE", "POSITIVE"}
    assert len(ask(url, ["one film", "two"], text_pair=["a", "b"])["predictions"]) == 2


def test_ask_says_what_the_server_says(url: str) -> None:
    with pytest.raises(EngineError, match=r"answered 400: .*empty text"):
        ask(url, " ")


def test_parallel_requests_equal_single_ones(url: str) -> None:
    words = ["the", "film", "is", "a", "lovely", "story", "of", "love", "and", "war", "very", "dull", "plot"]
    texts = [" ".join(words[: 1 + i % len(words)]) for i in range(20)]
    single = [ask(url, text)["predictions"][0] for text in texts]
    with ThreadPoolExecutor(20) as pool:
        parallel = [answer["predictions"][0] for answer in pool.map(lambda text: ask(url, text), texts)]
    for one, other in zip(single, parallel, strict=True):
        assert one["label"] == other["label"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)


def test_cuda_graphs_of_a_compiled_model(tiny_bert: Path) -> None:
    """PyTorch keeps them by thread: what loads, compiles and answers has to be one."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    texts = ["film", "a lovely film", "a dull story of war"] * 4
    with Classifier(tiny_bert, engine="torch-cpu") as exact:
        expected = [exact.predict([text])[0] for text in texts]
    with running_server(tiny_bert, engine="torch-cuda-compiled", threads=1) as address:
        for text, reference in zip(texts, expected, strict=True):
            (answer,) = ask(address, text)["predictions"]
            assert answer["scores"] == pytest.approx(reference.scores, abs=5e-3)


def test_bad_bytes_on_the_wire(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert b"400" in connection.recv(1000)
    assert status_of(f"{url}/v2/health/ready") == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_clean_stop(bert_artifact: Path, number: signal.Signals) -> None:
    with started(bert_artifact, "--port", 0, "--threads", 1) as process:
        address = ready_url(process)
        ask(address, "film")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
        with pytest.raises(EngineError, match="Nothing answers"):
            ask(address, "film")


def test_requests_in_flight_are_answered_before_the_stop(bert_artifact: Path) -> None:
    # The queue delay holds the request inside the server for as long as the test needs.
    arguments = ("--port", 0, "--threads", 1, "--max-queue-delay-ms", 2000, "--max-batch-size", 8)
    with started(bert_artifact, *arguments) as process:
        address = ready_url(process)
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"text": "a lovely film"}).encode()
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(
                b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            assert status_of(f"{address}/v2/health/ready") == 200  # the request before has been read by now
            process.terminate()
            with connection.makefile("rb") as stream:
                assert b"200" in stream.readline()
                assert b"predictions" in stream.read()
        assert process.wait(60) == 0


def test_stop_while_loading(bert_artifact: Path) -> None:
    with started(bert_artifact, "--port", 0, "--threads", 1) as process:
        threading.Event().wait(0.2)
        process.terminate()
        process.communicate(timeout=60)
        # Before Python has set its handlers the signal's own action ends the process.
        assert process.returncode in (0, -signal.SIGTERM)


def failure_of(*arguments: object) -> str:
    with started(*arguments) as process:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        return err


def test_port_in_use(bert_artifact: Path, url: str) -> None:
    port = url.rpartition(":")[2]
    assert f"Port {port} of 127.0.0.1 is in use" in failure_of(bert_artifact, "--port", port)
    assert status_of(f"{url}/v2/health/ready") == 200


def test_bad_arguments(bert_artifact: Path, tmp_path: Path) -> None:
    assert "does not exist" in failure_of(tmp_path / "nowhere")
    assert "not a port" in failure_of(bert_artifact, "--port", 70000)
    assert "not an address" in failure_of(bert_artifact, "--host", "no.such.host.invalid")
    assert "is not an engine" in failure_of(bert_artifact, "--port", 0, "--engine", "nonsense")
    assert "max_batch_size" in failure_of(bert_artifact, "--max-batch-size", 0)


def test_damaged_artifact(bert_artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(bert_artifact, folder)
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:1000])
    assert "damaged" in failure_of(folder, "--port", 0)
    with pytest.raises(EngineError, match=r"did not start: .*damaged"), running_server(folder):
        pytest.fail("the server must not start")


def test_running_server_reports_a_crash(bert_artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(bert_artifact, folder)
    with pytest.raises(EngineError, match=f"exit code -{int(signal.SIGKILL)}"), running_server(folder, threads=1):
        os.kill(_process_of(folder), signal.SIGKILL)


def _process_of(folder: Path) -> int:
    """The process that was started with *folder* as an argument."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in entry.read_bytes().split(b"\0"):
                return int(entry.parent.name)
    raise AssertionError(f"no process serves {folder}")


def test_missing_server_packages(monkeypatch: pytest.MonkeyPatch, bert_artifact: Path) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(EngineError, match=r'uvicorn is not installed; run: pip install "sparse-pst\[cpu\]"'):
        serve(bert_artifact)


def test_bind_takes_a_free_port_and_says_which() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(EngineError, match="in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="not a port"):
        bind("127.0.0.1", -1)


def test_bind_v6() -> None:
    try:
        listener = bind("::1", 0)
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    with contextlib.closing(listener):
        assert address_of(listener).startswith("http://[::1]:")
