"""Tokens of a request before, or without, the provider's own count: for limits, and for answers that were cut off. Pure."""

from __future__ import annotations

from typing import Final

from caravan.core.v1 import chat_pb2
from caravan.engine.v1 import engine_service_pb2 as pb

_CHARACTERS_PER_TOKEN: Final = 4
_MESSAGE_TOKENS: Final = 4
"""What a message costs beside its texts, about."""
_IMAGE_TOKENS: Final = 1000
"""Between 85 for a small one and 1,600; only the provider knows."""


def tokens_of_text(characters: int) -> int:
    """About as many tokens as a text of so many characters has; at least 1 where it has any."""
    return -(-characters // _CHARACTERS_PER_TOKEN)


def prompt_tokens(generate: pb.GenerateRequest) -> int:
    """About as many tokens as the prompt has."""
    kind = generate.WhichOneof("prompt")
    if kind == "text":
        return tokens_of_text(len(generate.text))
    if kind == "tokens":
        return len(generate.tokens.ids)
    chat = generate.chat
    tools = sum(
        len(tool.name) + len(tool.description) + len(tool.parameters_json) for tool in chat.tools
    )
    return tokens_of_text(tools) + sum(map(_message_tokens, chat.messages))


def expected_tokens(generate: pb.GenerateRequest, default_max_tokens: int, per_minute: int) -> int:
    """Tokens of the prompt and of the longest answer that the request allows: what a limit must hold for it.

    Not more than the limit allows in a minute, where there is one (0: none): a caller may ask for an answer as long as it likes, and
    all others would wait for days. What is really used beyond it counts when the answer has ended.
    """
    longest = prompt_tokens(generate) + (generate.stop.max_tokens or default_max_tokens)
    return min(longest, per_minute) if per_minute else longest


def _message_tokens(message: chat_pb2.ChatMessage) -> int:
    characters = len(message.content)
    images = 0
    for part in message.parts:
        characters += len(part.text)
        images += part.WhichOneof("kind") == "image"
    for call in message.tool_calls:
        characters += len(call.name) + len(call.arguments_json)
    return _MESSAGE_TOKENS + tokens_of_text(characters) + images * _IMAGE_TOKENS
