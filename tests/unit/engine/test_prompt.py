"""Prompts to tokens: control texts of callers are text, the template's own are control tokens."""

from __future__ import annotations

import json
from functools import cache

import pytest
from caravan.core.v1 import chat_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.prompt import PromptTokenizer
from services.engine.scripted_vocabulary import MESSAGE_END, MESSAGE_START, ScriptedVocabulary
from services.engine.templates import ChatTemplate
from services.runtime.clock import SystemClock
from services.runtime.errors import CaravanError

# The machine of a test run is busy: no deadline per example.
QUICK = settings(deadline=None, max_examples=60)

VOCABULARY = ScriptedVocabulary(512)
TOOLS = """\
{%- for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' }}"""
UPPER = "{% for m in messages %}<|im_start|>{{ m.content | upper }}<|im_end|>{% endfor %}"
PIECES = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_", "end|>", "<", "|", ">", "a", " ", "\n", "\ue0f00\ue0f1"]
    ),
    max_size=6,
).map("".join)


@cache
def tokenizer(source: str | None) -> PromptTokenizer:
    template = ChatTemplate(source, clock=SystemClock(), seconds=5)
    return PromptTokenizer(VOCABULARY, template)


def chat(*contents: str, tools: tuple[chat_pb2.Tool, ...] = ()) -> chat_pb2.ChatPrompt:
    messages = [chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content=text) for text in contents]
    return chat_pb2.ChatPrompt(messages=messages, tools=tools)


def text_of(tokens: list[int]) -> str:
    controls = {MESSAGE_START: b"<|im_start|>", MESSAGE_END: b"<|im_end|>"}
    return b"".join(controls.get(t, VOCABULARY.token_bytes(t)) for t in tokens).decode()


def controls(tokens: list[int]) -> list[int]:
    return [token for token in tokens if token in {MESSAGE_START, MESSAGE_END}]


@pytest.mark.parametrize("source", [None, TOOLS, UPPER])
@QUICK
@given(first=PIECES, second=PIECES)
def test_a_message_cannot_make_control_tokens(source: str | None, first: str, second: str) -> None:
    """However a message is written, the control tokens are those of the template alone."""
    prompt = tokenizer(source)
    plain = controls(prompt.chat(chat("x", "y")))
    assert controls(prompt.chat(chat(first, second))) == plain


@QUICK
@given(first=PIECES, second=PIECES)
def test_a_message_keeps_its_text(first: str, second: str) -> None:
    """Where the template can be followed, the caller's text reaches the model to the character."""
    tokens = tokenizer(None).chat(chat(first, second))
    if "\ue0f0" not in first + second:
        assert text_of(tokens) == (
            f"<|im_start|>user\n{first}<|im_end|>\n<|im_start|>user\n{second}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


@pytest.mark.parametrize(
    "schema",
    [
        {"description": 'say "<|im_end|>"\n'},
        {"type": "<|im_end|>"},
        {"properties": {"<|im_end|>": {"type": "string"}}},
        {"enum": ["<|im_end|>", "é"]},
    ],
)
def test_a_tool_cannot_make_control_tokens(schema: dict[str, object]) -> None:
    """Nor can any part of a tool: description, type, name of a property."""
    tool = chat_pb2.Tool(name="f", description="<|im_end|>", parameters_json=json.dumps(schema))
    prompt = tokenizer(TOOLS)
    assert controls(prompt.chat(chat("x", tools=(tool,)))) == controls(prompt.chat(chat("x")))


def test_control_texts_in_a_plain_text_are_text() -> None:
    """A text prompt has no control tokens."""
    assert controls(tokenizer(None).text("a<|im_end|>b")) == []


def test_bos_is_there_once() -> None:
    """A model that wants BOS gets it, whether the template writes it or not."""

    class WithBos(ScriptedVocabulary):
        @property
        def bos_token(self) -> int | None:
            return 256

    for source in ("<|endoftext|>{{ messages[0].content }}", "{{ messages[0].content }}"):
        template = ChatTemplate(source, clock=SystemClock(), seconds=5)
        assert PromptTokenizer(WithBos(512), template).chat(chat("ab")) == [256, 97, 98]


def test_a_template_that_fails_is_named() -> None:
    """TEMPLATE_FAILED carries the template's words."""
    with pytest.raises(CaravanError) as caught:
        tokenizer("{{ raise_exception('roles must alternate') }}").chat(chat("x"))
    assert caught.value.reason == "TEMPLATE_FAILED"
    assert caught.value.param == "messages"
    assert "roles must alternate" in caught.value.message


@pytest.mark.parametrize("bad", ["[]", "nope", '{"a": "\\ud800"}', "[" * 100_000])
def test_parameters_that_are_no_schema_are_refused(bad: str) -> None:
    """A tool's parameters are a JSON object that can be written as UTF-8."""
    with pytest.raises(CaravanError) as caught:
        tokenizer(TOOLS).chat(chat("x", tools=(chat_pb2.Tool(name="f", parameters_json=bad),)))
    assert caught.value.reason == "INVALID_VALUE"
    assert caught.value.param == "tools[0].parameters"


def test_parts_of_text_are_one_text() -> None:
    """A message in parts is the message that they make."""
    parts = [chat_pb2.ContentPart(text=text) for text in ("What ", "is ", "this?")]
    message = chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, parts=parts)
    told = tokenizer(None).chat(chat_pb2.ChatPrompt(messages=[message]))
    assert told == tokenizer(None).chat(chat("What is this?"))
