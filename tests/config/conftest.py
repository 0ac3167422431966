"""A real Envoy with our configuration, in front of a stand-in gateway."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest

from services.cli.envoy import EnvoySettings, render
from services.cli.prepare import installation
from tests.support import stand_in_gateway
from tests.support.ports import free_port
from tests.support.waiting import wait_for


@dataclass
class Front:
    """Envoy and what stands behind it."""

    port: int
    admin: int
    gateway_port: int
    access_log: Path
    gateway: stand_in_gateway.StandIn
    server: grpc.Server
    http: httpx.Client

    def healthy(self) -> bool:
        """Whether Envoy lets requests through."""
        return self.http.get("/healthz").status_code == 200

    def hold(self) -> socket.socket:
        """A connection whose request the gateway does not answer."""
        body = b'{"do": "hang"}'
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        client = socket.create_connection(("127.0.0.1", self.port))
        client.sendall(head.encode() + body)
        return client


@contextlib.contextmanager
def serving(folder: Path, edit: Callable[[str], str] = str) -> Iterator[Front]:
    """Envoy before a stand-in gateway; `edit` changes the text of the configuration."""
    install = installation()
    port, admin, gateway_port = free_port(), free_port(), free_port()
    access_log = folder / "access.log"
    settings = EnvoySettings(install.envoy_folder, port, admin, gateway_port, access_log)
    config = folder / "envoy.yaml"
    config.write_text(edit(render((install.envoy_folder / "envoy.yaml").read_text(), settings)))
    server, gateway = stand_in_gateway.serve(gateway_port)
    argv = [install.envoy, "-c", str(config), "--disable-hot-restart", "--concurrency", "1"]
    argv += ["--log-level", "error", "--file-flush-interval-msec", "100"]
    with (
        subprocess.Popen(argv, stderr=subprocess.DEVNULL) as envoy,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http,
    ):
        front = Front(port, admin, gateway_port, access_log, gateway, server, http)
        try:
            wait_for(lambda: _up(front), "Envoy is healthy")
            yield front
        finally:
            envoy.kill()
            front.server.stop(0).wait()


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Envoy, started once per file."""
    with serving(tmp_path_factory.mktemp("envoy with a space and 'quotes'")) as front:
        yield front


def _up(front: Front) -> bool:
    try:
        return front.healthy()
    except httpx.TransportError:
        return False
