"""A prompt to tokens: chat template, injection safety, BOS. Pure, slow for long prompts: runs on a worker thread.

The template's own control texts ("<|im_end|>") must become control tokens; the same characters inside a message must not,
or a message could end its own turn. Tokenizing template and messages apart would tear merges that the model was trained
with, so the rendered text is tokenized whole, except that it is cut inside each control text that came from the caller:
neither half is a control text. Where they came from is known by rendering once more with stand-ins (private-use characters)
for the caller's texts; this second rendering is needed only if a caller's text holds a control text, or a piece of one at
its edge. A template that changes the contents, so that the two renderings cannot be matched, gets the contents with a
zero-width space inside each control text instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from caravan.core.v1 import chat_pb2

from services.engine.backend import Vocabulary
from services.engine.templates import ChatTemplate, TemplateFailedError
from services.runtime.errors import CaravanError

_ROLES: Final = {
    chat_pb2.ROLE_SYSTEM: "system",
    chat_pb2.ROLE_USER: "user",
    chat_pb2.ROLE_ASSISTANT: "assistant",
    chat_pb2.ROLE_TOOL: "tool",
}
_ZERO_WIDTH_SPACE: Final = "\u200b"
_STAND_IN: Final = re.compile("\ue0f0([0-9]+)\ue0f1")
Messages = list[dict[str, Any]]


class PromptTokenizer:
    """Turns prompts into tokens for one model."""

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate) -> None:
        self._vocabulary = vocabulary
        self._template = template
        # Longest first, so that a text that begins with another is found whole.
        texts = sorted((text for text in vocabulary.control_texts if text), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._heads = {text[:end] for text in texts for end in range(1, len(text))}
        self._tails = {text[start:] for text in texts for start in range(1, len(text))}
        self._longest = max(map(len, texts), default=0)

    @property
    def knows_tools(self) -> bool:
        """Whether the model's template shows tools to the model."""
        return self._template.knows_tools

    def text(self, text: str) -> list[int]:
        """Tokens of a plain text, in which control texts are text; after BOS if the model wants it."""
        return self._with_bos(self._vocabulary.tokenize(text, parse_special=False))

    def chat(self, chat: chat_pb2.ChatPrompt) -> list[int]:
        """Tokens of a chat, ready for the assistant's answer. Raises TEMPLATE_FAILED or INVALID_VALUE."""
        messages = _messages(chat)
        tools = _tools(chat)
        rendered = self._render(messages, tools)
        cuts: list[int] = []
        if self._control is not None and self._suspicious(messages, tools):
            located = self._foreign_control_texts(messages, tools, rendered)
            if located is None:
                messages = _map_texts(messages, self._neutralize, keys=True)
                tools = _map_texts(tools, self._neutralize, keys=True)
                rendered = self._render(messages, tools)
            else:
                cuts = located
        tokens: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(rendered)], strict=True):
            tokens += self._vocabulary.tokenize(rendered[start:end], parse_special=True)
        return self._with_bos(tokens)

    def _with_bos(self, tokens: list[int]) -> list[int]:
        bos = self._vocabulary.bos_token
        # Templates of most models write BOS themselves; a second one harms the answer.
        return tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]

    def _render(self, messages: Messages, tools: Messages) -> str:
        try:
            return self._template.render(messages, tools)
        except TemplateFailedError as error:
            raise CaravanError(
                "TEMPLATE_FAILED", f"The chat template failed: {error}", param="messages"
            ) from error

    def _suspicious(self, messages: Messages, tools: Messages) -> bool:
        assert self._control is not None
        for text in _texts([messages, tools]):
            if self._control.search(text):
                return True
            edge = range(1, min(self._longest, len(text) + 1))
            if any(text[-n:] in self._heads or text[:n] in self._tails for n in edge):
                return True
        return False

    def _foreign_control_texts(
        self, messages: Messages, tools: Messages, rendered: str
    ) -> list[int] | None:
        """Places inside the control texts of `rendered` that are not the template's alone; None if that is not clear."""
        assert self._control is not None
        originals: list[str] = []

        def stand_in(text: str) -> str:
            originals.append(text)
            return f"\ue0f0{len(originals) - 1}\ue0f1"

        masked_messages = _map_texts(messages, stand_in)
        masked_tools = _map_texts(tools, stand_in)
        if any("\ue0f0" in text for text in originals):
            return None
        if any(self._control.search(key) for key in _keys([messages, tools])):
            return None
        try:
            skeleton = self._template.render(masked_messages, masked_tools)
        except TemplateFailedError:
            return None
        spans = _locate(skeleton, originals, rendered)
        if spans is None:
            return None
        return [
            match.start() + 1
            for match in self._control.finditer(rendered)
            if any(match.start() < end and start < match.end() for start, end in spans)
            and match.end() - match.start() > 1
        ]

    def _neutralize(self, text: str) -> str:
        assert self._control is not None
        safe = self._control.sub(lambda m: m[0][:1] + _ZERO_WIDTH_SPACE + m[0][1:], text)
        # At the edges a piece could become whole beside the template's text.
        edge = range(1, min(self._longest, len(safe) + 1))
        if any(safe[-n:] in self._heads for n in edge):
            safe += _ZERO_WIDTH_SPACE
        if any(safe[:n] in self._tails for n in edge):
            safe = _ZERO_WIDTH_SPACE + safe
        return safe


