"""OpenAI bodies as requests; test_openai_mistakes.py has those that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from caravan.core.v1 import chat_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.openai_fields import CHAT_FIELDS, COMPLETION_FIELDS
from services.gateway.openai_request import parse_chat, parse_completion
from services.gateway.openai_schema import ChatCompletion, Completion
from services.gateway.requests import Api, InferenceRequest
from services.runtime.errors import CaravanError

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def _chat(**fields: Any) -> InferenceRequest:
    return parse_chat(json.dumps({"model": "demo", "messages": [USER], **fields}).encode())


def _completion(**fields: Any) -> InferenceRequest:
    return parse_completion(json.dumps({"model": "demo", "prompt": "hi", **fields}).encode())


@pytest.mark.parametrize("build", [_chat, _completion])
def test_what_is_not_streamed_is_read_as_a_whole(build: Callable[..., InferenceRequest]) -> None:
    """Engines may tell it in few pieces then."""
    assert build().generate.whole
    assert build(stream=False).generate.whole
    assert not build(stream=True).generate.whole


def test_everything_at_once() -> None:
    """Each accepted field arrives where the engine looks for it."""
    request = _chat(
        messages=[
            {"role": "developer", "content": "Be kind."},
            {
                "role": "system",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "user", "content": "hi", "name": "Ann"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [CALL],
                "refusal": None,
                "annotations": [],
            },
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ],
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "f"}},
        temperature=0.5,
        top_p=0.25,
        top_k=40,
        min_p=0.125,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        seed=-1,
        logit_bias={"42": -100},
        max_completion_tokens=7,
        stop=["a", "b"],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=3,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
    )
    assert (request.api, request.model) == (Api.CHAT, "demo")
    assert request.stream
    assert request.include_usage
    chat, sampling, stop = request.generate.chat, request.generate.sampling, request.generate.stop
    assert [m.role for m in chat.messages] == [
        chat_pb2.ROLE_SYSTEM,
        chat_pb2.ROLE_SYSTEM,
        chat_pb2.ROLE_USER,
        chat_pb2.ROLE_ASSISTANT,
        chat_pb2.ROLE_TOOL,
    ]
    assert [m.content for m in chat.messages] == ["Be kind.", "ab", "hi", "", "42"]
    assert chat.messages[2].name == "Ann"
    assert chat.messages[3].tool_calls[0].arguments_json == "{}"
    assert chat.messages[4].tool_call_id == "c1"
    assert chat.tools[0].parameters_json == '{"z":1,"a":2}', "the order of keys is kept"
    assert (chat.tool_choice.mode, chat.tool_choice.name) == (chat_pb2.ToolChoice.MODE_NAMED, "f")
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.25, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert (sampling.repeat_penalty, sampling.top_k, sampling.seed) == (1.5, 40, 2**64 - 1)
    assert [(b.token_id, b.bias) for b in sampling.logit_bias] == [(42, -100)]
    assert (stop.max_tokens, list(stop.stop), stop.ignore_eos) == (7, ["a", "b"], True)
    assert request.generate.top_logprobs == 3


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"content": None, "refusal": "No."}, "No."),
        ({"refusal": "No."}, "No."),
        ({"content": "Well. ", "refusal": "No."}, "Well. No."),
        ({"content": "Yes.", "refusal": None}, "Yes."),
        (
            {
                "content": [
                    {"type": "text", "text": "Well. "},
                    {"type": "refusal", "refusal": "No."},
                ]
            },
            "Well. No.",
        ),
    ],
)
def test_a_refusal_that_comes_back(fields: dict[str, Any], text: str) -> None:
    """A conversation goes on after a refusal: it is what the model said."""
    messages = [USER, {"role": "assistant", **fields}, USER]
    assert _chat(messages=messages).generate.chat.messages[1].content == text


def test_absent_and_null_leave_the_defaults_to_the_engine() -> None:
    """A field that is absent or null is not set: the contract of the engine gives its default."""
    names = set(ChatCompletion.__struct_fields__) - {"model", "messages"}
    for request in (_chat(), _chat(**dict.fromkeys(names), **dict.fromkeys(CHAT_FIELDS))):
        assert request.generate.sampling.ByteSize() == 0
        assert request.generate.stop.ByteSize() == 0
        assert not request.generate.HasField("top_logprobs")
        assert not request.stream
    names = set(Completion.__struct_fields__) - {"model", "prompt"}
    assert _completion(**dict.fromkeys(names)).generate.sampling.ByteSize() == 0


@pytest.mark.parametrize(
    ("given_prompt", "text", "ids"),
    [("a", "a", []), (["a"], "a", []), ([1, 2], "", [1, 2]), ([[1, 2]], "", [1, 2])],
)
def test_prompts(given_prompt: Any, text: str, ids: list[int]) -> None:
    """A prompt is a text or tokens, alone or as the only one of a list."""
    request = _completion(prompt=given_prompt, logprobs=5)
    assert request.generate.text == text
    assert list(request.generate.tokens.ids) == ids
    assert request.generate.top_logprobs == 5


@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "json_object"}, "{}"),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": True, "schema": {"b": 1, "a": 1}},
            },
            '{"b":1,"a":1}',
        ),
    ],
)
def test_formats(response_format: Any, schema: str) -> None:
    """A format becomes the grammar that the engine enforces."""
    assert _chat(response_format=response_format).generate.sampling.grammar.json_schema == schema
    assert not _chat(response_format={"type": "text"}).generate.sampling.HasField("grammar")


def test_harmless_fields_pass() -> None:
    """What changes no answer is accepted, and reaches nobody."""
    plain = _chat()
    harmless = _chat(
        user="u",
        n=1,
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        safety_identifier="s",
        prompt_cache_key="k",
        modalities=["text"],
    )
    assert harmless == plain
    assert _completion(best_of=1, echo=False, n=1, user="u") == _completion()


@pytest.mark.parametrize(
    ("module", "fields", "shape"),
    [
        ("openai.types.chat", CHAT_FIELDS, ChatCompletion),
        ("openai.types", COMPLETION_FIELDS, Completion),
    ],
)
def test_every_field_of_the_openai_client_is_known(module: str, fields: Any, shape: Any) -> None:
    """No parameter of the official client is an unknown field here: it works, is harmless, or is refused by name."""
    params = __import__(f"{module}.completion_create_params", fromlist=["x"])
    theirs = set(params.CompletionCreateParamsBase.__annotations__)
    assert len(theirs) > 10
    assert theirs <= set(fields) | set(shape.__struct_fields__)
    assert not set(fields) & set(shape.__struct_fields__)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
_NAMES = st.sampled_from(
    sorted({*ChatCompletion.__struct_fields__, *Completion.__struct_fields__, *CHAT_FIELDS})
)


def _only_errors_of_the_table(body: bytes) -> None:
    for parse in (parse_chat, parse_completion):
        try:
            parse(body)
        except CaravanError as error:
            # What travels as a header must fit into one.
            size = sum(len(str(value)) for value in error.trailing_metadata(openai=True))
        else:
            size = 0
        assert size < 8_000


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(body: bytes) -> None:
    """Whatever the bytes, the answer is a request or an error of the table."""
    _only_errors_of_the_table(body)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(_NAMES | st.text(max_size=8), _JSON, max_size=5), st.booleans())
def test_any_json(fields: dict[str, Any], whole: bool) -> None:
    """Whatever the values, the answer is a request or an error of the table."""
    base = {"model": "demo", "messages": [USER], "prompt": "hi"} if whole else {}
    base.pop("messages" if "prompt" in fields else "prompt", None)
    _only_errors_of_the_table(json.dumps({**base, **fields}).encode("utf-8", "surrogatepass"))
