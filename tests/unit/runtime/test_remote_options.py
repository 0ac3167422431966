"""Every rule of the options of an engine in front of a provider, and that no message repeats a secret."""

from __future__ import annotations

from typing import Any

import pytest
from caravan.engine.v1 import remote_options_pb2 as pb
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.remote_options import PROVIDERS, find_mistakes

KEY = {"credential": {"env": "KEY"}}
CANARY = "sk-canary-0123456789"

RIGHT: list[dict[str, Any]] = [
    KEY,
    {"base_url": "https://api.example.com/v1"},
    {"base_url": "https://api.example.com:8443/v1/", **KEY},
    {"base_url": "http://127.0.0.1:8080/v1"},
    {"base_url": "http://[::1]:8080"},
    {"base_url": "http://localhost:8080"},
    {"base_url": "http://10.0.0.7:8000/v1", "insecure": True},
    {"credential": {"file": "/run/secrets/key"}},
    {**KEY, "timeouts": {"connect": "0s", "first_byte": "0s", "between_bytes": "0s"}},
    {**KEY, "timeouts": {"first_byte": "10s", "total": "10s"}},
    {**KEY, "retry": {"max_retries": 0, "budget": 0.0}},
    {**KEY, "retry": {"max_backoff": "0.500s"}},
    {**KEY, "retry": {"initial_backoff": "100s", "max_backoff": "100s"}},
    {**KEY, "breaker": {"failure_threshold": 0}},
    {**KEY, "limits": {"requests_per_minute": "1", "strict": True, "key": "team"}},
    {**KEY, "price": {"input_usd": 0.15, "output_usd": 0.6, "cached_input_usd": 0.0}},
    {**KEY, "workers": 1024, "queue_capacity": 100_000, "default_max_tokens": 1},
    {**KEY, "queue_capacity": 0, "on_capacity_exhausted": "QUEUE_POLICY_REJECT"},
]

