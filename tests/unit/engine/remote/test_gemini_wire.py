"""Requests to the Gemini API."""

from __future__ import annotations

from typing import Any

import pytest
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb

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

GEMINI = Provider.GEMINI
Choice = chat_pb2.ToolChoice
Image = chat_pb2.Image
Stop = generation_pb2.StopConditions


def test_a_conversation_with_tools() -> None:
    """Instructions stand apart, and results go by the name of their function."""
    body = body_of(
        GEMINI,
        chat(
            system("Be brief."),
            user("Weather?"),
            assistant("I look.", call("c1", "look", '{"b": 1.0, "a": 2}'), call("c2", "now", "")),
            result("c2", "noon"),
            result("c1", "sunny"),
        ),
        "gemini-2.0-flash",
    )
    assert body == {
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "Weather?"}]},
            {
                "role": "model",
                "parts": [
                    {"text": "I look."},
                    {"functionCall": {"name": "look", "args": {"b": 1.0, "a": 2}}},
                    {"functionCall": {"name": "now", "args": {}}},
                ],
            },
            {
                "role": "user",
                "parts": [
                    {"functionResponse": {"name": "now", "response": {"result": "noon"}}},
                    {"functionResponse": {"name": "look", "response": {"result": "sunny"}}},
                ],
            },
        ],
    }


@pytest.mark.parametrize("model", ["gemini-3-pro-preview", "gemini-3.1-pro", "gemini-flash-latest"])
def test_models_that_sign_their_thoughts(model: str) -> None:
    """The first of calls that were made together says that its signature is not there."""
    calls = assistant("", call("c1", "look", "{}"), call("c2", "now", "{}"))
    first, second = body_of(GEMINI, chat(user(), calls), model)["contents"][1]["parts"]
    assert first["thoughtSignature"] == "skip_thought_signature_validator"
    assert "thoughtSignature" not in second


@pytest.mark.parametrize(
    ("mode", "shown"),
    [
        (Choice.MODE_UNSPECIFIED, None),
        (Choice.MODE_AUTO, {"mode": "AUTO"}),
        (Choice.MODE_REQUIRED, {"mode": "ANY"}),
        (Choice.MODE_NAMED, {"mode": "ANY", "allowedFunctionNames": ["look"]}),
    ],
)
def test_tools_and_their_choice(mode: Any, shown: Any) -> None:
    """JSON schemas are sent as such, in the order of their keys."""
    name = "look" if mode == Choice.MODE_NAMED else ""
    generate = chat(tools=["look"], choice=Choice(mode=mode, name=name))
    generate.chat.tools.add(name="now")
    body = body_of(GEMINI, generate)
    assert body.get("toolConfig", {}).get("functionCallingConfig") == shown
    look, now = body["tools"][0]["functionDeclarations"]
    assert (look["name"], look["description"]) == ("look", "Does look.")
    assert list(look["parametersJsonSchema"]["properties"]) == ["b", "a"]
    assert now == {"name": "now"}


def test_no_tool_may_be_called() -> None:
    """They are not shown then."""
    body = body_of(GEMINI, chat(tools=["look"], choice=Choice(mode=Choice.MODE_NONE)))
    assert "tools" not in body
    assert "toolConfig" not in body


def test_images() -> None:
    """By URL, which the provider fetches, and as bytes."""
    parts = [
        chat_pb2.ContentPart(text="What is it?"),
        chat_pb2.ContentPart(image=Image(url="https://e.org/a.png")),
        chat_pb2.ContentPart(image=Image(data=b"\x00\xff", media_type="image/png")),
    ]
    body = body_of(GEMINI, chat(user("", parts=parts)))
    assert body["contents"][0]["parts"] == [
        {"text": "What is it?"},
        {"fileData": {"fileUri": "https://e.org/a.png"}},
        {"inlineData": {"mimeType": "image/png", "data": "AP8="}},
    ]


def test_sampling_limits_and_grammar() -> None:
    """Under Gemini's names."""
    schema = '{"type": "object", "properties": {"z": {}, "a": {}}}'
    generate = chat(
        sampling=sampling(
            temperature=0.3,
            top_p=0.9,
            top_k=4,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            seed=7,
            grammar=generation_pb2.Grammar(json_schema=schema),
        ),
        stop=Stop(max_tokens=9, stop=list("abcde")),
        top_logprobs=3,
    )
    config = body_of(GEMINI, generate)["generationConfig"]
    assert list(config.pop("responseJsonSchema")["properties"]) == ["z", "a"]
    assert config == {
        "temperature": 0.3,
        "topP": 0.9,
        "topK": 4,
        "presencePenalty": 0.5,
        "frequencyPenalty": -0.5,
        "seed": 7,
        "maxOutputTokens": 9,
        "stopSequences": list("abcde"),
        "responseLogprobs": True,
        "logprobs": 3,
        "responseMimeType": "application/json",
    }
    grammar = generation_pb2.Grammar(json_schema="{}")
    config = body_of(GEMINI, chat(sampling=sampling(grammar=grammar)))["generationConfig"]
    assert config == {"responseMimeType": "application/json"}


@pytest.mark.parametrize(
    ("generate", "param"),
    [
        (pb.GenerateRequest(text="x"), "prompt"),
        (chat(user(), system("Late.")), "messages[1].role"),
        (chat(user("x", name="ann")), "messages[0].name"),
        (chat(sampling=sampling(seed=1 << 31)), "sampling.seed"),
        (chat(sampling=sampling(min_p=0.1)), "sampling.min_p"),
        (chat(sampling=sampling(repeat_penalty=1.1)), "sampling.repeat_penalty"),
        (chat(stop=Stop(ignore_eos=True)), "stop.ignore_eos"),
        (chat(stop=Stop(stop=list("abcdef"))), "stop"),
        (
            chat(sampling=sampling(logit_bias=[generation_pb2.LogitBias(token_id=1, bias=1)])),
            "sampling.logit_bias",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_gemini_cannot_do_is_refused_by_name(generate: pb.GenerateRequest, param: str) -> None:
    """Nothing is accepted and ignored."""
    with pytest.raises(CaravanError) as caught:
        wire_of(GEMINI).request(generate, "m")
    assert (caught.value.reason, caught.value.param) == ("UNSUPPORTED_FIELD", param)


def test_a_result_without_a_call() -> None:
    """Nobody could say of which function it is."""
    with pytest.raises(CaravanError) as caught:
        wire_of(GEMINI).request(chat(user(), result("c1", "sunny")), "m")
    error = caught.value
    assert (error.reason, error.param) == ("INVALID_VALUE", "messages[1].tool_call_id")


def test_the_call() -> None:
    """The model is in the path, whatever it is called, and the credential is not."""
    wire = wire_of(GEMINI)
    path = wire.request(chat(), "google/gemini-2.0-flash").path
    assert path == "models/gemini-2.0-flash:streamGenerateContent?alt=sse"
    path = wire.request(chat(), "a/../b?c#d").path
    assert path == "models/a%2F..%2Fb%3Fc%23d:streamGenerateContent?alt=sse"
    assert wire.credential_headers("AIza1") == {"x-goog-api-key": "AIza1"}
