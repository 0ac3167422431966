"""Rules that the configuration of Envoy must keep, read from the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli.envoy import LOCAL_ORIGINS, EnvoySettings, render
from services.cli.prepare import installation
from services.runtime.channel import MESSAGE_BYTES_MAX

FOLDER = installation().envoy_folder
SETTINGS = EnvoySettings(FOLDER, 8080, 9901, 7001, Path("/tmp/it's here/access.log"))


@pytest.fixture(scope="module")
def config() -> Any:
    """The configuration, parsed."""
    return yaml.safe_load(render((FOLDER / "envoy.yaml").read_text(), SETTINGS))


def _manager(config: Any) -> Any:
    listener = config["static_resources"]["listeners"][0]
    return listener["filter_chains"][0]["filters"][0]["typed_config"]


def _filter(config: Any, name: str) -> Any:
    found = [
        f for f in _manager(config)["http_filters"] if f["name"] == f"envoy.filters.http.{name}"
    ]
    return found[0]["typed_config"]


def test_stalled_streams_fit_into_the_connection_window(config: Any) -> None:
    """All streams of a connection may stall without using up its window, on both sides of Envoy."""
    cluster = config["static_resources"]["clusters"][0]["typed_extension_protocol_options"]
    upstream = next(iter(cluster.values()))["explicit_http_config"]["http2_protocol_options"]
    for http2 in (upstream, _manager(config)["http2_protocol_options"]):
        streams = http2["max_concurrent_streams"] * http2["initial_stream_window_size"]
        assert streams <= http2["initial_connection_window_size"]


def test_sizes_grow_inwards(config: Any) -> None:
    """Envoy answers 413 before gRPC would answer RESOURCE_EXHAUSTED, which clients take for a rate limit."""
    public = _filter(config, "body_size_limit")["max_request_bytes"]
    inner = _filter(config, "grpc_json_transcoder")["max_request_body_size"]
    assert public < inner < MESSAGE_BYTES_MAX


def test_an_idle_envoy_sleeps(config: Any) -> None:
    """No thread wakes several times a second to say that it lives, and none to gather statistics that nobody asked for."""
    for watchdog in ("main_thread_watchdog", "worker_watchdog"):
        timeouts = config["watchdogs"][watchdog]
        assert min(float(text.rstrip("s")) for text in timeouts.values()) >= 5
    assert config["stats_flush_on_admin"]


def test_everything_listens_on_loopback(config: Any) -> None:
    """No address is beyond this machine (I9)."""
    text = render((FOLDER / "envoy.yaml").read_text(), SETTINGS)
    assert set(re.findall(r"address: ([\d.]+),", text)) == {"127.0.0.1"}


def test_the_errors_filter_sees_transcoded_replies(config: Any) -> None:
    """Response filters run from last to first, so Lua stands before the transcoder."""
    names = [f["name"].rpartition(".")[2] for f in _manager(config)["http_filters"]]
    assert names.index("lua") < names.index("grpc_json_transcoder") < names.index("router")


def test_paths_are_quoted(config: Any) -> None:
    """A quote in a path stays a part of the path; a line end is refused."""
    log = _manager(config)["access_log"][0]["typed_config"]
    assert log["path"] == "/tmp/it's here/access.log"
    broken = EnvoySettings(FOLDER, 1, 2, 3, Path("/tmp/a\nadmin:"))
    with pytest.raises(ValueError, match="access_log"):
        render("", broken)


def test_origins_are_those_of_this_machine() -> None:
    """The pattern matches local origins and nothing that only begins like one."""
    assert re.fullmatch(LOCAL_ORIGINS, "http://localhost:3000")
    assert not re.fullmatch(LOCAL_ORIGINS, "http://localhost:3000.evil.example")
