"""Requests to the Anthropic API."""

from __future__ import annotations

from typing import Any

import pytest
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.remote.provider import Provider
from services.runtime.errors import CaravanError
from tests.support.wires import (
    MAX_TOKENS,
    assistant,
    body_of,
    call,
    chat,
    result,
    sampling,
    system,
    user,
    wire_of,
)

ANTHROPIC = Provider.ANTHROPIC
Choice = chat_pb2.ToolChoice
Image = chat_pb2.Image


def test_a_conversation_with_tools() -> None:
    """Instructions stand apart, and results of calls that were made together come together, in the user's name."""
    body = body_of(
        ANTHROPIC,
        chat(
            system("Be brief."),
            system("Be kind."),
            user("Weather?"),
            assistant("I look.", call("c1", "look", '{"b": 1.0, "a": 2}'), call("c2", "now", "")),
            result("c1", "sunny"),
            result("c2", ""),
            user("Well?"),
        ),
        "anthropic/claude-sonnet-4",
    )
    assert body == {
        "model": "claude-sonnet-4",
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "system": "Be brief.\n\nBe kind.",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "c1", "name": "look", "input": {"b": 1.0, "a": 2}},
                    {"type": "tool_use", "id": "c2", "name": "now", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": "sunny"},
                    {"type": "tool_result", "tool_use_id": "c2", "content": ""},
                    {"type": "text", "text": "Well?"},
                ],
            },
        ],
    }


@pytest.mark.parametrize(
    ("mode", "shown"),
    [
        (Choice.MODE_UNSPECIFIED, None),
        (Choice.MODE_NONE, {"type": "none"}),
        (Choice.MODE_AUTO, {"type": "auto"}),
        (Choice.MODE_REQUIRED, {"type": "any"}),
        (Choice.MODE_NAMED, {"type": "tool", "name": "look"}),
    ],
)
def test_tools_and_their_choice(mode: Any, shown: Any) -> None:
    """Tools stay where none may be called: earlier messages may call them."""
    name = "look" if mode == Choice.MODE_NAMED else ""
    generate = chat(tools=["look"], choice=Choice(mode=mode, name=name))
    generate.chat.tools.add(name="now")
    body = body_of(ANTHROPIC, generate)
    assert body.get("tool_choice") == shown
    look, now = body["tools"]
    assert (look["name"], look["description"]) == ("look", "Does look.")
    assert list(look["input_schema"]["properties"]) == ["b", "a"]
    assert now == {"name": "now", "input_schema": {"type": "object", "properties": {}}}


def test_images() -> None:
    """By URL and as bytes."""
    parts = [
        chat_pb2.ContentPart(text="What is it?"),
        chat_pb2.ContentPart(image=Image(url="https://e.org/a.png", detail=Image.DETAIL_AUTO)),
        chat_pb2.ContentPart(image=Image(data=b"\x00\xff", media_type="image/png")),
    ]
    body = body_of(ANTHROPIC, chat(user("", parts=parts)))
    source = {"type": "base64", "media_type": "image/png", "data": "AP8="}
    assert body["messages"][0]["content"] == [
        {"type": "text", "text": "What is it?"},
        {"type": "image", "source": {"type": "url", "url": "https://e.org/a.png"}},
        {"type": "image", "source": source},
    ]


def test_sampling_limits_and_grammar() -> None:
    """Under Anthropic's names."""
    schema = '{"type": "object", "properties": {"z": {}, "a": {}}, "additionalProperties": false}'
    generate = chat(
        sampling=sampling(
            temperature=0.3, top_p=0.9, top_k=4, grammar=generation_pb2.Grammar(json_schema=schema)
        ),
        stop=generation_pb2.StopConditions(max_tokens=9, stop=list("abcdefg")),
    )
    body = body_of(ANTHROPIC, generate)
    assert (body["temperature"], body["top_p"], body["top_k"]) == (0.3, 0.9, 4)
    assert (body["max_tokens"], body["stop_sequences"]) == (9, list("abcdefg"))
    shown = body["output_config"]["format"]
    assert shown["type"] == "json_schema"
    assert list(shown["schema"]["properties"]) == ["z", "a"]


@pytest.mark.parametrize(
    ("generate", "param"),
    [
        (pb.GenerateRequest(text="x"), "prompt"),
        (pb.GenerateRequest(tokens=pb.TokenPrompt(ids=[1])), "prompt"),
        (chat(user(), system("Late.")), "messages[1].role"),
        (chat(user("x", name="ann")), "messages[0].name"),
        (chat(top_logprobs=0), "top_logprobs"),
        (chat(sampling=sampling(seed=1)), "sampling.seed"),
        (chat(sampling=sampling(temperature=1.5)), "sampling.temperature"),
        (chat(sampling=sampling(presence_penalty=1)), "sampling.presence_penalty"),
        (chat(sampling=sampling(min_p=0.1)), "sampling.min_p"),
        (chat(stop=generation_pb2.StopConditions(ignore_eos=True)), "stop.ignore_eos"),
        (
            chat(sampling=sampling(logit_bias=[generation_pb2.LogitBias(token_id=1, bias=1)])),
            "sampling.logit_bias",
        ),
        (
            chat(sampling=sampling(grammar=generation_pb2.Grammar(json_schema="{}"))),
            "sampling.grammar",
        ),
        (
            chat(
                user(
                    "",
                    parts=[
                        chat_pb2.ContentPart(
                            image=Image(url="https://e.org", detail=Image.DETAIL_LOW)
                        )
                    ],
                )
            ),
            "messages[0].parts[0].image.detail",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_anthropic_cannot_do_is_refused_by_name(
    generate: pb.GenerateRequest, param: str
) -> None:
    """Nothing is accepted and ignored."""
    with pytest.raises(CaravanError) as caught:
        wire_of(ANTHROPIC).request(generate, "m")
    assert (caught.value.reason, caught.value.param) == ("UNSUPPORTED_FIELD", param)


def test_arguments_must_be_objects() -> None:
    """There is no other way to say them."""
    with pytest.raises(CaravanError) as caught:
        wire_of(ANTHROPIC).request(chat(user(), assistant("", call("c", "look", "[1]"))), "m")
    error = caught.value
    assert (error.reason, error.param) == ("INVALID_VALUE", "messages[1].tool_calls[0]")


def test_a_drawn_seed_is_no_wish() -> None:
    """The gateway draws it so that an answer can move; here none can."""
    body_of(ANTHROPIC, chat(sampling=sampling(seed=5), seed_drawn=True))


def test_the_call() -> None:
    """Its path, the version of the API, and the credential as Anthropic wants it."""
    wire = wire_of(ANTHROPIC)
    request = wire.request(chat(), "m")
    assert request.path == "messages"
    assert request.headers == {"anthropic-version": "2023-06-01"}
    assert wire.credential_headers("sk-1") == {"x-api-key": "sk-1"}
