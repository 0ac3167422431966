"""What is wrong with the options of an engine in front of a provider: all of it, each with where it is (S1.22, S1.25). Pure.

Whoever deploys such an engine and the engine itself judge by the same rules, so that what is deployed also starts. No message
repeats what may be a secret that was put into the wrong field.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

from caravan.engine.v1 import remote_options_pb2 as pb
from google.protobuf.duration_pb2 import Duration

PROVIDERS: Final = ("openai", "anthropic", "gemini", "litellm", "openai_compatible")
"""The runtimes of providers."""
PROVIDERS_WITHOUT_URL: Final = ("litellm", "openai_compatible")
"""Those that run at a place of the user's own, so that no default can be right."""

WORKERS_MAX: Final = 1_024
QUEUE_MAX: Final = 100_000
TOKENS_MAX: Final = 1 << 24
RETRIES_MAX: Final = 10
MULTIPLIER_MAX: Final = 10.0
FAILURES_MAX: Final = 1_000
PROBES_MAX: Final = 64
PER_MINUTE_MAX: Final = 10**12
CONCURRENT_MAX: Final = 1_000_000
USD_PER_MILLION_MAX: Final = 1e6
WAIT_S_MAX: Final = 3_600.0
TOTAL_S_MAX: Final = 86_400.0
GATHER_S_MAX: Final = 1.0
PAUSE_S_MIN: Final = 0.001
"""A shorter wait between two tries is none, and would be a mistake of the unit."""
KEY_BYTES_MAX: Final = 128

_URL_BYTES_MAX: Final = 2_048
_PATH_BYTES_MAX: Final = 4_096
_SECRET_BYTES_MAX: Final = 16_384
_MAX_BACKOFF_S: Final = 60.0
"""The default of RetryPolicy.max_backoff, which an initial backoff must not exceed either."""
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
_PRINTABLE: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)

_Found = Iterator[tuple[str, str]]


def find_mistakes(
    options: pb.RemoteOptions, runtime: str, *, inline_allowed: bool
) -> list[tuple[str, str]]:
    """Every mistake as the path of a field, such as `retry.max_backoff`, and what is wrong with it.

    `runtime` is one of PROVIDERS; `inline_allowed` is whether the credential may stand in the options itself.
    """
    assert runtime in PROVIDERS, runtime
    return [
        *_of_url(options, runtime),
        *_of_credential(options, runtime, inline_allowed=inline_allowed),
        *_of_timeouts(options.timeouts),
        *_of_retry(options.retry),
        *_of_breaker(options.breaker),
        *_of_limits(options.limits),
        *_of_price(options.price),
        *_of_queue(options),
        *_duration(options, "", "gather", 0.0, GATHER_S_MAX),
    ]


