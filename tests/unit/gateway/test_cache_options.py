"""The options of the KV cache in OpenAI bodies: what is taken, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from caravan.core.v1 import generation_pb2
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.openai_request import parse_chat, parse_completion
from services.gateway.requests import InferenceRequest
from services.runtime.errors import CaravanError

Make = Callable[..., InferenceRequest]
KEY = "00ff" * 16


def _chat(**fields: Any) -> InferenceRequest:
    messages = [{"role": "user", "content": "x"}]
    return parse_chat(json.dumps({"model": "demo", "messages": messages, **fields}).encode())


def _completion(**fields: Any) -> InferenceRequest:
    return parse_completion(json.dumps({"model": "demo", "prompt": "x", **fields}).encode())


both = pytest.mark.parametrize("make", [_chat, _completion])


@both
@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"caravan": {"parent_key": KEY}}, {"parent_key": bytes.fromhex(KEY)}),
        ({"caravan": {"parent_key": KEY.upper()}}, {"parent_key": bytes.fromhex(KEY)}),
        ({"caravan": {"session_id": "a"}}, {"session_id": "a"}),
        ({"caravan": {"cache_salt": "a"}}, {"salt": "a"}),
        ({"caravan": {"cache": False}}, {"bypass": True}),
        ({"cache_salt": "a"}, {"salt": "a"}),
        ({"cache_salt": "a", "caravan": {"cache_salt": "a"}}, {"salt": "a"}),
        ({"cache_salt": "a", "caravan": None}, {"salt": "a"}),
    ],
)
def test_what_is_asked_for(make: Make, fields: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Each option becomes the one of the engine's contract."""
    assert make(**fields).generate.cache == generation_pb2.CacheOptions(**wanted)


@both
@pytest.mark.parametrize(
    "options",
    [None, {}, {"cache": True}, {"cache": None, "parent_key": None, "session_id": None}],
)
def test_defaults_ask_for_nothing(make: Make, options: dict[str, Any] | None) -> None:
    """The cache is on by default; an object, be it empty, asks to be told what it did."""
    request = make(caravan=options)
    assert not request.generate.HasField("cache")
    assert request.show_cache is (options is not None)


@both
@pytest.mark.parametrize(
    ("fields", "reason", "param"),
    [
        ({"caravan": {"sesion_id": "a"}}, "UNKNOWN_FIELD", "caravan.sesion_id"),
        ({"caravan": []}, "WRONG_TYPE", "caravan"),
        ({"caravan": {"cache": "no"}}, "WRONG_TYPE", "caravan.cache"),
        ({"caravan": {"session_id": 7}}, "WRONG_TYPE", "caravan.session_id"),
        ({"caravan": {"session_id": ""}}, "INVALID_VALUE", "caravan.session_id"),
        ({"caravan": {"session_id": "é" * 65}}, "INVALID_VALUE", "caravan.session_id"),
        ({"caravan": {"cache_salt": ""}}, "INVALID_VALUE", "caravan.cache_salt"),
        ({"caravan": {"cache_salt": "s" * 257}}, "INVALID_VALUE", "caravan.cache_salt"),
        ({"cache_salt": "s" * 257}, "INVALID_VALUE", "cache_salt"),
        (
            {"cache_salt": "a", "caravan": {"cache_salt": "b"}},
            "INVALID_VALUE",
            "caravan.cache_salt",
        ),
        ({"caravan": {"parent_key": ""}}, "INVALID_VALUE", "caravan.parent_key"),
        ({"caravan": {"parent_key": KEY[1:]}}, "INVALID_VALUE", "caravan.parent_key"),
        ({"caravan": {"parent_key": KEY + "00"}}, "INVALID_VALUE", "caravan.parent_key"),
        ({"caravan": {"parent_key": " " + KEY[1:]}}, "INVALID_VALUE", "caravan.parent_key"),
        ({"caravan": {"parent_key": "g" + KEY[1:]}}, "INVALID_VALUE", "caravan.parent_key"),
    ],
)
def test_mistakes_are_named(make: Make, fields: dict[str, Any], reason: str, param: str) -> None:
    """Nothing is ignored in silence."""
    with pytest.raises(CaravanError) as caught:
        make(**fields)
    assert (caught.value.reason, caught.value.param) == (reason, param)


@given(session_id=st.text(max_size=200))
def test_ids_are_taken_whole_or_refused(session_id: str) -> None:
    """An id of 1 to 128 bytes passes unchanged; nothing is cut to fit."""
    if 1 <= len(session_id.encode()) <= 128:
        assert _chat(caravan={"session_id": session_id}).generate.cache.session_id == session_id
    else:
        with pytest.raises(CaravanError):
            _chat(caravan={"session_id": session_id})
