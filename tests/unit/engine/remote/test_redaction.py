"""No form of a secret passes."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Callable
from urllib.parse import quote, quote_plus, urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.redaction import KEPT_MAX, REDACTED, Redactor, redact_logs

SECRET = 'sk-canary/4f+9="Ab\\c%d??>>~~'
# What a header can carry and a secret may be.
SECRETS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=12, max_size=60)
AROUND = st.text(max_size=40)
FORMS: dict[str, Callable[[str], str]] = {
    "plain": lambda s: s,
    "bearer": lambda s: f"Authorization: Bearer {s}",
    "url": lambda s: f"https://host/path?token={quote(s, safe='')}&x=1",
    "url, lower case": lambda s: quote(s, safe="").replace("%2F", "%2f").replace("%2B", "%2b"),
    "form": lambda s: urlencode({"token": s}),
    "plus": quote_plus,
    "json": lambda s: json.dumps({"message": f"Incorrect key: {s}."}),
    "json, escaped slashes": lambda s: json.dumps(s).replace("/", "\\/"),
    "base64": lambda s: base64.b64encode(s.encode()).decode(),
    "url-safe base64": lambda s: base64.urlsafe_b64encode(s.encode()).decode().rstrip("="),
    "basic": lambda s: base64.b64encode(f"user:{s}".encode()).decode(),
    "basic, other user": lambda s: base64.b64encode(f"me:{s}".encode()).decode(),
    "json in json": lambda s: json.dumps(json.dumps({"message": s})),
    "repr": lambda s: repr([(b"authorization", f"Bearer {s}".encode())]),
}


def leaks(secret: str, text: str) -> bool:
    """Whether the secret can be got back from a text."""
    plain = secret in text or secret in text.replace("\\\\", "\\").replace("\\/", "/").replace(
        '\\"', '"'
    )
    return plain or secret.encode() in decoded(text)


def decoded(text: str) -> bytes:
    kept = "".join(c for c in text if c.isalnum() or c in "+/-_")
    kept = kept.replace("-", "+").replace("_", "/")
    return base64.b64decode(kept[: len(kept) // 4 * 4])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_secret_is_removed(form: str) -> None:
    """In the middle of a text, and the text around it stays."""
    text = f"before {FORMS[form](SECRET)} after"
    cleaned = Redactor(SECRET).clean(text)
    assert not leaks(SECRET, cleaned)
    assert SECRET[:12] not in cleaned
    assert "canary" not in cleaned
    assert REDACTED in cleaned
    assert cleaned.startswith("before ")
    assert cleaned.endswith(" after")


@settings(max_examples=400, deadline=None)
@given(secret=SECRETS, before=AROUND, after=AROUND, form=st.sampled_from(sorted(FORMS)))
def test_any_secret_in_any_form_is_removed(secret: str, before: str, after: str, form: str) -> None:
    """Whatever characters it has, and whatever stands around it."""
    encoded = FORMS[form](secret)
    cleaned = Redactor(secret).clean(before + encoded + after)
    assert encoded not in cleaned
    assert secret not in cleaned


def test_former_secrets_are_removed_too() -> None:
    """Also where one is a part of another; the number that is remembered is bounded (I4)."""
    redactor = Redactor("sk-canary-1")
    redactor.add("sk-canary-1-longer")
    assert redactor.clean("sk-canary-1-longer, sk-canary-1") == f"{REDACTED}, {REDACTED}"
    for number in range(KEPT_MAX + 10):
        redactor.add(f"sk-rotated-{number:03}")
    newest = " ".join(f"sk-rotated-{number:03}" for number in range(10, KEPT_MAX + 10))
    assert "rotated" not in redactor.clean(newest)
    assert len(redactor._forms) == KEPT_MAX


@pytest.mark.parametrize(
    "text",
    [
        "got Authorization: Bearer zz-unknown-9999 in the request",
        "authorization=Basic dXNlcjp6ei11bmtub3duLTk5OTk=",
        '{"x-api-key": "zz-unknown-9999"}',
        "(b'x-goog-api-key', b'zz-unknown-9999')",
        "POST https://host/v1?alt=sse&key=zz-unknown-9999#part",
    ],
)
def test_what_looks_like_a_credential_is_removed(text: str) -> None:
    """Whoever's it is: a provider may echo a key that we never had."""
    cleaned = Redactor().clean(text)
    assert "zz-unknown" not in cleaned
    assert "dXNlcjp6ei" not in cleaned


def test_other_texts_stay() -> None:
    """A secret too short to be one, and words that only begin like a credential."""
    text = "The bearer of a basic key: a request with key=value pairs was refused, see https://x/?page=2."
    assert Redactor("a", "").clean(text) == text


def test_errors_are_cleaned_and_stay_the_same_failure() -> None:
    """Message and metadata; the retry time stays."""
    error = ProviderError(
        Failure.RATE_LIMITED, f"no quota for {SECRET}", retry_after_s=3.0, limit=f"key {SECRET}"
    )
    cleaned = Redactor(SECRET).clean_error(error).to_error("openai", "gpt-9")
    assert SECRET not in repr((cleaned.message, cleaned.metadata))
    assert (cleaned.reason, cleaned.retry_after_s) == ("RATE_LIMITED", 3.0)


def test_logs_are_cleaned_with_their_exceptions() -> None:
    """HTTP libraries log headers when asked to log everything, and quote them in exceptions."""
    written = io.StringIO()
    logger = logging.Logger("libraries", logging.DEBUG)  # noqa: LOG001 - this test's alone
    logger.addHandler(logging.StreamHandler(written))
    redactor = Redactor(SECRET)
    redact_logs(redactor, logger)
    logger.debug("Adding %r to the header table", (b"authorization", f"Bearer {SECRET}".encode()))
    try:
        raise ValueError(f"illegal header {SECRET}")
    except ValueError:
        logger.exception("it failed")
    assert "it failed" in written.getvalue()
    assert "ValueError" in written.getvalue()
    assert not leaks(SECRET, written.getvalue())
    assert "canary" not in repr(redactor)
