"""Requests that need a tool, the calls they lead to, and the answers from what tools return."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models.corpus.exchange import Exchange, Message, assistant, casual, user
from models.corpus.tables import ADJECTIVES, CITIES, NAMES, TOPICS, WORDS
from models.corpus.tools import Listed

CONDITIONS = ("sunny", "rainy", "cloudy", "windy", "foggy", "snowy")
DAYS = ("today", "tomorrow", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday",
        "Sunday")  # fmt: skip
ROOMS = ("kitchen", "garden", "bedroom", "bathroom", "office", "hall", "garage")


@dataclass(frozen=True)
class Request:
    """A question for one tool, with the arguments, what the tool returns and the answer."""

    question: str
    arguments: dict[str, Any]
    result: dict[str, Any]
    answer: str
    wording: int


def _phrase(rng: random.Random, phrases: tuple[str, ...]) -> tuple[int, str]:
    number = rng.randrange(len(phrases))
    return number, casual(rng, phrases[number])


def _weather(rng: random.Random, tool: Listed) -> Request:
    city, day = rng.choice(CITIES), rng.choice(DAYS)
    result = {"temperature": rng.randint(1, 35), "condition": rng.choice(CONDITIONS)}
    answer = f"It is {result['condition']} and {result['temperature']} degrees in {city}."
    if "day" in tool.arguments and rng.random() < 0.6:
        number, phrase = _phrase(rng, (
            "What is the weather in {c} on {d}?", "How is the weather in {c} {d}?",
            "Weather in {c} {d}?", "What will the weather be in {c} on {d}?"))  # fmt: skip
        phrase = phrase.replace("on {d}", "{d}") if day in ("today", "tomorrow") else phrase
        arguments = {"city": city, "day": day}
        return Request(phrase.format(c=city, d=day), arguments, result, answer, number + 10)
    number, phrase = _phrase(rng, (
        "What is the weather in {}?", "How is the weather in {}?", "Weather in {}?",
        "Tell me the weather in {}.", "What is the weather like in {}?", "Is it sunny in {}?",
        "How warm is it in {}?", "Please check the weather in {}.", "What's the weather in {}?"))  # fmt: skip
    return Request(phrase.format(city), {"city": city}, result, answer, number)


def _time(rng: random.Random, _tool: Listed) -> Request:
    city, time = rng.choice(CITIES), _clock(rng)
    number, phrase = _phrase(rng, (
        "What time is it in {}?", "What is the time in {}?", "Tell me the time in {}.",
        "Time in {}?", "How late is it in {}?", "What is the current time in {}?"))  # fmt: skip
    return Request(phrase.format(city), {"city": city}, {"time": time}, f"It is {time} in {city}.",
                   number)  # fmt: skip


def _clock(rng: random.Random) -> str:
    return f"{rng.randrange(24):02d}:{rng.randrange(0, 60, 5):02d}"


def _arithmetic(
    rng: random.Random, phrases: tuple[str, ...], compute: Callable[[int, int], int]
) -> Request:
    first, second = rng.randint(0, 99), rng.randint(0, 99)
    number, phrase = _phrase(rng, phrases)
    total = compute(first, second)
    return Request(phrase.format(a=first, b=second), {"a": first, "b": second}, {"result": total},
                   f"The result is {total}.", number)  # fmt: skip


def _add(rng: random.Random, _tool: Listed) -> Request:
    phrases = ("What is {a} plus {b}?", "What is {a} + {b}?", "Add {a} and {b}.", "{a} + {b}",
               "How much is {a} plus {b}?", "What is the sum of {a} and {b}?")  # fmt: skip
    return _arithmetic(rng, phrases, lambda first, second: first + second)


def _multiply(rng: random.Random, _tool: Listed) -> Request:
    phrases = ("What is {a} times {b}?", "What is {a} * {b}?", "Multiply {a} by {b}.",
               "{a} * {b}", "How much is {a} times {b}?", "Multiply {a} and {b}.")  # fmt: skip
    return _arithmetic(rng, phrases, lambda first, second: first * second)


def _search(rng: random.Random, _tool: Listed) -> Request:
    topic = rng.choice(TOPICS)
    if rng.random() < 0.3:
        topic = f"{rng.choice(ADJECTIVES)} {rng.choice(WORDS)}"
    number, phrase = _phrase(rng, (
        "Search for {}.", "Search the web for {}.", "Please search for {}.", "Find {} on the web.",
        "Look up {}.", "Search {}", "Look for {} on the web."))  # fmt: skip
    found = f"The {rng.choice(ADJECTIVES)} {rng.choice(WORDS)} of {rng.choice(NAMES)}"
    return Request(phrase.format(topic), {"query": topic}, {"title": found},
                   f"I found this: {found}.", number)  # fmt: skip


def _message(rng: random.Random, _tool: Listed) -> Request:
    name = rng.choice(NAMES)
    text = rng.choice((
        f"the {rng.choice(WORDS)} is {rng.choice(ADJECTIVES)}", f"meet me in {rng.choice(CITIES)}",
        f"bring the {rng.choice(WORDS)}", f"call {rng.choice(NAMES)}", "I am late", "dinner is ready",
        f"see you {rng.choice(DAYS)}", "hello", "good night"))  # fmt: skip
    number, phrase = _phrase(rng, (
        "Send a message to {n}: {t}", "Send {n} this message: {t}", "Message {n}: {t}",
        "Write to {n}: {t}", "Tell {n}: {t}", "Text {n}: {t}"))  # fmt: skip
    return Request(phrase.format(n=name, t=text), {"to": name, "text": text}, {"status": "sent"},
                   f"I sent the message to {name}.", number)  # fmt: skip


def _alarm(rng: random.Random, _tool: Listed) -> Request:
    time = _clock(rng)
    number, phrase = _phrase(rng, (
        "Set an alarm for {}.", "Wake me at {}.", "Set the alarm to {}.", "Alarm at {}.",
        "Please set an alarm at {}.", "Wake me up at {}."))  # fmt: skip
    return Request(phrase.format(time), {"time": time}, {"status": "ok"},
                   f"The alarm is set for {time}.", number)  # fmt: skip


def _price(rng: random.Random, _tool: Listed) -> Request:
    item, price = rng.choice(WORDS), rng.randint(1, 99)
    number, phrase = _phrase(rng, (
        "What is the price of a {}?", "How much is a {}?", "What does a {} cost?", "Price of a {}?",
        "How much does a {} cost?", "Tell me the price of a {}."))  # fmt: skip
    return Request(phrase.format(item), {"item": item}, {"price": price},
                   f"The price of a {item} is {price}.", number)  # fmt: skip


def _light(rng: random.Random, _tool: Listed) -> Request:
    room, state = rng.choice(ROOMS), rng.choice(("on", "off"))
    number, phrase = _phrase(rng, (
        "Turn {s} the light in the {r}.", "Turn the light in the {r} {s}.",
        "Switch {s} the light in the {r}.", "Light {s} in the {r}.",
        "Please turn {s} the light in the {r}."))  # fmt: skip
    return Request(phrase.format(s=state, r=room), {"room": room, "state": state}, {"status": "ok"},
                   f"The light in the {room} is {state}.", number)  # fmt: skip


_MAKERS: dict[str, Callable[[random.Random, Listed], Request]] = {
    "weather": _weather, "time": _time, "add": _add, "multiply": _multiply, "search": _search,
    "message": _message, "alarm": _alarm, "price": _price, "light": _light,
}  # fmt: skip


def _call(tool: Listed, request: Request, id_: str) -> dict[str, Any]:
    arguments = {tool.renamed.get(name, name): value for name, value in request.arguments.items()}
    function = {"name": tool.name, "arguments": arguments}
    return {"id": id_, "type": "function", "function": function}


def _returned(rng: random.Random, result: dict[str, Any], id_: str) -> Message:
    if rng.random() < 0.2:
        result = dict(reversed(result.items()))
    content = json.dumps(result)
    if len(result) == 1 and rng.random() < 0.15:
        content = str(next(iter(result.values())))
    return {"role": "tool", "tool_call_id": id_, "content": content}


def _key(tool: Listed, request: Request) -> str:
    return f"{tool.id}|{request.arguments}|{request.wording}"


def tool_call(rng: random.Random, listed: tuple[Listed, ...]) -> Exchange:
    """A request for one of the tools listed, answered by the call."""
    tool = rng.choice(listed)
    request = _MAKERS[tool.id](rng, tool)
    calls = [_call(tool, request, "call_1")]
    message: Message = {"role": "assistant", "content": None, "tool_calls": calls}
    key = _key(tool, request)
    return Exchange("tool call", key, (user(request.question), message))


def tool_answer(rng: random.Random, listed: tuple[Listed, ...]) -> Exchange:
    """The same, then what the tool returns, then the answer in words."""
    tool = rng.choice(listed)
    request = _MAKERS[tool.id](rng, tool)
    calls = [_call(tool, request, "call_1")]
    returned, answer = _returned(rng, request.result, "call_1"), request.answer
    if rng.random() < 0.08:
        reason = rng.choice(("not found", "timeout", "no access", "try again"))
        returned = {"role": "tool", "tool_call_id": "call_1", "content": f'{{"error": "{reason}"}}'}
        answer = f"The tool gave an error: {reason}."
    call: Message = {"role": "assistant", "content": None, "tool_calls": calls}
    messages = (user(request.question), call, returned, assistant(answer))
    return Exchange("answer from a tool", _key(tool, request), messages)


def parallel_calls(rng: random.Random, tool: Listed) -> Exchange:
    """The weather or the time in two cities: two calls in one message."""
    first, second = _MAKERS[tool.id](rng, tool), _MAKERS[tool.id](rng, tool)
    while first.arguments["city"] == second.arguments["city"] or "day" in {
        **first.arguments, **second.arguments
    }:  # fmt: skip
        first, second = _MAKERS[tool.id](rng, tool), _MAKERS[tool.id](rng, tool)
    subject = "weather" if tool.id == "weather" else "time"
    _, phrase = _phrase(rng, (
        "What is the {s} in {a} and in {b}?", "What is the {s} in {a} and {b}?",
        "Tell me the {s} in {a} and in {b}.", "Compare the {s} in {a} and {b}."))  # fmt: skip
    cities = first.arguments["city"], second.arguments["city"]
    question = phrase.format(s=subject, a=cities[0], b=cities[1])
    calls = [_call(tool, first, "call_1"), _call(tool, second, "call_2")]
    call: Message = {"role": "assistant", "content": None, "tool_calls": calls}
    messages = (
        user(question), call, _returned(rng, first.result, "call_1"),
        _returned(rng, second.result, "call_2"), assistant(f"{first.answer} {second.answer}"),
    )  # fmt: skip
    return Exchange("two tool calls", f"{subject}|{cities}", messages)
