"""What every provider's wire asks of a request before it is translated: shape, ranges, and fields that no provider has. Pure.

The gateway has checked all of it for its clients; an engine can be called by others. Fields are named as the other engines name
them, so that the gateway can rename them for its clients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.remote.provider import Provider
from services.runtime.errors import CaravanError

STOPS_MAX: Final = 16
STOP_BYTES_MAX: Final = 256
TOP_LOGPROBS_MAX: Final = 20
LOGIT_BIAS_MAX: Final = 1024
PARTS_MAX: Final = 256
URL_BYTES_MAX: Final = 8 * 1024
MEDIA_TYPES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
_ROLES: Final = frozenset(
    {chat_pb2.ROLE_SYSTEM, chat_pb2.ROLE_USER, chat_pb2.ROLE_ASSISTANT, chat_pb2.ROLE_TOOL}
)
_REQUIRING: Final = frozenset({chat_pb2.ToolChoice.MODE_REQUIRED, chat_pb2.ToolChoice.MODE_NAMED})


@dataclass(frozen=True, slots=True)
class _Number:
    """A number of core.v1.Sampling: its range, and the value that asks for nothing."""

    low: float
    high: float
    off: float | None
    above_low: bool = False


_NUMBERS: Final[Mapping[str, _Number]] = {
    "temperature": _Number(0, 2, None),
    "top_p": _Number(0, 1, 1, above_low=True),
    "top_k": _Number(0, 1_000_000, 0),
    "min_p": _Number(0, 1, 0),
    "presence_penalty": _Number(-2, 2, 0),
    "frequency_penalty": _Number(-2, 2, 0),
    "repeat_penalty": _Number(0, 2, 1, above_low=True),
}


def invalid(param: str, message: str) -> CaravanError:
    """The error for a value that no provider could take."""
    return CaravanError("INVALID_VALUE", message, param=param)


def unsupported(provider: Provider, param: str, message: str) -> CaravanError:
    """The error for what this provider cannot do. `message` goes on behind the provider's name."""
    return CaravanError("UNSUPPORTED_FIELD", f"{provider.title} {message}", param=param)


def check_request(generate: pb.GenerateRequest, provider: Provider) -> None:
    """Raises INVALID_VALUE for what makes no sense, and UNSUPPORTED_FIELD for an answer that is to go on.

    `cache` has no effect at a provider: it is a wish to an optimisation, and providers cache on their own.
    """
    if generate.HasField("resume"):
        raise unsupported(provider, "resume", "cannot go on with an answer of another engine.")
    kind = generate.WhichOneof("prompt")
    if kind == "chat":
        _check_chat(generate)
    elif not (generate.text if kind == "text" else generate.tokens.ids):
        raise invalid("prompt", "The prompt is empty.")
    _check_stop(generate.stop)
    if generate.top_logprobs > TOP_LOGPROBS_MAX:
        raise invalid("top_logprobs", f"top_logprobs must be at most {TOP_LOGPROBS_MAX}.")
    if generate.sampling.HasField("grammar") and not generate.sampling.grammar.WhichOneof("kind"):
        raise invalid("sampling.grammar", "The grammar has no kind.")


def sampling_numbers(
    sampling: generation_pb2.Sampling, names: Mapping[str, str], provider: Provider
) -> dict[str, float]:
    """The numbers of a request under the provider's names; those that ask for nothing are left out.

    `names` is from our names to the provider's. Raises INVALID_VALUE, and UNSUPPORTED_FIELD for one without a name.
    """
    found: dict[str, float] = {}
    for name, number in _NUMBERS.items():
        if not sampling.HasField(name):  # type: ignore[arg-type]
            continue
        value = getattr(sampling, name)
        above = value > number.low if number.above_low else value >= number.low
        if not (math.isfinite(value) and above and value <= number.high):
            interval = f"{'(' if number.above_low else '['}{number.low:g}, {number.high:g}]"
            raise invalid(f"sampling.{name}", f"{name} must be within {interval}; it is {value:g}.")
        if value == number.off:
            continue
        if name not in names:
            raise unsupported(provider, f"sampling.{name}", f"has no {name}.")
        # A float has about seven digits: what was 0.7 is to be 0.7 again.
        found[names[name]] = value if isinstance(value, int) else float(f"{value:.7g}")
    return found


def logit_bias(sampling: generation_pb2.Sampling) -> dict[str, float]:
    """The biases by token, as the OpenAI API writes them. Raises INVALID_VALUE."""
    if len(sampling.logit_bias) > LOGIT_BIAS_MAX:
        raise invalid("sampling.logit_bias", f"logit_bias has at most {LOGIT_BIAS_MAX} entries.")
    biases: dict[str, float] = {}
    for index, entry in enumerate(sampling.logit_bias):
        param = f"sampling.logit_bias[{index}]"
        if not -100 <= entry.bias <= 100:
            raise invalid(param, "The bias must be within [-100, 100].")
        if str(entry.token_id) in biases:
            raise invalid(param, f"Token {entry.token_id} is given twice.")
        biases[str(entry.token_id)] = float(f"{entry.bias:.7g}")
    return biases


def refuse_logit_bias(sampling: generation_pb2.Sampling, provider: Provider) -> None:
    """For providers that have none. Raises UNSUPPORTED_FIELD."""
    if sampling.logit_bias:
        raise unsupported(provider, "sampling.logit_bias", "has no bias of tokens.")