def _locate(skeleton: str, originals: Sequence[str], rendered: str) -> list[tuple[int, int]] | None:
    """Where the originals of the skeleton's stand-ins lie in `rendered`: as they are, stripped, or escaped for JSON."""
    pieces = _STAND_IN.split(skeleton)
    spans: list[tuple[int, int]] = []
    if not rendered.startswith(pieces[0]):
        return None
    place = len(pieces[0])
    for number, own in zip(pieces[1::2], pieces[2::2], strict=True):
        original = originals[int(number)]
        forms = (original, original.strip(), json.dumps(original, ensure_ascii=False)[1:-1])
        form = next((form for form in forms if rendered.startswith(form + own, place)), None)
        if form is None:
            return None
        spans.append((place, place + len(form)))
        place += len(form) + len(own)
    return spans if place == len(rendered) else None


# Words of ours that templates compare; no caller can put anything into them.
_FIXED: Final = frozenset({*_ROLES.values(), "function"})


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value not in _FIXED:
            yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


def _map_texts(value: Any, change: Callable[[str], str], *, keys: bool = False) -> Any:
    """A copy with the caller's texts changed; keys stay, unless told, since templates look them up."""
    if isinstance(value, str):
        return value if value in _FIXED or not value else change(value)
    if isinstance(value, dict):
        return {
            change(name) if keys else name: _map_texts(item, change, keys=keys)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_map_texts(item, change, keys=keys) for item in value]
    return value


def _messages(chat: chat_pb2.ChatPrompt) -> Messages:
    return [_message(message, index) for index, message in enumerate(chat.messages)]


def _message(message: chat_pb2.ChatMessage, index: int) -> dict[str, Any]:
    role = _ROLES.get(message.role)
    if role is None:
        raise CaravanError(
            "INVALID_VALUE", "A message needs a role.", param=f"messages[{index}].role"
        )
    shown: dict[str, Any] = {"role": role, "content": _content(message, f"messages[{index}]")}
    if message.name:
        shown["name"] = message.name
    if message.tool_call_id:
        shown["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments_json)},
            }
            for call in message.tool_calls
        ]
    return shown


def _content(message: chat_pb2.ChatMessage, at: str) -> str:
    """The text of a message. Raises UNSUPPORTED_FIELD for an image: llama.cpp gets tokens of text only."""
    if not message.parts:
        return message.content
    if message.content:
        raise CaravanError(
            "INVALID_VALUE", "A message has a content or parts, not both.", param=f"{at}.content"
        )
    for index, part in enumerate(message.parts):
        if part.WhichOneof("kind") != "text":
            raise CaravanError(
                "UNSUPPORTED_FIELD", "The model takes text only.", param=f"{at}.parts[{index}]"
            )
    return "".join(part.text for part in message.parts)


def _arguments(text: str) -> Any:
    """As an object, which templates print as JSON; what a model once wrote and is no object stays text."""
    value = _parse_object(text)
    return text if value is None else value


def _parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text is. Escaped halves of surrogate pairs cannot be tokenized and make it none."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            return None
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def _tools(chat: chat_pb2.ChatPrompt) -> Messages:
    if chat.tool_choice.mode == chat_pb2.ToolChoice.MODE_NONE:
        return []
    return [_tool(tool, index) for index, tool in enumerate(chat.tools)]


def _tool(tool: chat_pb2.Tool, index: int) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    function["parameters"] = tool_parameters(tool, index)
    return {"type": "function", "function": function}


def tool_parameters(tool: chat_pb2.Tool, index: int) -> Mapping[str, Any]:
    """The JSON schema of a tool's arguments. Raises INVALID_VALUE."""
    if not tool.parameters_json:
        return {"type": "object", "properties": {}}
    schema = _parse_object(tool.parameters_json)
    if schema is None:
        raise CaravanError(
            "INVALID_VALUE",
            f"The parameters of tool {tool.name!r} are not a JSON object.",
            param=f"tools[{index}].parameters",
        )
    return schema
