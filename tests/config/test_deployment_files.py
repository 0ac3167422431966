"""Files of deployments: what is right is read, and every mistake of a file is told at once."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from caravan.coordinator.v1 import deployment_pb2 as pb
from caravan.engine.v1 import remote_options_pb2 as remote_pb
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration

from services.coordinator.deployment import (
    Budget,
    CapacityPolicy,
    Deployment,
    EngineOptions,
    Fallback,
    FallbackReason,
    OnExceeded,
    Runtime,
    Serving,
)
from services.coordinator.deployment_store import load_kept
from services.coordinator.tasks import Priority
from services.engine.remote.options import read_options
from services.runtime.settings import SettingsError

FOLDER = Path(__file__).parent / "deployments"
WRONG = sorted(p.name for p in FOLDER.glob("*.toml") if not p.name.startswith("valid"))
EXPECT = "# expect: "


@pytest.mark.parametrize("name", WRONG)
def test_every_mistake_is_told(name: str) -> None:
    """The comments of the file say which mistakes it has: these are told, and no others."""
    path = FOLDER / name
    expected = [
        line.removeprefix(EXPECT) for line in path.read_text().splitlines() if EXPECT in line
    ]
    assert expected
    with pytest.raises(SettingsError) as raised:
        load_kept("", str(path), wall=0)
    told = [line.strip() for line in str(raised.value).splitlines()[1:]]
    unexpected = [line for line in told if not line.startswith(tuple(expected))]
    missed = [line for line in expected if not any(other.startswith(line) for other in told)]
    assert (unexpected, missed) == ([], [])
    assert len(told) == len(expected)


def test_a_file_without_mistakes() -> None:
    """Each field arrives; a relative model is taken from the folder of the file; defaults are filled in."""
    loaded = load_kept("", str(FOLDER / "valid.toml"), wall=5.0)
    assert loaded == [
        (
            Deployment(
                "chat",
                str(FOLDER / "models" / "chat.gguf"),
                Runtime.LLAMA_CPP,
                replicas=2,
                engine=EngineOptions(4096, 16, 2),
                serving=Serving(8, 32, 1.5, CapacityPolicy.FALLBACK),
                priority=Priority.HIGH,
                fallback=(
                    Fallback(
                        "small", frozenset({FallbackReason.CAPACITY, FallbackReason.UNAVAILABLE})
                    ),
                ),
                idempotent=False,
            ),
            5.0,
        ),
        (Deployment("small", "scripted:?tokens=3", Runtime.SCRIPTED), 5.0),
    ]


def test_a_file_of_providers() -> None:
    """Nested tables, numbers with a point and durations arrive; a credential's file is taken from the folder of the file."""
    (chat, _), (own, _) = load_kept("", str(FOLDER / "valid_remote.toml"), wall=0)
    assert (chat.runtime, own.runtime) == (Runtime.OPENAI, Runtime.OPENAI_COMPATIBLE)
    assert own.model == "qwen.gguf", "the server's name for it, and no path"
    assert chat.budget == Budget(2.5, 20, 1, 5.5, OnExceeded.THROTTLE)
    assert chat.fallback[0].reasons == {
        FallbackReason.RATE_LIMITED,
        FallbackReason.CIRCUIT_OPEN,
        FallbackReason.BUDGET,
    }
    assert chat.remote is not None
    told = json_format.MessageToDict(chat.remote.to_message(), preserving_proto_field_name=True)
    assert told == {
        "base_url": "https://api.example.com/v1",
        "credential": {"file": str(FOLDER / "secrets" / "key")},
        "timeouts": {
            "connect": "2s",
            "first_byte": "60s",
            "between_bytes": "0.500s",
            "total": "0s",
        },
        "retry": {
            "max_retries": 2,
            "initial_backoff": "0.250s",
            "max_backoff": "10s",
            "backoff_multiplier": 1.5,
            "jitter": "JITTER_FULL",
            "respect_retry_after": False,
            "budget": 0.0,
        },
        "breaker": {"failure_threshold": 5, "open_duration": "10s", "half_open_max_probes": 2},
        "limits": {
            "requests_per_minute": "500",
            "tokens_per_minute": "10000000000",
            "concurrent_requests": 8,
            "strict": True,
            "key": "team",
        },
        "price": {"input_usd": 0.15, "output_usd": 0.6, "cached_input_usd": 0.075},
        "workers": 16,
        "queue_capacity": 64,
        "default_max_tokens": 1024,
        "on_capacity_exhausted": "QUEUE_POLICY_QUEUE",
    }


def test_a_secret_in_the_wrong_place_is_not_repeated() -> None:
    """Not in what the mistakes say, which goes to logs and terminals."""
    path = FOLDER / "remote_inline_secret.toml"
    assert "canary" in path.read_text()
    with pytest.raises(SettingsError) as raised:
        load_kept("", str(path), wall=0)
    assert "canary" not in str(raised.value)


def test_a_file_that_is_not_there() -> None:
    """A missing file is a mistake of the settings; no file is none."""
    with pytest.raises(SettingsError, match="No such file"):
        load_kept("", str(FOLDER / "none.toml"), wall=0)
    assert load_kept("", "", wall=0) == []


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    """docs/OPERATING.md shows a file without mistakes, with every field but the inferred runtime and what is for providers."""
    text = (Path(__file__).parents[2] / "docs" / "OPERATING.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    (tmp_path / "d.toml").write_text(example)
    (chat, _), (small, _) = load_kept("", str(tmp_path / "d.toml"), wall=0)
    assert (chat.serving.max_wait_s, chat.replicas, small.replicas) == (20.0, 2, 1)
    fields = [*pb.Deployment.DESCRIPTOR.fields_by_name, *pb.Serving.DESCRIPTOR.fields_by_name]
    fields += [*pb.EngineOptions.DESCRIPTOR.fields_by_name, *pb.Fallback.DESCRIPTOR.fields_by_name]
    shown = re.findall(r"^(?:\[+deployment\.)?(\w+)\b", example, re.MULTILINE)
    assert set(fields) - set(shown) == {"runtime", "remote", "budget"}


def test_the_example_of_remote_engines(tmp_path: Path) -> None:
    """It has no mistake and shows every field of the options and of the budget, but the two that are explained beside it."""
    text = (Path(__file__).parents[2] / "docs" / "OPERATING.md").read_text()
    section = text.split("\n## Remote engines\n")[1]
    example = section.split("```toml\n")[1].split("```")[0]
    (tmp_path / "d.toml").write_text(example)
    (chat, _), (local, _) = load_kept("", str(tmp_path / "d.toml"), wall=0)
    assert (chat.runtime, local.runtime) == (Runtime.OPENAI, Runtime.LLAMA_CPP)
    shown = set(re.findall(r"\w+", example))
    fields = {
        field.name
        for message in (remote_pb.RemoteOptions, pb.Budget)
        for part in message.DESCRIPTOR.fields
        for field in (part, *_parts(part))
    }
    assert fields - shown == {"insecure", "inline"}
    assert chat.remote is not None
    told = read_options(chat.remote.to_message(), "openai", chat.model)
    credential = remote_pb.Credential(env="OPENAI_API_KEY")
    bare = read_options(remote_pb.RemoteOptions(credential=credential), "openai", chat.model)
    own = {name: getattr(bare, name) for name in ("told", "limits", "limit_key", "policy")}
    assert replace(told, **own) == bare, "the rest are the defaults, as the text below says"


def _parts(field: FieldDescriptor) -> list[FieldDescriptor]:
    part = field.message_type
    return [] if part is None or part is Duration.DESCRIPTOR else list(part.fields)
