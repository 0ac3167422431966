"""The model that ships, through the whole stack."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.stack import CHAT, DEMO, Stack

pytestmark = pytest.mark.e2e
PROMPTS = DEMO.with_name("stable_prompts.json")


def _stable() -> list[dict[str, Any]]:
    prompts = json.loads(PROMPTS.read_text())
    return [prompt for prompt in prompts if not prompt["tools"]][:24]


def _ask(stack: Stack, model: str, prompt: dict[str, Any]) -> tuple[str, int]:
    body = {"model": model, "messages": prompt["messages"], "temperature": 0, "max_tokens": 400}
    answer = httpx.post(stack.url + CHAT, json=body, timeout=50).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


def test_known_answers_come_in_a_crowd(stack: Stack, demo: str) -> None:
    """Greedy answers with a clear margin are the recorded ones, also when eight are computed at a time."""
    prompts = _stable()
    assert len(prompts) >= 8
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: _ask(stack, demo, prompt), prompts))
    wrong = [
        (prompt["messages"][-1]["content"], prompt["answer"], text)
        for prompt, (text, _) in zip(prompts, answers, strict=True)
        if text != prompt["answer"]
    ]
    assert not wrong


def test_a_tool_is_called(http: httpx.Client, demo: str) -> None:
    """A recorded tool call arrives as a tool call, with JSON for its arguments."""
    prompt = next(p for p in json.loads(PROMPTS.read_text()) if "<tool_call>" in p["answer"])
    body = {
        "model": demo,
        "messages": prompt["messages"],
        "tools": prompt["tools"],
        "temperature": 0,
        "max_tokens": 200,
    }
    choice = http.post(CHAT, json=body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    expected = json.loads(prompt["answer"].split("<tool_call>")[1].split("</tool_call>")[0])
    function = choice["message"]["tool_calls"][0]["function"]
    assert function["name"] == expected["name"]
    assert json.loads(function["arguments"]) == expected["arguments"]
