"""What every wire asks of a request, whoever the provider is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.engine.remote.estimate import expected_tokens, prompt_tokens, tokens_of_text
from services.engine.remote.provider import Provider, provider_model
from services.runtime.errors import CaravanError
from tests.support.wires import assistant, call, chat, sampling, user, wire_of

Choice = chat_pb2.ToolChoice
Stop = generation_pb2.StopConditions
IMAGE = chat_pb2.Image


def _image(**values: Any) -> pb.GenerateRequest:
    return chat(user("", parts=[chat_pb2.ContentPart(image=IMAGE(**values))]))


def _unknown(enum: str) -> pb.GenerateRequest:
    """A value that only a newer contract has."""
    generate = _image(url="https://e.org/a.png")
    message = generate.chat.messages[0]
    of = {"role": message, "mode": generate.chat.tool_choice, "detail": message.parts[0].image}
    setattr(of[enum], enum, 99)
    return generate


def _schema(text: str) -> pb.GenerateRequest:
    return chat(sampling=sampling(grammar=generation_pb2.Grammar(json_schema=text)))


def _parameters(text: str) -> pb.GenerateRequest:
    generate = chat(tools=["look"])
    generate.chat.tools[0].parameters_json = text
    return generate


@pytest.mark.parametrize("provider", list(Provider), ids=lambda provider: provider.value)
@pytest.mark.parametrize(
    ("generate", "param"),
    [
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(text=""), "prompt"),
        (pb.GenerateRequest(chat=chat_pb2.ChatPrompt()), "messages"),
        (chat(chat_pb2.ChatMessage(content="x")), "messages[0].role"),
        (_unknown("role"), "messages[0].role"),
        (_unknown("mode"), "tool_choice"),
        (_unknown("detail"), "messages[0].parts[0].image.detail"),
        (chat(user("x", tool_call_id="c")), "messages[0].tool_call_id"),
        (chat(user("x", tool_calls=[call("c", "a", "{}")])), "messages[0].tool_calls"),
        (chat(user("x", parts=[chat_pb2.ContentPart(text="y")])), "messages[0].parts"),
        (chat(user("", parts=[chat_pb2.ContentPart()])), "messages[0].parts[0]"),
        (_image(), "messages[0].parts[0].image"),
        (_image(url="ftp://e.org/a"), "messages[0].parts[0].image.url"),
        (_image(url="https://" + "e" * 9000), "messages[0].parts[0].image.url"),
        (_image(data=b"x"), "messages[0].parts[0].image.media_type"),
        (_image(data=b"x", media_type="text/html"), "messages[0].parts[0].image.media_type"),
        (chat(choice=Choice(mode=Choice.MODE_REQUIRED)), "tool_choice"),
        (chat(tools=["a"], choice=Choice(mode=Choice.MODE_NAMED, name="b")), "tool_choice"),
        (chat(tools=["a"], choice=Choice(name="a")), "tool_choice"),
        (_parameters("[]"), "tools[0].parameters"),
        (_parameters('{"a": 1} {"b": 2}'), "tools[0].parameters"),
        (chat(stop=Stop(max_tokens=0)), "stop.max_tokens"),
        (chat(stop=Stop(stop=["a"] * 17)), "stop"),
        (chat(stop=Stop(stop=[""])), "stop[0]"),
        (chat(top_logprobs=21), "top_logprobs"),
        (chat(sampling=sampling(temperature=2.1)), "sampling.temperature"),
        (chat(sampling=sampling(temperature=math.nan)), "sampling.temperature"),
        (chat(sampling=sampling(top_p=0)), "sampling.top_p"),
        (chat(sampling=sampling(presence_penalty=-math.inf)), "sampling.presence_penalty"),
        (chat(sampling=sampling(grammar=generation_pb2.Grammar())), "sampling.grammar"),
        (_schema("no JSON"), "sampling.grammar"),
        (_schema('{"a": ' * 5000), "sampling.grammar"),
    ],
    ids=str,
)
def test_nonsense_is_refused_before_anybody_is_called(
    generate: pb.GenerateRequest, param: str, provider: Provider
) -> None:
    """As the other engines refuse it, by the same names."""
    with pytest.raises(CaravanError) as caught:
        wire_of(provider).request(generate, "m")
    assert (caught.value.reason, caught.value.param) == ("INVALID_VALUE", param)


@pytest.mark.parametrize("provider", list(Provider), ids=lambda provider: provider.value)
def test_an_answer_that_is_to_go_on_is_refused(provider: Provider) -> None:
    """Providers cannot begin in the middle."""
    with pytest.raises(CaravanError) as caught:
        wire_of(provider).request(chat(resume=pb.Resume(token_ids=[1])), "m")
    assert (caught.value.reason, caught.value.param) == ("UNSUPPORTED_FIELD", "resume")


def test_a_required_call_and_a_grammar_exclude_each_other() -> None:
    """An answer cannot be both."""
    generate = _schema("{}")
    generate.chat.MergeFrom(chat(tools=["a"], choice=Choice(mode=Choice.MODE_REQUIRED)).chat)
    with pytest.raises(CaravanError) as caught:
        wire_of(Provider.OPENAI).request(generate, "m")
    assert caught.value.param == "sampling.grammar"


@pytest.mark.parametrize(
    "bias",
    [
        [generation_pb2.LogitBias(token_id=1, bias=101)],
        [generation_pb2.LogitBias(token_id=1, bias=math.nan)],
        [generation_pb2.LogitBias(token_id=1, bias=1)] * 2,
        [generation_pb2.LogitBias(token_id=number, bias=1) for number in range(1025)],
    ],
)
def test_biases_have_limits(bias: list[generation_pb2.LogitBias]) -> None:
    """Range, number, and one for each token."""
    with pytest.raises(CaravanError) as caught:
        wire_of(Provider.OPENAI).request(chat(sampling=sampling(logit_bias=bias)), "m")
    assert caught.value.reason == "INVALID_VALUE"
    assert (caught.value.param or "").startswith("sampling.logit_bias")


@given(text=st.text(), name=st.text(max_size=20), schema=st.dictionaries(st.text(), st.text()))
def test_any_text_becomes_json(text: str, name: str, schema: dict[str, str]) -> None:
    """Whatever is in a message, the body is JSON that says it, for every provider."""
    generate = chat(user(text + "."), assistant("", call("c", "look", json.dumps(schema))))
    generate.chat.tools.add(name=name, parameters_json=json.dumps(schema))
    for provider in Provider:
        body = json.loads(wire_of(provider).request(generate, "m").body)
        assert any(text + "." in said for said in _strings(body))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from _strings(item)


@pytest.mark.parametrize(
    ("provider", "model", "known_as"),
    [
        (Provider.OPENAI, "openai/gpt-4o", "gpt-4o"),
        (Provider.ANTHROPIC, "anthropic/claude-sonnet-4", "claude-sonnet-4"),
        (Provider.GEMINI, "google/gemini-2.0-flash", "gemini-2.0-flash"),
        (Provider.GEMINI, "models/gemini-2.0-flash", "gemini-2.0-flash"),
        (Provider.LITELLM, "litellm/anthropic/claude", "anthropic/claude"),
        (Provider.OPENAI_COMPATIBLE, "openai/gpt-oss-20b", "openai/gpt-oss-20b"),
    ],
)
def test_names_of_models(provider: Provider, model: str, known_as: str) -> None:
    """What says whose a model is, is no part of its name there."""
    assert provider_model(provider, model) == known_as


def test_estimates() -> None:
    """A quarter of the characters, the longest answer, and something for what cannot be counted."""
    assert tokens_of_text(0) == 0
    assert tokens_of_text(9) == 3
    assert prompt_tokens(pb.GenerateRequest(text="12345678")) == 2
    assert prompt_tokens(pb.GenerateRequest(tokens=pb.TokenPrompt(ids=[1, 2, 3]))) == 3
    plain = prompt_tokens(chat(user("x" * 400)))
    assert 100 <= plain <= 110
    assert prompt_tokens(chat(user("x" * 400), tools=["look"])) > plain
    assert prompt_tokens(_image(url="https://e.org/a.png")) >= 1000
    assert expected_tokens(chat(user("x" * 400)), 50, 0) == plain + 50
    assert expected_tokens(chat(user("x" * 400), stop=Stop(max_tokens=7)), 50, 0) == plain + 7
    assert expected_tokens(chat(user("x" * 400)), 50, 120) == 120