def _of_url(options: pb.RemoteOptions, runtime: str) -> _Found:
    url = options.base_url
    if not url:
        if runtime in PROVIDERS_WITHOUT_URL:
            yield "base_url", f"is missing: {runtime} has no address of its own"
        if options.insecure:
            yield "insecure", "is for a base_url of plain http, and there is none"
        return
    # The address itself is not repeated: it might hold a password.
    if len(url) > _URL_BYTES_MAX or not _PRINTABLE.fullmatch(url):
        yield "base_url", f"has spaces or other characters of no URL, or more than {_URL_BYTES_MAX}"
        return
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        yield "base_url", "is not a URL such as https://api.example.com/v1"
        return
    if parts.scheme not in {"http", "https"} or not host or port == 0:
        yield "base_url", "is not a URL such as https://api.example.com/v1"
        return
    if "@" in parts.netloc:
        yield "base_url", "has a user or password: a secret belongs into `credential`"
    if "?" in url or "#" in url:
        yield "base_url", "has a query or fragment: paths are added to it"
    if parts.scheme == "https" and options.insecure:
        yield "insecure", "is for a base_url of plain http, and this one is https"
    if parts.scheme == "http" and not options.insecure and not _is_loopback(host):
        yield (
            "base_url",
            "is plain http to another machine, where all can read it: use https, or say insecure",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _of_credential(options: pb.RemoteOptions, runtime: str, *, inline_allowed: bool) -> _Found:
    if not options.HasField("credential"):
        if not options.base_url and runtime not in PROVIDERS_WITHOUT_URL:
            yield "credential", f"is missing: {runtime} asks for one"
        return
    credential = options.credential
    source = credential.WhichOneof("source")
    if source is None:
        yield "credential", "says not where the secret is: env or file"
    elif source == "env" and not _VARIABLE.fullmatch(credential.env):
        yield (
            "credential.env",
            "is not the name of an environment variable (not repeated here: it may be a secret)",
        )
    elif source == "file":
        yield from _of_file(credential.file)
    elif source == "inline" and not inline_allowed:
        yield (
            "credential.inline",
            "is refused, because this is kept and listed: name an environment variable or a file",
        )
    elif source == "inline" and (
        len(credential.inline) > _SECRET_BYTES_MAX or not _PRINTABLE.fullmatch(credential.inline)
    ):
        yield "credential.inline", "is empty, too long, or has characters of no secret"


def _of_file(path: str) -> _Found:
    if not path.startswith("/"):
        yield "credential.file", "is not an absolute path"
    elif len(path.encode()) > _PATH_BYTES_MAX or not path.isprintable():
        yield (
            "credential.file",
            f"is longer than {_PATH_BYTES_MAX} bytes or has characters of no path",
        )


def _of_timeouts(timeouts: pb.Timeouts) -> _Found:
    for name in ("connect", "first_byte", "between_bytes"):
        yield from _duration(timeouts, "timeouts", name, 0.0, WAIT_S_MAX)
    yield from _duration(timeouts, "timeouts", "total", 0.0, TOTAL_S_MAX)
    total_s = _seconds(timeouts.total)
    for name in ("connect", "first_byte", "between_bytes"):
        told_s = _seconds(getattr(timeouts, name))
        if 0 < total_s < told_s:
            yield f"timeouts.{name}", f"{told_s:g} s is never reached: total is {total_s:g} s"


def _of_retry(retry: pb.RetryPolicy) -> _Found:
    yield from _within("retry.max_retries", retry.max_retries, 0, RETRIES_MAX)
    yield from _duration(retry, "retry", "initial_backoff", PAUSE_S_MIN, WAIT_S_MAX)
    yield from _duration(retry, "retry", "max_backoff", PAUSE_S_MIN, WAIT_S_MAX)
    initial_s = _seconds(retry.initial_backoff)
    longest_s = _seconds(retry.max_backoff) if retry.HasField("max_backoff") else _MAX_BACKOFF_S
    if initial_s > longest_s:
        yield "retry.initial_backoff", f"{initial_s:g} s is above max_backoff, {longest_s:g} s"
    if retry.HasField("backoff_multiplier"):
        multiplier = retry.backoff_multiplier
        yield from _within("retry.backoff_multiplier", multiplier, 1.0, MULTIPLIER_MAX)
    yield from _known("retry.jitter", retry.jitter, pb.Jitter)
    yield from _within("retry.budget", retry.budget, 0.0, 1.0)


def _of_breaker(breaker: pb.BreakerPolicy) -> _Found:
    yield from _within("breaker.failure_threshold", breaker.failure_threshold, 0, FAILURES_MAX)
    yield from _duration(breaker, "breaker", "open_duration", PAUSE_S_MIN, WAIT_S_MAX)
    if breaker.HasField("half_open_max_probes"):
        probes = breaker.half_open_max_probes
        yield from _within("breaker.half_open_max_probes", probes, 1, PROBES_MAX)


def _of_limits(limits: pb.RateLimits) -> _Found:
    for name in ("requests_per_minute", "tokens_per_minute"):
        yield from _within(f"limits.{name}", getattr(limits, name), 0, PER_MINUTE_MAX)
    concurrent = limits.concurrent_requests
    yield from _within("limits.concurrent_requests", concurrent, 0, CONCURRENT_MAX)
    if len(limits.key.encode()) > KEY_BYTES_MAX or not limits.key.isprintable():
        yield "limits.key", f"is longer than {KEY_BYTES_MAX} bytes or has characters of no name"
    if not (limits.requests_per_minute or limits.tokens_per_minute or concurrent):
        for name in ("strict", "key"):
            if getattr(limits, name):
                yield f"limits.{name}", "says how to share a limit, and there is none"


def _of_price(price: pb.Price) -> _Found:
    for name in ("input_usd", "output_usd", "cached_input_usd"):
        yield from _within(f"price.{name}", getattr(price, name), 0.0, USD_PER_MILLION_MAX)


def _of_queue(options: pb.RemoteOptions) -> _Found:
    if options.HasField("workers"):
        yield from _within("workers", options.workers, 1, WORKERS_MAX)
    yield from _within("queue_capacity", options.queue_capacity, 0, QUEUE_MAX)
    yield from _within("default_max_tokens", options.default_max_tokens, 0, TOKENS_MAX)
    policy = options.on_capacity_exhausted
    yield from _known("on_capacity_exhausted", policy, pb.QueuePolicy)
    if not options.HasField("queue_capacity"):
        return
    waits = policy in {pb.QUEUE_POLICY_UNSPECIFIED, pb.QUEUE_POLICY_QUEUE}
    if waits and not options.queue_capacity:
        yield (
            "queue_capacity",
            "0 contradicts on_capacity_exhausted = queue: nobody could wait",
        )
    elif not waits and options.queue_capacity:
        yield "queue_capacity", "contradicts on_capacity_exhausted: nobody waits"


def _within(field: str, value: float, least: float, most: float) -> _Found:
    # NaN is within nothing.
    if not least <= value <= most:
        yield field, f"{value} is not within {least} to {most}"


def _known(field: str, value: int, kind: Any) -> _Found:
    if value not in kind.values():
        yield field, f"{value} is not one of the known ones"


def _duration(message: Any, part: str, name: str, least_s: float, most_s: float) -> _Found:
    if not message.HasField(name):
        return
    value_s = _seconds(getattr(message, name))
    if not least_s <= value_s <= most_s:
        path = f"{part}.{name}" if part else name
        yield path, f"{value_s:g} s is not within {least_s:g} to {most_s:g} s"


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