URL = "base_url"
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({}, "credential", "openai asks for one"),
    ({"base_url": "api.example.com/v1"}, URL, "is not a URL"),
    ({"base_url": "https://"}, URL, "is not a URL"),
    ({"base_url": "https://a:99999"}, URL, "is not a URL"),
    ({"base_url": "ftp://a/v1"}, URL, "is not a URL"),
    ({"base_url": "https://[::1"}, URL, "is not a URL"),
    ({"base_url": "https://a b/v1"}, URL, "characters of no URL"),
    ({"base_url": "https://a/" + "v" * 2_048}, URL, "or more than 2048"),
    ({"base_url": f"https://me:{CANARY}@a/v1"}, URL, "has a user or password"),
    ({"base_url": f"https://a/v1?key={CANARY}"}, URL, "has a query"),
    ({"base_url": "https://a/v1#top"}, URL, "has a query or fragment"),
    ({"base_url": "http://10.0.0.7/v1"}, URL, "is plain http to another machine"),
    ({"base_url": "http://127.0.0.1.example.com"}, URL, "is plain http to another machine"),
    ({"base_url": "https://a", "insecure": True}, "insecure", "this one is https"),
    ({**KEY, "insecure": True}, "insecure", "there is none"),
    ({"credential": {}}, "credential", "says not where"),
    ({"credential": {"env": CANARY}}, "credential.env", "is not the name"),
    ({"credential": {"env": ""}}, "credential.env", "is not the name"),
    ({"credential": {"file": "key.txt"}}, "credential.file", "is not an absolute path"),
    ({"credential": {"file": "/a\nb"}}, "credential.file", "characters of no path"),
    ({"credential": {"inline": CANARY}}, "credential.inline", "name an environment variable"),
    ({**KEY, "timeouts": {"connect": "-1s"}}, "timeouts.connect", "-1 s is not within 0 to 3600 s"),
    ({**KEY, "timeouts": {"first_byte": "3601s"}}, "timeouts.first_byte", "3601 s is not"),
    ({**KEY, "timeouts": {"between_bytes": "-0.001s"}}, "timeouts.between_bytes", "-0.001 s"),
    ({**KEY, "timeouts": {"total": "86401s"}}, "timeouts.total", "not within 0 to 86400 s"),
    (
        {**KEY, "timeouts": {"first_byte": "60s", "total": "30s"}},
        "timeouts.first_byte",
        "60 s is never reached: total is 30 s",
    ),
    ({**KEY, "retry": {"max_retries": 11}}, "retry.max_retries", "11 is not within 0 to 10"),
    ({**KEY, "retry": {"initial_backoff": "0s"}}, "retry.initial_backoff", "0 s is not within"),
    ({**KEY, "retry": {"initial_backoff": "61s"}}, "retry.initial_backoff", "above max_backoff"),
    (
        {**KEY, "retry": {"initial_backoff": "2s", "max_backoff": "1s"}},
        "retry.initial_backoff",
        "2 s is above max_backoff, 1 s",
    ),
    ({**KEY, "retry": {"backoff_multiplier": 0.5}}, "retry.backoff_multiplier", "0.5 is not"),
    ({**KEY, "retry": {"backoff_multiplier": "NaN"}}, "retry.backoff_multiplier", "nan is not"),
    ({**KEY, "retry": {"jitter": 9}}, "retry.jitter", "9 is not one"),
    ({**KEY, "retry": {"budget": 1.5}}, "retry.budget", "1.5 is not within 0.0 to 1.0"),
    ({**KEY, "breaker": {"failure_threshold": 1001}}, "breaker.failure_threshold", "1001 is not"),
    ({**KEY, "breaker": {"open_duration": "0s"}}, "breaker.open_duration", "0 s is not within"),
    ({**KEY, "breaker": {"half_open_max_probes": 0}}, "breaker.half_open_max_probes", "0 is not"),
    (
        {**KEY, "limits": {"tokens_per_minute": 10**12 + 1}},
        "limits.tokens_per_minute",
        "1000000000001 is not within 0 to 1000000000000",
    ),
    (
        {**KEY, "limits": {"concurrent_requests": 1_000_001}},
        "limits.concurrent_requests",
        "1000001 is not",
    ),
    ({**KEY, "limits": {"strict": True}}, "limits.strict", "there is none"),
    ({**KEY, "limits": {"key": "team"}}, "limits.key", "there is none"),
    (
        {**KEY, "limits": {"requests_per_minute": 1, "key": "k" * 129}},
        "limits.key",
        "is longer than 128 bytes",
    ),
    ({**KEY, "price": {"input_usd": -1}}, "price.input_usd", "-1.0 is not within 0.0"),
    ({**KEY, "price": {"output_usd": "Infinity"}}, "price.output_usd", "inf is not within"),
    ({**KEY, "price": {"cached_input_usd": "NaN"}}, "price.cached_input_usd", "nan is not within"),
    ({**KEY, "workers": 0}, "workers", "0 is not within 1 to 1024"),
    ({**KEY, "workers": 1025}, "workers", "1025 is not within"),
    ({**KEY, "queue_capacity": 100_001}, "queue_capacity", "100001 is not within"),
    ({**KEY, "queue_capacity": 0}, "queue_capacity", "0 contradicts on_capacity_exhausted = queue"),
    (
        {**KEY, "queue_capacity": 1, "on_capacity_exhausted": "QUEUE_POLICY_FALLBACK"},
        "queue_capacity",
        "nobody waits",
    ),
    ({**KEY, "default_max_tokens": (1 << 24) + 1}, "default_max_tokens", "is not within"),
    ({**KEY, "gather": "1.001s"}, "gather", "is not within 0 to 1 s"),
    ({**KEY, "on_capacity_exhausted": 9}, "on_capacity_exhausted", "9 is not one"),
]


def _read(told: dict[str, Any]) -> pb.RemoteOptions:
    return json_format.ParseDict(told, pb.RemoteOptions())


@pytest.mark.parametrize("told", RIGHT, ids=str)
def test_right_options(told: dict[str, Any]) -> None:
    """The edges of every range, and what looks odd but is meant."""
    assert find_mistakes(_read(told), "openai", inline_allowed=False) == []


