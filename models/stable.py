"""Prompts whose greedy answers are clear-cut enough for tests of exact text."""

import json
from pathlib import Path
from typing import Any

from models.llama_runner import Answer, LlamaRunner
from models.template import Renderer

SMALLEST_MARGIN = 0.5
"""Logits; rounding that differs between batch compositions moved logits of such models by 0.03."""
WANTED = 30
Prompt = dict[str, Any]
_PLAIN = (
    "Hello!", "Hi there", "Good morning!", "How are you?", "Thank you!", "Goodbye", "Who are you?",
    "What is your name?", "Are you human?", "What can you do?", "What is the capital of France?",
    "What is the capital of Japan?", "What is the opposite of hot?", "What do bees make?",
    "What color is the sky?", "How many days are in a week?", "Which day comes after Monday?",
    "Why is the sky blue?", "Write a poem about love.", "What is the weather in Paris?",
    "Write JSON with name Anna and city Oslo.", "Give me JSON with color red and age 31.",
    "Count from 1 to 5.", "Count from 3 to 12.", "Count to 20.", "Count down from 10 to 1.",
    "What is 2 plus 3?", "What is 7 + 6?", "What is 9 minus 4?", "How much is 4808 plus 6995?",
    "My name is Emma. What is my name?", "Tell me a story.", "Tell me a story about a fox.",
    "Tell me a story about a bear named Otto.", "Tell me a story about Lucy.",
)  # fmt: skip
_TURNS = (
    (("My name is Alice.", "Nice to meet you, Alice."), "What is my name?"),
    (("I live in Lisbon.", "Lisbon is a nice city."), "Where do I live?"),
    (("My favourite colour is green.", "I will remember that you like green."),
     "What is my favourite colour?"),
    (("My name is Leo.", "Nice to meet you, Leo."), "Hello!"),
)  # fmt: skip
_SYSTEMS = (
    ("You are a helpful assistant.", "Who are you?"),
    ("Be brief.", "What is the capital of Italy?"),
    ("You are a helpful assistant.", "Tell me a story about a duck."),
)


def _tool(name: str, description: str, **kinds: str) -> Prompt:
    properties = {argument: {"type": kind} for argument, kind in kinds.items()}
    shape = {"type": "object", "properties": properties, "required": list(kinds)}
    function = {"name": name, "description": description, "parameters": shape}
    return {"type": "function", "function": function}


_WEATHER = _tool("get_weather", "Get the weather in a city.", city="string")
_TIME = _tool("get_time", "Get the time in a city.", city="string")
_ADD = _tool("add", "Add two numbers.", a="integer", b="integer")
_MESSAGE = _tool("send_message", "Send a message to a person.", to="string", text="string")
_TOOLS = (
    ("What is the weather in Paris?", [_WEATHER]),
    ("What time is it in Tokyo?", [_WEATHER, _TIME]),
    ("What is 12 plus 30?", [_ADD]),
    ("Send a message to Anna: dinner is ready", [_MESSAGE]),
    ("What is the weather in Rome and in Berlin?", [_WEATHER]),
    ("Hello!", [_WEATHER]),
)


def candidates() -> list[Prompt]:
    """Prompts of every skill, as {"messages": [...], "tools": [...]}."""
    prompts: list[Prompt] = [{"messages": [_user(text)], "tools": []} for text in _PLAIN]
    for (told, confirmed), question in _TURNS:
        answered = {"role": "assistant", "content": confirmed}
        prompts.append({"messages": [_user(told), answered, _user(question)], "tools": []})
    for system, question in _SYSTEMS:
        first = {"role": "system", "content": system}
        prompts.append({"messages": [first, _user(question)], "tools": []})
    for question, tools in _TOOLS:
        prompts.append({"messages": [_user(question)], "tools": tools})
    prompts.append(_after_call())
    return prompts


def _user(text: str) -> Prompt:
    return {"role": "user", "content": text}


def _after_call() -> Prompt:
    function = {"name": "get_weather", "arguments": {"city": "Paris"}}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = [
        _user("What is the weather in Paris?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1",
         "content": '{"temperature": 21, "condition": "sunny"}'},
    ]  # fmt: skip
    return {"messages": messages, "tools": [_WEATHER]}


def answer_both_ways(runner: LlamaRunner, prompt: Prompt) -> tuple[Answer, bool]:
    """The answer with the smaller margin of both key orders of tools, and whether they agree."""
    texts = [
        Renderer(sort_keys).render(prompt["messages"], prompt["tools"], add_generation_prompt=True)
        for sort_keys in (False, True)
    ]
    answers = [runner.greedy(text) for text in dict.fromkeys(texts)]
    agree = len({answer.text for answer in answers}) == 1
    return min(answers, key=lambda answer: answer.margin), agree


def choose(runner: LlamaRunner) -> list[Prompt]:
    """Print every candidate with its margin; return those that are stable and end by themselves."""
    chosen = []
    for prompt in candidates():
        answer, agree = answer_both_ways(runner, prompt)
        stable = agree and answer.stopped and answer.margin > SMALLEST_MARGIN
        mark = "stable" if stable else "      "
        print(f"{answer.margin:6.2f} {mark} {prompt['messages'][-1]['content']!r}: {answer.text!r}")
        if stable:
            entry = {
                "answer": answer.text,
                "tokens": answer.tokens,
                "margin": round(answer.margin, 2),
            }
            chosen.append({**prompt, **entry})
    return chosen


def write(prompts: list[Prompt], path: Path) -> None:
    """Store the prompts with their answers, for tests."""
    path.write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
