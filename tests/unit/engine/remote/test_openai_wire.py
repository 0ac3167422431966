"""Requests to the OpenAI API, and to servers that speak it."""

from __future__ import annotations

from typing import Any

import pytest
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as TextParams
from pydantic import TypeAdapter

from services.engine.remote.provider import Provider
from services.runtime.errors import CaravanError
from tests.support.wires import (
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

OPENAI = Provider.OPENAI
COMPATIBLE = Provider.OPENAI_COMPATIBLE
Choice = chat_pb2.ToolChoice


def test_a_conversation_with_tools() -> None:
    """Every kind of message, word for word."""
    body = body_of(
        OPENAI,
        chat(
            system("Be brief."),
            user("Weather?", name="ann"),
            assistant("", call("c1", "look", '{"b": 1.0}')),
            result("c1", "sunny"),
            assistant("It is sunny."),
        ),
        "openai/gpt-4o-mini",
    )
    assert body == {
        "model": "gpt-4o-mini",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?", "name": "ann"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "look", "arguments": '{"b": 1.0}'},
                    }
                ],
            },
            {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
            {"role": "assistant", "content": "It is sunny."},
        ],
    }


@pytest.mark.parametrize(
    ("mode", "shown"),
    [
        (Choice.MODE_UNSPECIFIED, None),
        (Choice.MODE_AUTO, "auto"),
        (Choice.MODE_REQUIRED, "required"),
        (Choice.MODE_NAMED, {"type": "function", "function": {"name": "look"}}),
    ],
)
def test_tools_and_their_choice(mode: Any, shown: Any) -> None:
    """Schemas keep the order of their keys."""
    name = "look" if mode == Choice.MODE_NAMED else ""
    generate = chat(tools=["look"], choice=Choice(mode=mode, name=name))
    body = body_of(OPENAI, generate)
    assert body.get("tool_choice") == shown
    function = body["tools"][0]["function"]
    assert function["name"] == "look"
    assert function["description"] == "Does look."
    assert list(function["parameters"]["properties"]) == ["b", "a"]


def test_no_tool_may_be_called() -> None:
    """They are not shown then."""
    body = body_of(OPENAI, chat(tools=["look"], choice=Choice(mode=Choice.MODE_NONE)))
    assert "tools" not in body
    assert "tool_choice" not in body


def test_images() -> None:
    """By URL, and as bytes in one."""
    image = chat_pb2.Image
    message = user(
        "",
        parts=[
            chat_pb2.ContentPart(text="What is it?"),
            chat_pb2.ContentPart(image=image(url="https://e.org/a.png", detail=image.DETAIL_LOW)),
            chat_pb2.ContentPart(image=image(data=b"\x00\xff", media_type="image/png")),
        ],
    )
    assert body_of(OPENAI, chat(message))["messages"][0]["content"] == [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": "https://e.org/a.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AP8="}},
    ]


def test_sampling_and_limits() -> None:
    """Numbers are those that the client wrote; what asks for nothing is left out."""
    generate = chat(
        sampling=sampling(
            temperature=0.7,
            top_p=1,
            presence_penalty=0.1,
            frequency_penalty=-1.5,
            min_p=0,
            repeat_penalty=1,
            seed=5,
            logit_bias=[generation_pb2.LogitBias(token_id=7, bias=-100)],
        ),
        stop=generation_pb2.StopConditions(max_tokens=9, stop=["END"]),
        top_logprobs=2,
    )
    body = body_of(OPENAI, generate)
    for name in ("model", "messages", "stream", "stream_options"):
        del body[name]
    assert body == {
        "temperature": 0.7,
        "presence_penalty": 0.1,
        "frequency_penalty": -1.5,
        "seed": 5,
        "logit_bias": {"7": -100},
        "max_completion_tokens": 9,
        "stop": ["END"],
        "logprobs": True,
        "top_logprobs": 2,
    }


def test_a_drawn_seed_is_not_sent() -> None:
    """The gateway draws it so that an answer can move; here none can."""
    assert "seed" not in body_of(OPENAI, chat(sampling=sampling(seed=5), seed_drawn=True))


def test_servers_of_open_models_can_do_more() -> None:
    """Under the names that most of them know."""
    body = body_of(
        COMPATIBLE,
        chat(
            sampling=sampling(top_k=40, min_p=0.05, repeat_penalty=1.1),
            stop=generation_pb2.StopConditions(max_tokens=9, ignore_eos=True, stop=list("abcde")),
        ),
        "org/model",
    )
    assert body["model"] == "org/model"
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (40, 0.05, 1.1)
    assert (body["max_tokens"], body["ignore_eos"], body["stop"]) == (9, True, list("abcde"))


