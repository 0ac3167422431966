"""Options of a remote engine: the defaults that the contract names, and what each of them becomes."""

from __future__ import annotations

import pytest
from caravan.engine.v1 import remote_options_pb2 as pb
from google.protobuf import json_format

from services.engine.remote.credential_sources import EnvSource
from services.engine.remote.options import EngineOptions, OptionsError, read_options
from services.engine.remote.retry import Jitter

CREDENTIAL = {"env": "KEY"}


def read(provider: str = "openai", model: str = "gpt-4o", **told: object) -> EngineOptions:
    """The options that this JSON means."""
    message = json_format.ParseDict({"credential": CREDENTIAL, **told}, pb.RemoteOptions())
    return read_options(message, provider, model)


def test_defaults() -> None:
    """As remote_options.proto says."""
    options = read()
    assert options.base_url == "https://api.openai.com/v1"
    assert options.source == EnvSource("KEY")
    assert (options.workers, options.queue_capacity, options.default_max_tokens) == (8, 1024, 4096)
    timeouts = options.timeouts
    assert (timeouts.connect_s, timeouts.first_byte_s, timeouts.between_bytes_s) == (5, 60, 30)
    assert options.total_s is None
    assert options.gather_s == 0.03
    retry = options.retry
    assert (retry.max_retries, retry.initial_backoff_s, retry.max_backoff_s) == (3, 1, 60)
    assert (retry.multiplier, retry.jitter, retry.respect_retry_after) == (2, Jitter.EQUAL, True)
    assert options.retry_budget == 0.2
    breaker = options.breaker
    assert (breaker.failure_threshold, breaker.open_s, breaker.half_open_max_probes) == (10, 30, 1)
    assert options.patience
    assert not options.falls_back
    assert options.limit_key == "openai|env KEY|gpt-4o"


def test_what_is_told_counts() -> None:
    """Also where it is 0: no limit of time, no retries, a breaker that never opens, a budget of nothing."""
    options = read(
        baseUrl="http://127.0.0.1:1/v1",
        timeouts={"connect": "0s", "firstByte": "2.5s", "betweenBytes": "0s", "total": "9s"},
        retry={
            "maxRetries": 0,
            "initialBackoff": "0.5s",
            "maxBackoff": "4s",
            "budget": 0,
            "backoffMultiplier": 3,
            "jitter": "JITTER_FULL",
            "respectRetryAfter": False,
        },
        breaker={"failureThreshold": 0, "openDuration": "7s", "halfOpenMaxProbes": 2},
        limits={"key": "ours", "requestsPerMinute": 5},
        workers=3,
        queueCapacity=7,
        defaultMaxTokens=100,
        gather="0s",
    )
    timeouts = options.timeouts
    assert (timeouts.connect_s, timeouts.first_byte_s, timeouts.between_bytes_s) == (
        None,
        2.5,
        None,
    )
    assert options.total_s == 9
    assert options.gather_s == 0
    retry = options.retry
    assert (retry.max_retries, retry.initial_backoff_s, retry.max_backoff_s) == (0, 0.5, 4)
    assert (retry.multiplier, retry.jitter, retry.respect_retry_after) == (3, Jitter.FULL, False)
    assert options.retry_budget == 0
    breaker = options.breaker
    assert (breaker.failure_threshold, breaker.open_s, breaker.half_open_max_probes) == (0, 7, 2)
    assert (options.workers, options.queue_capacity, options.default_max_tokens) == (3, 7, 100)
    assert options.limit_key == "ours"


@pytest.mark.parametrize(
    ("policy", "patience", "falls_back"),
    [
        ("QUEUE_POLICY_UNSPECIFIED", True, False),
        ("QUEUE_POLICY_QUEUE", True, False),
        ("QUEUE_POLICY_REJECT", False, False),
        ("QUEUE_POLICY_FALLBACK", False, True),
    ],
)
def test_policies(policy: str, patience: bool, falls_back: bool) -> None:
    """Who waits, and who is sent elsewhere."""
    options = read(onCapacityExhausted=policy)
    assert (options.patience, options.falls_back) == (patience, falls_back)


def test_names_of_models() -> None:
    """What routers put in front of a name goes; another credential or model is another limit."""
    assert read("anthropic", "anthropic/claude-x").model == "claude-x"
    keys = {
        read(model="a").limit_key,
        read(model="b").limit_key,
        read(model="a", credential={"file": "/run/key"}).limit_key,
        read("gemini", "a").limit_key,
    }
    assert len(keys) == 4
    assert len(read(model="m" * 400).limit_key.encode()) <= 256


def test_an_inline_secret_is_in_no_key_and_no_text() -> None:
    """The limit's name goes to the coordinator, and the options may be printed."""
    options = read(credential={"inline": "sk-canary"})
    assert "sk-canary" not in options.limit_key
    assert "sk-canary" not in repr(options)


def test_mistakes_are_all_told() -> None:
    """Each on its line, with its field and without its value."""
    with pytest.raises(OptionsError) as raised:
        read(baseUrl="ftp://sk-canary", workers=5000, retry={"maxRetries": 11})
    lines = str(raised.value).split("\n")
    assert [line.partition(":")[0] for line in lines] == [
        "base_url",
        "retry.max_retries",
        "workers",
    ]
    assert "sk-canary" not in str(raised.value)
