"""Answers that nobody reads before their end: which of them are asked for in one piece, and how."""

from __future__ import annotations

import json

import pytest
from caravan.core.v1 import generation_pb2

from services.engine.news import WHOLE_GATHER_S
from services.engine.remote.provider import Provider
from services.engine.remote.whole import asks_plain, gather_s
from tests.support.wires import chat, wire_of


@pytest.mark.parametrize(
    ("whole", "max_tokens", "first_byte_s", "plain"),
    [
        (True, 512, None, True),
        (True, 512, 60.0, True),
        (True, 513, None, False),
        (True, 0, None, False),
        (False, 10, None, False),
        # The whole answer must come within the time for its first byte.
        (True, 20, 2.0, True),
        (True, 21, 2.0, False),
    ],
)
def test_which_are_asked_for_in_one_piece(
    *, whole: bool, max_tokens: int, first_byte_s: float | None, plain: bool
) -> None:
    """Those that are known to be short."""
    stop = generation_pb2.StopConditions()
    if max_tokens:
        stop.max_tokens = max_tokens
    assert asks_plain(chat(whole=whole, stop=stop), first_byte_s) is plain


def test_the_others_are_told_in_few_pieces() -> None:
    """Unless the deployment wants even fewer."""
    assert gather_s(chat(whole=True), 0.0) == WHOLE_GATHER_S
    assert gather_s(chat(whole=True), 1.0) == 1.0
    assert gather_s(chat(), 0.0) == 0.0


@pytest.mark.parametrize("kind", list(Provider), ids=lambda kind: kind.value)
def test_how_providers_are_asked(kind: Provider) -> None:
    """The same question but for the form of its answer."""
    wire = wire_of(kind)
    streamed = wire.request(chat(), "m")
    plain = wire.request(chat(), "m", plain=True)
    assert plain.headers["accept"] == "application/json"
    assert "accept" not in streamed.headers
    asked, asked_plain = json.loads(streamed.body), json.loads(plain.body)
    if kind is Provider.GEMINI:
        assert plain.path == "models/m:generateContent"
        assert asked == asked_plain
        return
    assert plain.path == streamed.path
    assert asked.pop("stream") is True
    assert asked_plain.pop("stream") is False
    asked.pop("stream_options", None)
    assert asked == asked_plain