@pytest.mark.parametrize(
    ("generate", "param"),
    [
        (chat(sampling=sampling(top_k=40)), "sampling.top_k"),
        (chat(sampling=sampling(min_p=0.1)), "sampling.min_p"),
        (chat(sampling=sampling(repeat_penalty=1.1)), "sampling.repeat_penalty"),
        (chat(sampling=sampling(seed=1 << 63)), "sampling.seed"),
        (chat(stop=generation_pb2.StopConditions(ignore_eos=True)), "stop.ignore_eos"),
        (chat(stop=generation_pb2.StopConditions(stop=list("abcde"))), "stop"),
        (chat(resume=pb.Resume(token_ids=[1])), "resume"),
        (pb.GenerateRequest(tokens=pb.TokenPrompt(ids=[1])), "prompt"),
        (pb.GenerateRequest(text="x", top_logprobs=6), "top_logprobs"),
        (
            pb.GenerateRequest(
                text="x", sampling=sampling(grammar=generation_pb2.Grammar(json_schema="{}"))
            ),
            "sampling.grammar",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_openai_cannot_do_is_refused_by_name(generate: pb.GenerateRequest, param: str) -> None:
    """Nothing is accepted and ignored."""
    with pytest.raises(CaravanError) as caught:
        wire_of(OPENAI).request(generate, "m")
    assert (caught.value.reason, caught.value.param) == ("UNSUPPORTED_FIELD", param)
    assert "OpenAI" in caught.value.message


def test_grammars() -> None:
    """A schema must be followed; an empty one asks for any object."""
    grammar = generation_pb2.Grammar(json_schema='{"type": "object", "z": 1, "a": 2}')
    body = body_of(OPENAI, chat(sampling=sampling(grammar=grammar)))
    shown = body["response_format"]
    assert shown["type"] == "json_schema"
    assert shown["json_schema"]["strict"] is True
    assert list(shown["json_schema"]["schema"]) == ["type", "z", "a"]
    grammar = generation_pb2.Grammar(json_schema=" {} ")
    body = body_of(OPENAI, chat(sampling=sampling(grammar=grammar)))
    assert body["response_format"] == {"type": "json_object"}


def test_texts_and_tokens() -> None:
    """They go to the older API."""
    generate = pb.GenerateRequest(
        text="Once", stop=generation_pb2.StopConditions(max_tokens=3), top_logprobs=0
    )
    request = wire_of(OPENAI).request(generate, "m")
    assert request.path == "completions"
    body = body_of(OPENAI, generate)
    assert (body["prompt"], body["max_tokens"], body["logprobs"]) == ("Once", 3, 0)
    body = body_of(COMPATIBLE, pb.GenerateRequest(tokens=pb.TokenPrompt(ids=[1, 2])))
    assert body["prompt"] == [1, 2]
    assert wire_of(OPENAI).request(chat(), "m").path == "chat/completions"


def test_bodies_are_what_the_official_client_would_send() -> None:
    """Its types know every field, and find no value of the wrong kind."""
    generate = chat(
        system("x"),
        user("", parts=[chat_pb2.ContentPart(image=chat_pb2.Image(url="https://e.org/a.png"))]),
        assistant("", call("c", "look", "{}")),
        result("c", "z"),
        tools=["look"],
        choice=Choice(mode=Choice.MODE_AUTO),
        sampling=sampling(
            temperature=0.5,
            top_p=0.5,
            presence_penalty=1,
            frequency_penalty=1,
            seed=3,
            logit_bias=[generation_pb2.LogitBias(token_id=7, bias=1)],
            grammar=generation_pb2.Grammar(json_schema='{"type": "object"}'),
        ),
        stop=generation_pb2.StopConditions(max_tokens=9, stop=["END"]),
        top_logprobs=3,
    )
    body = body_of(OPENAI, generate)
    known: dict[str, Any] = TypeAdapter[Any](ChatParams).validate_python(body)
    assert set(known) == set(body)
    assert len(list(known["messages"])) == 4
    assert len(list(known["tools"])) == 1
    body = body_of(OPENAI, pb.GenerateRequest(text="x", stop=generate.stop, top_logprobs=2))
    assert set(TypeAdapter[Any](TextParams).validate_python(body)) == set(body)


def test_the_cache_is_an_optimisation() -> None:
    """What a request wants of our cache has no effect on what a provider is asked."""
    cache = generation_pb2.CacheOptions(session_id="s", salt="t", bypass=True)
    assert body_of(OPENAI, chat(cache=cache)) == body_of(OPENAI, chat())


def test_the_credential() -> None:
    """As OpenAI wants it."""
    assert wire_of(OPENAI).credential_headers("sk-1") == {"authorization": "Bearer sk-1"}
