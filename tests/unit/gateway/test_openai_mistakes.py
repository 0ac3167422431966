"""One row per mistake in an OpenAI body, with the reason and the `param` that a client is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.gateway.openai_request import parse_chat, parse_completion
from services.runtime.errors import CaravanError

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def _chat(**fields: Any) -> None:
    parse_chat(json.dumps({"model": "demo", "messages": [USER], **fields}).encode())


def _completion(**fields: Any) -> None:
    parse_completion(json.dumps({"model": "demo", "prompt": "hi", **fields}).encode())


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def _message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi", **fields}]}


def _assistant(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **fields}]}


def _call(**fields: Any) -> dict[str, Any]:
    return _assistant(tool_calls=[{**CALL, **fields}])


def _tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


BODIES: list[tuple[bytes, str, str | None]] = [
    (b"", "INVALID_JSON", None),
    (b" ", "INVALID_JSON", None),
    (b"{", "INVALID_JSON", None),
    (b"\xef\xbb\xbf{}", "INVALID_JSON", None),
    (b"{} {}", "INVALID_JSON", None),
    (b"{},", "INVALID_JSON", None),
    (b"{'model': 'x'}", "INVALID_JSON", None),
    (b'{"model": "x",}', "INVALID_JSON", None),
    (b'{"model": NaN}', "INVALID_JSON", None),
    (b'{"model": Infinity}', "INVALID_JSON", None),
    (b'{"model": "\xff"}', "INVALID_JSON", None),
    (b'{"model": "\xed\xa0\x80"}', "INVALID_JSON", None),
    (b'{"\xff": 1}', "INVALID_JSON", None),
    (b'{"model": "\\ud800"}', "INVALID_JSON", None),
    (b'{"model": "\\ud800x"}', "INVALID_JSON", None),
    (b'{"model": "\\udc00"}', "INVALID_JSON", None),
    (b'{"model": "a\nb"}', "INVALID_JSON", None),
    (b"[" * 100_000, "INVALID_JSON", None),
    (b"\x00", "INVALID_JSON", None),
    (b"[]", "WRONG_TYPE", None),
    (b'"x"', "WRONG_TYPE", None),
    (b"null", "WRONG_TYPE", None),
    (b"{}", "MISSING_FIELD", "model"),
    (b'{"model": "x"}', "MISSING_FIELD", "messages"),
    (b'{"model": null, "messages": []}', "WRONG_TYPE", "model"),
    (b'{"model": "x", "messages": [], "temperature": 1e400}', "INVALID_VALUE", "temperature"),
]

CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"model": ""}, "MISSING_FIELD", "model"),
    ({"model": "m" * 257}, "INVALID_VALUE", "model"),
    ({"model": 5}, "WRONG_TYPE", "model"),
    ({"temprature": 1}, "UNKNOWN_FIELD", "temprature"),
    ({"messages": {}}, "WRONG_TYPE", "messages"),
    ({"messages": None}, "WRONG_TYPE", "messages"),
    ({"messages": []}, "INVALID_VALUE", "messages"),
    ({"messages": [5]}, "WRONG_TYPE", "messages[0]"),
    ({"messages": [USER, {}]}, "MISSING_FIELD", "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "MISSING_FIELD", "messages[0].content"),
    (_message(role="robot"), "INVALID_VALUE", "messages[0].role"),
    (_message(role=5), "WRONG_TYPE", "messages[0].role"),
    (_message(role="function", name="f"), "UNSUPPORTED_FIELD", "messages[0].role"),
    (_message(content=5), "WRONG_TYPE", "messages[0].content"),
    (_message(content=None), "WRONG_TYPE", "messages[0].content"),
    (_message(content=[]), "INVALID_VALUE", "messages[0].content"),
    (_message(content=["hi"]), "WRONG_TYPE", "messages[0].content[0]"),
    (_message(content=[{"type": "text"}]), "MISSING_FIELD", "messages[0].content[0].text"),
    (
        _message(content=[{"type": "text", "text": 1}]),
        "WRONG_TYPE",
        "messages[0].content[0].text",
    ),
    (_message(content=[{"type": "odd"}]), "INVALID_VALUE", "messages[0].content[0].type"),
    (
        _message(content=[{"type": "refusal", "refusal": "no"}]),
        "UNSUPPORTED_FIELD",
        "messages[0].content[0].type",
    ),
    (
        _message(content=[{"type": "input_audio", "input_audio": {}}]),
        "UNSUPPORTED_FIELD",
        "messages[0].content[0].type",
    ),
    (_message(colour="red"), "UNKNOWN_FIELD", "messages[0].colour"),
    (_message(name=5), "WRONG_TYPE", "messages[0].name"),
    (_message(tool_calls=[]), "UNKNOWN_FIELD", "messages[0].tool_calls"),
    (_assistant(), "MISSING_FIELD", "messages[1].content"),
    (_assistant(content=None, tool_calls=[]), "MISSING_FIELD", "messages[1].content"),
    (_assistant(content="a", refusal=5), "WRONG_TYPE", "messages[1].refusal"),
    (_assistant(refusal=""), "MISSING_FIELD", "messages[1].content"),
    (_assistant(content="a", audio={"id": "x"}), "UNSUPPORTED_FIELD", "messages[1].audio"),
    (
        _assistant(content="a", function_call={"name": "f"}),
        "UNSUPPORTED_FIELD",
        "messages[1].function_call",
    ),
    (_call(type="custom"), "UNSUPPORTED_FIELD", "messages[1].tool_calls[0].type"),
    (_call(type="odd"), "INVALID_VALUE", "messages[1].tool_calls[0].type"),
    (_call(id=5), "WRONG_TYPE", "messages[1].tool_calls[0].id"),
    (
        _call(function={"name": "f"}),
        "MISSING_FIELD",
        "messages[1].tool_calls[0].function.arguments",
    ),
    (
        _call(function={"name": "f", "arguments": {}}),
        "WRONG_TYPE",
        "messages[1].tool_calls[0].function.arguments",
    ),
    (
        _call(function={"name": "f", "arguments": "{"}),
        "INVALID_VALUE",
        "messages[1].tool_calls[0].function.arguments",
    ),
    (
        _call(function={"name": "f", "arguments": "[]"}),
        "INVALID_VALUE",
        "messages[1].tool_calls[0].function.arguments",
    ),
    (
        _call(function={"name": "a b", "arguments": "{}"}),
        "INVALID_VALUE",
        "messages[1].tool_calls[0].function.name",
    ),
    (
        {"messages": [{"role": "tool", "content": "1"}]},
        "MISSING_FIELD",
        "messages[0].tool_call_id",
    ),
    (
        {"messages": [{"role": "tool", "content": "1", "tool_call_id": ""}]},
        "INVALID_VALUE",
        "messages[0].tool_call_id",
    ),
    ({"temperature": "1"}, "WRONG_TYPE", "temperature"),
    ({"temperature": True}, "WRONG_TYPE", "temperature"),
    ({"temperature": -0.1}, "INVALID_VALUE", "temperature"),
    ({"temperature": 2.1}, "INVALID_VALUE", "temperature"),
    ({"temperature": 1e300}, "INVALID_VALUE", "temperature"),
    ({"temperature": 10**400}, "INVALID_VALUE", "temperature"),
    ({"top_p": 0}, "INVALID_VALUE", "top_p"),
    ({"top_p": 1e-60}, "INVALID_VALUE", "top_p"),
    ({"top_p": 1.1}, "INVALID_VALUE", "top_p"),
    ({"top_k": -1}, "INVALID_VALUE", "top_k"),
    ({"top_k": 1_000_001}, "INVALID_VALUE", "top_k"),
    ({"top_k": 1.5}, "WRONG_TYPE", "top_k"),
    ({"min_p": 1.1}, "INVALID_VALUE", "min_p"),
    ({"presence_penalty": 2.1}, "INVALID_VALUE", "presence_penalty"),
    ({"frequency_penalty": -2.1}, "INVALID_VALUE", "frequency_penalty"),
    ({"repeat_penalty": 0}, "INVALID_VALUE", "repeat_penalty"),
    ({"repetition_penalty": 3}, "INVALID_VALUE", "repetition_penalty"),
    ({"repetition_penalty": 1.1, "repeat_penalty": 1}, "INVALID_VALUE", "repetition_penalty"),
    ({"max_tokens": 0}, "INVALID_VALUE", "max_tokens"),
    ({"max_tokens": -1}, "INVALID_VALUE", "max_tokens"),
    ({"max_tokens": 2**31}, "INVALID_VALUE", "max_tokens"),
    ({"max_tokens": 10**400}, "INVALID_VALUE", "max_tokens"),
    ({"max_tokens": 1.5}, "WRONG_TYPE", "max_tokens"),
    ({"max_tokens": True}, "WRONG_TYPE", "max_tokens"),
    ({"max_completion_tokens": 0}, "INVALID_VALUE", "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "INVALID_VALUE", "max_completion_tokens"),
    ({"seed": 2**63}, "INVALID_VALUE", "seed"),
    ({"seed": "7"}, "WRONG_TYPE", "seed"),
    ({"stop": 5}, "WRONG_TYPE", "stop"),
    ({"stop": ""}, "INVALID_VALUE", "stop"),
    ({"stop": ["a", ""]}, "INVALID_VALUE", "stop[1]"),
    ({"stop": ["a", 5]}, "WRONG_TYPE", "stop[1]"),
    ({"stop": "é" * 129}, "INVALID_VALUE", "stop"),
    ({"stop": ["a"] * 17}, "INVALID_VALUE", "stop"),
    ({"stream": "yes"}, "WRONG_TYPE", "stream"),
    ({"stream_options": {}}, "INVALID_VALUE", "stream_options"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "WRONG_TYPE",
        "stream_options.include_usage",
    ),
    ({"stream": True, "stream_options": {"odd": 1}}, "UNKNOWN_FIELD", "stream_options.odd"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "UNSUPPORTED_FIELD",
        "stream_options.include_obfuscation",
    ),
    ({"logprobs": 3}, "WRONG_TYPE", "logprobs"),
    ({"top_logprobs": 3}, "INVALID_VALUE", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "INVALID_VALUE", "top_logprobs"),
    ({"logit_bias": {"5": 101}}, "INVALID_VALUE", "logit_bias.5"),
    ({"logit_bias": {"x": 1}}, "INVALID_VALUE", "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "INVALID_VALUE", "logit_bias"),
    ({"logit_bias": {"4294967296": 1}}, "INVALID_VALUE", "logit_bias"),
    ({"logit_bias": {"1": 1, "01": 2}}, "INVALID_VALUE", "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "WRONG_TYPE", "logit_bias"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "INVALID_VALUE", "logit_bias"),
    ({"tools": {}}, "WRONG_TYPE", "tools"),
    ({"tools": [{}]}, "MISSING_FIELD", "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "MISSING_FIELD", "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {}}]}, "UNSUPPORTED_FIELD", "tools[0].type"),
    ({"tools": [{"type": "odd"}]}, "INVALID_VALUE", "tools[0].type"),
    (_tool(name=""), "INVALID_VALUE", "tools[0].function.name"),
    (_tool(name="a b"), "INVALID_VALUE", "tools[0].function.name"),
    (_tool(name="n" * 65), "INVALID_VALUE", "tools[0].function.name"),
    (_tool(parameters="{}"), "WRONG_TYPE", "tools[0].function.parameters"),
    (_tool(parameters=_deep(65)), "INVALID_VALUE", "tools[0].function.parameters"),
    (_tool(parameters={"a": "x" * 65_536}), "INVALID_VALUE", "tools[0].function.parameters"),
    (_tool(strict=True), "UNSUPPORTED_FIELD", "tools[0].function.strict"),
    (_tool(odd=1), "UNKNOWN_FIELD", "tools[0].function.odd"),
    ({"tools": [TOOL, TOOL]}, "INVALID_VALUE", "tools[1].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)]},
        "INVALID_VALUE",
        "tools",
    ),
    ({"tools": [TOOL], "tool_choice": "maybe"}, "INVALID_VALUE", "tool_choice"),
    ({"tools": [TOOL], "tool_choice": 5}, "WRONG_TYPE", "tool_choice"),
    ({"tool_choice": "required"}, "INVALID_VALUE", "tool_choice"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "INVALID_VALUE",
        "tool_choice",
    ),
    (
        {"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}},
        "UNSUPPORTED_FIELD",
        "tool_choice.type",
    ),
    (
        {
            "tools": [TOOL],
            "tool_choice": "required",
            "response_format": {"type": "json_object"},
        },
        "INVALID_VALUE",
        "tool_choice",
    ),
    ({"response_format": "json"}, "WRONG_TYPE", "response_format"),
    ({"response_format": {}}, "MISSING_FIELD", "response_format.type"),
    ({"response_format": {"type": "grammar"}}, "INVALID_VALUE", "response_format.type"),
    (
        {"response_format": {"type": "json_schema"}},
        "MISSING_FIELD",
        "response_format.json_schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        "MISSING_FIELD",
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": " ", "schema": {}}}},
        "INVALID_VALUE",
        "response_format.json_schema.name",
    ),
    ({"n": 2}, "UNSUPPORTED_FIELD", "n"),
    ({"n": True}, "UNSUPPORTED_FIELD", "n"),
    ({"store": True}, "UNSUPPORTED_FIELD", "store"),
    ({"service_tier": "flex"}, "UNSUPPORTED_FIELD", "service_tier"),
    ({"modalities": ["text", "audio"]}, "UNSUPPORTED_FIELD", "modalities"),
    ({"parallel_tool_calls": False}, "UNSUPPORTED_FIELD", "parallel_tool_calls"),
    ({"metadata": {"a": 1}}, "UNSUPPORTED_FIELD", "metadata"),
    ({"user": 5}, "UNSUPPORTED_FIELD", "user"),
    ({"best_of": 1}, "UNKNOWN_FIELD", "best_of"),
]

COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "WRONG_TYPE", "prompt"),
    ({"prompt": 5}, "WRONG_TYPE", "prompt"),
    ({"prompt": ""}, "INVALID_VALUE", "prompt"),
    ({"prompt": []}, "INVALID_VALUE", "prompt"),
    ({"prompt": [""]}, "INVALID_VALUE", "prompt"),
    ({"prompt": ["a", "b"]}, "UNSUPPORTED_FIELD", "prompt"),
    ({"prompt": [[1], [2]]}, "UNSUPPORTED_FIELD", "prompt"),
    ({"prompt": [1, "b"]}, "WRONG_TYPE", "prompt[1]"),
    ({"prompt": [1, -1]}, "INVALID_VALUE", "prompt[1]"),
    ({"prompt": [2**32]}, "INVALID_VALUE", "prompt[0]"),
    ({"prompt": [1.5]}, "WRONG_TYPE", "prompt[0]"),
    ({"prompt": [True]}, "WRONG_TYPE", "prompt[0]"),
    ({"logprobs": 6}, "INVALID_VALUE", "logprobs"),
    ({"logprobs": -1}, "INVALID_VALUE", "logprobs"),
    ({"logprobs": True}, "WRONG_TYPE", "logprobs"),
    ({"n": 2}, "UNSUPPORTED_FIELD", "n"),
    ({"best_of": 2}, "UNSUPPORTED_FIELD", "best_of"),
    ({"echo": True}, "UNSUPPORTED_FIELD", "echo"),
    ({"suffix": "x"}, "UNSUPPORTED_FIELD", "suffix"),
    ({"max_tokens": 0}, "INVALID_VALUE", "max_tokens"),
    ({"messages": []}, "UNKNOWN_FIELD", "messages"),
    ({"max_completion_tokens": 5}, "UNKNOWN_FIELD", "max_completion_tokens"),
]


@pytest.mark.parametrize(("body", "reason", "param"), BODIES, ids=lambda v: repr(v)[:40])
def test_bad_documents(body: bytes, reason: str, param: str | None) -> None:
    """What is not one JSON object in UTF-8 is refused as such."""
    with pytest.raises(CaravanError) as caught:
        parse_chat(body)
    assert (caught.value.reason, caught.value.param) == (reason, param)


@pytest.mark.parametrize(("fields", "reason", "param"), CHATS, ids=lambda v: repr(v)[:60])
def test_bad_chats(fields: dict[str, Any], reason: str, param: str) -> None:
    """Each mistake names its field by the path in the body."""
    with pytest.raises(CaravanError) as caught:
        _chat(**fields)
    assert (caught.value.reason, caught.value.param) == (reason, param)
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(("fields", "reason", "param"), COMPLETIONS, ids=lambda v: repr(v)[:60])
def test_bad_completions(fields: dict[str, Any], reason: str, param: str) -> None:
    """The same for completions."""
    with pytest.raises(CaravanError) as caught:
        _completion(**fields)
    assert (caught.value.reason, caught.value.param) == (reason, param)
