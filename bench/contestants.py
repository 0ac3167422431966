"""Who takes part: our whole stack, the two nearest servers, and the plain loop; each started the way a user would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.children import (
    FOLDER,
    StartError,
    end_with_parent,
    free_port,
    log_tail,
    running,
    wait_until_answers,
)

SEQUENCES = 8
CELLS = 8192
BATCH = 512
LLAMA_CPP_PYTHON = "0.3.36"
MODEL_NAME = "bench"
READY_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI server that runs. `key` is short, `title` is what tables say."""

    key: str
    title: str
    port: int
    pid: int

    def chat_body(self, prompt: str, tokens: int) -> dict[str, object]:
        """A greedy streaming chat request of exactly `tokens` tokens, in the words that this server knows."""
        body: dict[str, object] = {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        if (
            self.key != "example"
        ):  # which knows neither; the model's end tokens are never the likeliest
            body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
        return body


@dataclass(frozen=True, slots=True)
class Stack:
    """Our stack: where it listens and the processes of its endpoints.json."""

    server: Server
    processes: tuple[dict[str, Any], ...]

    def address(self, name: str) -> str:
        """The gRPC address of the process `name`."""
        return str(next(p["address"] for p in self.processes if p["name"] == name))


@contextlib.contextmanager
def state_folder() -> Iterator[Path]:
    """An empty state directory, for stacks that are to remember what earlier ones kept; it goes with the block."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="state-", dir=FOLDER) as state:
        yield Path(state)


@contextlib.contextmanager
def caravan(
    models: Sequence[str],
    *,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    state_dir: Path | None = None,
    log_name: str = "caravan",
    serves: Sequence[str] = (),
) -> Iterator[Stack]:
    """Runs `caravan up` with NAME=PATH models on a free port until the block ends. Raises StartError.

    Without a `state_dir` it gets an empty one, which goes with it. `serves` names what the options have it serve besides.
    """
    port = free_port()
    FOLDER.mkdir(exist_ok=True)
    with contextlib.ExitStack() as folders:
        state = state_dir or folders.enter_context(state_folder())
        argv = [sys.executable, "-m", "services.cli", "up", "--port", str(port)]
        argv += ["--state-dir", str(state), *options]
        argv += [word for model in models for word in ("--model", model)]
        with running(log_name, argv, environment) as process:
            url = f"http://127.0.0.1:{port}"
            wait_until_answers(log_name, process, f"{url}/healthz", READY_TIMEOUT_S)
            names = [*(model.partition("=")[0] for model in models), *serves]
            _wait_until_serves(process, f"{url}/v1/chat/completions", names, log_name)
            listed = json.loads((state / "endpoints.json").read_text())["processes"]
            server = Server("caravan", "caravan (REST through Envoy)", port, process.pid)
            try:
                yield Stack(server, tuple(listed))
            finally:
                if process.poll() is not None:
                    raise StartError(f"caravan up ended early:\n{log_tail(log_name)}")


def _wait_until_serves(
    process: subprocess.Popen[bytes], url: str, models: Sequence[str], log_name: str
) -> None:
    """Waits until every model gives a token: ready is what answers."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    for model in models:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        while True:
            request = urllib.request.Request(
                url, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            try:
                urllib.request.urlopen(request, timeout=30).read()
                break
            except OSError as error:
                if time.monotonic() > deadline or process.poll() is not None:
                    message = f"caravan does not serve {model}: {error}\n{log_tail(log_name)}"
                    raise StartError(message) from error
                time.sleep(0.2)


@contextlib.contextmanager
def xllamacpp_server(model: Path, threads: int) -> Iterator[Server]:
    """Runs the llama.cpp server of the xllamacpp wheel, with its own defaults but for size and threads."""
    port = free_port()
    argv = [sys.executable, "-m", "bench.xllamacpp_server", "--model", str(model)]
    argv += ["--port", str(port), "--threads", str(threads)]
    argv += ["--sequences", str(SEQUENCES), "--cells", str(CELLS)]
    with running("xllamacpp", argv) as process:
        wait_until_answers("xllamacpp", process, f"http://127.0.0.1:{port}/health")
        yield Server("xllamacpp", "llama.cpp server (xllamacpp)", port, process.pid)


def fetch_example_server() -> Path:
    """The low-level example server of llama-cpp-python's source distribution, downloaded once."""
    script = FOLDER / f"example_server-{LLAMA_CPP_PYTHON}.py"
    if script.exists():
        return script
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sdist-", dir=FOLDER) as work:
        # An environment of its own, because ours is made by uv and has no pip; uv cannot download.
        venv.create(Path(work) / "venv", with_pip=True)
        pip = [str(Path(work) / "venv" / "bin" / "pip"), "download", "--quiet", "--no-deps"]
        pip += ["--no-binary", "llama-cpp-python", "--dest", work]
        subprocess.run([*pip, f"llama-cpp-python=={LLAMA_CPP_PYTHON}"], check=True)
        archive = next(Path(work).glob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"{archive.name[:-7]}/examples/server/server.py")
            if member is None:
                raise StartError(f"{archive.name} has no example server")
            script.write_bytes(member.read())
    return script


@contextlib.contextmanager
def example_server(model: Path, threads: int) -> Iterator[Server]:
    """Runs the low-level example server of llama-cpp-python with the same sizes and threads."""
    port = free_port()
    config = {
        "server": {"host": "127.0.0.1", "port": port},
        "model": {
            "path": str(model),
            "alias": MODEL_NAME,
            "n_ctx": CELLS,
            "n_seq_max": SEQUENCES,
            "n_batch": BATCH,
            "n_ubatch": BATCH,
            "threads": threads,
            "threads_batch": threads,
            "kv_unified": True,
        },
    }
    script = fetch_example_server()
    config_file = FOLDER / "example_server.json"
    config_file.write_text(json.dumps(config))
    with running("example", [sys.executable, str(script), "-C", str(config_file)]) as process:
        wait_until_answers("example", process, f"http://127.0.0.1:{port}/v1/models")
        yield Server("example", "example server (llama-cpp-python)", port, process.pid)


class RawLoop:
    """The plain loop in a process of its own, driven through its pipes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, prompts: Sequence[str], tokens: int) -> dict[str, Any]:
        """Runs one round; returns the fields of rawloop.RawRun. Raises StartError if the process died."""
        if self._process.stdin is None or self._process.stdout is None:
            raise StartError("the raw loop has no pipes")
        line = json.dumps({"prompts": list(prompts), "tokens": tokens})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise StartError("the raw loop died")
        result: dict[str, Any] = json.loads(answer)
        return result


@contextlib.contextmanager
def raw_loop(
    model: Path, threads: int, environment: Mapping[str, str] | None = None
) -> Iterator[RawLoop]:
    """Runs bench/rawloop.py on `model`; `environment` is how OpenMP's settings get in."""
    argv = [sys.executable, "-m", "bench.rawloop", "--model", str(model)]
    argv += ["--threads", str(threads), "--sequences", str(SEQUENCES), "--cells", str(CELLS)]
    process = subprocess.Popen(
        argv,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - there are no threads
    )
    try:
        yield RawLoop(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