@pytest.mark.parametrize(("told", "field", "message"), WRONG, ids=str)
def test_wrong_options(told: dict[str, Any], field: str, message: str) -> None:
    """One mistake, told where it is, without what might be a secret."""
    ((found, text),) = find_mistakes(_read(told), "openai", inline_allowed=False)
    assert found == field
    assert message in text
    assert CANARY not in text


def test_every_field_has_a_rule() -> None:
    """A field that is added to the contract needs a rule or a reason here why every value of it is right."""
    free = {"retry.respect_retry_after"}
    judged = {field for _, field, _ in WRONG} | free
    fields = set()
    for field in pb.RemoteOptions.DESCRIPTOR.fields:
        part = field.message_type
        if part is None or part.full_name.startswith("google."):
            fields.add(field.name)
        else:
            fields |= {f"{field.name}.{inner.name}" for inner in part.fields}
    assert fields - judged == {
        "retry.max_backoff",
        "limits.requests_per_minute",
    }, "judged together with retry.initial_backoff and limits.tokens_per_minute"


def test_all_mistakes_are_told_at_once() -> None:
    """A user mends a file once."""
    told = _read({"base_url": "ftp://a", "workers": 0, "retry": {"budget": 2, "max_retries": 99}})
    fields = [field for field, _ in find_mistakes(told, "gemini", inline_allowed=False)]
    assert sorted(fields) == ["base_url", "retry.budget", "retry.max_retries", "workers"]


@pytest.mark.parametrize("runtime", PROVIDERS)
def test_what_a_runtime_needs(runtime: str) -> None:
    """A server of one's own has no default address; a managed API has one, and asks for a credential."""
    own = runtime in {"litellm", "openai_compatible"}
    found = find_mistakes(pb.RemoteOptions(), runtime, inline_allowed=False)
    assert [field for field, _ in found] == (["base_url"] if own else ["credential"])
    local = _read({"base_url": "http://127.0.0.1:4000"})
    assert find_mistakes(local, runtime, inline_allowed=False) == []


def test_an_inline_credential_where_it_is_allowed() -> None:
    """The engine's own environment may hold it, if it can be sent in a header."""
    told = _read({"credential": {"inline": CANARY}})
    assert find_mistakes(told, "openai", inline_allowed=True) == []
    for secret in ("", f"{CANARY}\r\nx: y", CANARY * 1_000):
        told.credential.inline = secret
        ((field, text),) = find_mistakes(told, "openai", inline_allowed=True)
        assert field == "credential.inline"
        assert CANARY not in text


TEXTS = st.text(max_size=12) | st.sampled_from(
    ["https://", "http://[", "http://a:b", "http://%", "//", "?", "@", "/v1", "\x00", "\n"]
)
DURATIONS = st.builds(
    Duration,
    seconds=st.integers(-(2**63), 2**63 - 1),
    nanos=st.integers(-(2**31), 2**31 - 1),
)


@given(
    before=TEXTS,
    after=TEXTS,
    place=st.sampled_from(["env", "file", "inline"]),
    seconds=DURATIONS,
    number=st.floats(),
    runtime=st.sampled_from(PROVIDERS),
    inline_allowed=st.booleans(),
)
def test_whatever_is_told(
    before: str,
    after: str,
    place: str,
    seconds: Duration,
    number: float,
    runtime: str,
    inline_allowed: bool,
) -> None:
    """Nothing crashes the judge, and no text that stands anywhere is repeated."""
    text = before + CANARY + after
    told = pb.RemoteOptions(
        base_url=text,
        credential=pb.Credential(**{place: text}),
        limits=pb.RateLimits(key=text),
        timeouts=pb.Timeouts(connect=seconds, total=seconds),
        retry=pb.RetryPolicy(initial_backoff=seconds, backoff_multiplier=number, budget=number),
        price=pb.Price(input_usd=number),
    )
    for field, message in find_mistakes(told, runtime, inline_allowed=inline_allowed):
        assert field
        assert CANARY not in message