def asked_seed(generate: pb.GenerateRequest, provider: Provider, bits: int) -> int | None:
    """The seed that the client asked for. Raises UNSUPPORTED_FIELD beyond a signed number of `bits` bits.

    A seed that was drawn so that the answer can move is of no use here: answers of providers cannot move.
    """
    if generate.seed_drawn or not generate.sampling.HasField("seed"):
        return None
    if generate.sampling.seed >= 1 << (bits - 1):
        raise unsupported(provider, "sampling.seed", f"takes seeds below 2^{bits - 1} only.")
    return generate.sampling.seed


def check_stop_count(generate: pb.GenerateRequest, provider: Provider, most: int) -> None:
    """Raises UNSUPPORTED_FIELD for more stop texts than the provider takes."""
    if len(generate.stop.stop) > most:
        raise unsupported(provider, "stop", f"takes at most {most} stop texts.")


def _check_stop(conditions: generation_pb2.StopConditions) -> None:
    if len(conditions.stop) > STOPS_MAX:
        raise invalid("stop", f"There are at most {STOPS_MAX} stop texts.")
    for index, stop in enumerate(conditions.stop):
        if not 1 <= len(stop.encode()) <= STOP_BYTES_MAX:
            raise invalid(f"stop[{index}]", f"A stop text has 1 to {STOP_BYTES_MAX} bytes.")
    if conditions.HasField("max_tokens") and not 1 <= conditions.max_tokens < 1 << 31:
        raise invalid("stop.max_tokens", "max_tokens must be at least 1 and below 2^31.")


def _check_chat(generate: pb.GenerateRequest) -> None:
    chat = generate.chat
    if not chat.messages:
        raise invalid("messages", "A chat has at least one message.")
    for index, message in enumerate(chat.messages):
        _check_message(message, f"messages[{index}]")
    mode, name = chat.tool_choice.mode, chat.tool_choice.name
    if mode not in chat_pb2.ToolChoice.Mode.values():
        raise invalid("tool_choice", "There is no such choice of tools.")
    if mode in _REQUIRING:
        if not chat.tools:
            raise invalid("tool_choice", "The tool choice asks for a tool, and there are none.")
        if generate.sampling.HasField("grammar"):
            raise invalid(
                "sampling.grammar", "A grammar and a required tool call exclude each other."
            )
    if mode == chat_pb2.ToolChoice.MODE_NAMED:
        if name not in {tool.name for tool in chat.tools}:
            raise invalid("tool_choice", f"There is no tool {name!r}.")
    elif name:
        raise invalid("tool_choice", "Only a named tool choice has a name.")


def _check_message(message: chat_pb2.ChatMessage, at: str) -> None:
    if message.role not in _ROLES:
        raise invalid(f"{at}.role", "A message needs a role.")
    if message.tool_calls and message.role != chat_pb2.ROLE_ASSISTANT:
        raise invalid(f"{at}.tool_calls", "Only the assistant calls tools.")
    if message.tool_call_id and message.role != chat_pb2.ROLE_TOOL:
        raise invalid(f"{at}.tool_call_id", "Only the result of a tool is of a call.")
    _check_parts(message, f"{at}.parts")


def _check_parts(message: chat_pb2.ChatMessage, at: str) -> None:
    if not message.parts:
        return
    if message.role != chat_pb2.ROLE_USER:
        raise invalid(at, "Only messages of the user have parts.")
    if message.content:
        raise invalid(at, "A message has content or parts, not both.")
    if len(message.parts) > PARTS_MAX:
        raise invalid(at, f"A message has at most {PARTS_MAX} parts.")
    for index, part in enumerate(message.parts):
        kind = part.WhichOneof("kind")
        if kind is None:
            raise invalid(f"{at}[{index}]", "A part is a text or an image.")
        if kind == "image":
            _check_image(part.image, f"{at}[{index}].image")


def _check_image(image: chat_pb2.Image, at: str) -> None:
    if image.detail not in chat_pb2.Image.Detail.values():
        raise invalid(f"{at}.detail", "There is no such detail.")
    if image.WhichOneof("source") == "url":
        if not image.url.startswith(("https://", "http://")):
            raise invalid(f"{at}.url", "The URL of an image begins with https:// or http://.")
        if len(image.url.encode()) > URL_BYTES_MAX:
            raise invalid(f"{at}.url", f"The URL has at most {URL_BYTES_MAX} bytes.")
    elif not image.data:
        raise invalid(at, "An image has a URL or bytes.")
    elif image.media_type not in MEDIA_TYPES:
        known = ", ".join(sorted(MEDIA_TYPES))
        raise invalid(f"{at}.media_type", f"The media type is one of {known}.")


def split_system(
    chat: chat_pb2.ChatPrompt, provider: Provider
) -> tuple[str, Iterator[tuple[int, chat_pb2.ChatMessage]]]:
    """For providers whose instructions stand apart: their text, and the other messages with their places in the chat.

    Raises UNSUPPORTED_FIELD for instructions in the middle: elsewhere they would mean something else.
    """
    count = 0
    for message in chat.messages:
        if message.role != chat_pb2.ROLE_SYSTEM:
            break
        count += 1
    for index, message in enumerate(chat.messages):
        if index >= count and message.role == chat_pb2.ROLE_SYSTEM:
            raise unsupported(
                provider, f"messages[{index}].role", "takes instructions at the beginning only."
            )
        if message.name:
            raise unsupported(provider, f"messages[{index}].name", "knows no names of speakers.")
    system = "\n\n".join(message.content for message in chat.messages[:count])
    return system, ((count + place, m) for place, m in enumerate(chat.messages[count:]))
