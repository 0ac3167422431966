"""The scripted provider in a process of its own, and a stack that serves it: the other side of benches of remote engines."""

from __future__ import annotations

import contextlib
import json
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import contestants
from bench.children import free_port, running, wait_until_answers

MODEL = contestants.MODEL_NAME
WORKERS = 64
_DEPLOYMENT = """\
[[deployment]]
name = "{model}"
model = "{model}"
runtime = "openai_compatible"
[deployment.remote]
base_url = "{base_url}"
workers = {workers}
"""


@dataclass(frozen=True, slots=True)
class Provider:
    """A scripted provider that runs."""

    port: int
    pid: int

    @property
    def base_url(self) -> str:
        """The root of its API."""
        return f"http://127.0.0.1:{self.port}/v1"

    def script(self, **fields: object) -> None:
        """Changes how it answers: fields of services.dev.provider.script.Script."""
        url = f"http://127.0.0.1:{self.port}/_control/script"
        body = json.dumps(fields).encode()
        urllib.request.urlopen(urllib.request.Request(url, body), timeout=10).close()


@contextlib.contextmanager
def provider() -> Iterator[Provider]:
    """Runs a provider that answers as fast as it can, until the block ends."""
    port = free_port()
    argv = [sys.executable, "-m", "services.cli", "dev", "provider"]
    with running("provider", [*argv, "--port", str(port), "--pace", "0s"]) as process:
        wait_until_answers("provider", process, f"http://127.0.0.1:{port}/v1/models")
        yield Provider(port, process.pid)


@contextlib.contextmanager
def stack_before(served: Provider) -> Iterator[contestants.Stack]:
    """Runs `caravan up` with one engine in front of a provider, WORKERS calls at a time, until the block ends."""
    with contestants.state_folder() as folder:
        file = Path(folder) / "deployments.toml"
        file.write_text(_DEPLOYMENT.format(model=MODEL, base_url=served.base_url, workers=WORKERS))
        options = ["--deployments", str(file), "--no-cache"]
        with contestants.caravan([], options=options, serves=[MODEL]) as stack:
            yield stack
