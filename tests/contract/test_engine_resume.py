"""An answer that one engine began goes on at another: the client sees what an undisturbed engine would have said."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from caravan.core.v1 import chat_pb2
from caravan.core.v1 import generation_pb2 as generation
from caravan.engine.v1 import engine_service_pb2 as pb

from tests.support.cache import running_cache
from tests.support.engine import DEMO_MODEL, Answer, EngineClient, running_engine

ROOT = Path(__file__).resolve().parents[2]
STABLE: list[dict[str, Any]] = json.loads((ROOT / "models/stable_prompts.json").read_text())
SINGLE = [case for case in STABLE if len(case["messages"]) == 1 and not case["tools"]]
SURE = [case for case in SINGLE if case["margin"] > 0.5 and len(case["answer"]) > 40]


def resumed(request: pb.GenerateRequest, tokens: list[int]) -> pb.GenerateRequest:
    """The same request with the tokens that are there."""
    again = pb.GenerateRequest()
    again.CopyFrom(request)
    again.resume.token_ids.extend(tokens)
    return again


async def goes_on(
    first: EngineClient, second: EngineClient, request: pb.GenerateRequest, cuts: int = 1000
) -> Answer:
    """Cuts the answer of the first engine after each delta, at most `cuts` times, and has the second one go on.

    Returns the undisturbed answer.
    """
    *parts, whole = await first.steps(request)
    assert parts
    for part in parts[:: max(1, len(parts) // cuts)]:
        rest = await second.run(resumed(request, part.tokens))
        assert part.tokens + rest.tokens == whole.tokens
        assert part.text + rest.text == whole.text
        assert part.calls + rest.calls == whole.calls
        assert rest.reason == whole.reason
        ours, theirs = rest.finished[0], whole.finished[0]
        assert ours.stop_text == theirs.stop_text
        assert ours.usage.prompt_tokens == theirs.usage.prompt_tokens
        assert ours.usage.completion_tokens == theirs.usage.completion_tokens
        assert rest.started[0].prompt_tokens == whole.started[0].prompt_tokens
        assert rest.cached <= ours.usage.prompt_tokens
    return whole


@pytest.fixture
async def pair() -> AsyncIterator[tuple[EngineClient, EngineClient]]:
    """Two engines with the demo model, which have nothing in common."""
    async with running_engine(DEMO_MODEL) as first, running_engine(DEMO_MODEL) as second:
        yield first, second


@pytest.mark.parametrize(
    ("script", "fields"),
    [
        ("tokens=12", {}),
        ("tokens=12", {"max_tokens": 7}),
        ("tokens=6", {"max_tokens": 20, "ignore_eos": True}),
        ("text=one two three", {"stop": ["two th"]}),
        ("text=one two", {"stop": ["two three", "x"]}),
        ("text=abcdef", {"stop": ["cdefg"], "max_tokens": 4}),
        ("text=Grüße, 世界 🐪!", {}),
        ("text=Grüße, 世界 🐪!", {"max_tokens": 11}),
        ("tokens=12", {"temperature": 1.0, "seed": 3, "presence_penalty": 1.5}),
    ],
)
async def test_every_cut_of_a_scripted_answer(script: str, fields: dict[str, Any]) -> None:
    """Ends by length, end token and stop text; held-back text and half characters come out once."""
    model = f"demo=scripted:?step_ms=1&{script}"
    async with running_engine(model) as first, running_engine(model) as second:
        await goes_on(first, second, first.request("hi", **fields))


async def test_an_answer_that_is_whole_is_only_finished() -> None:
    """Started and Finished with the right reason; nothing is decoded."""
    async with running_engine("demo=scripted:?tokens=5") as client:
        for fields, reason in (
            ({}, generation.FINISH_REASON_STOP),
            ({"max_tokens": 4}, generation.FINISH_REASON_LENGTH),
        ):
            request = client.request("hi", **fields)
            whole = await client.run(request)
            steps = client.metric("caravan_decode_step_seconds_count")
            again = await client.run(resumed(request, whole.tokens))
            assert (again.reason, again.tokens, again.text) == (reason, [], "")
            assert again.finished[0].usage.completion_tokens == len(whole.tokens)
            assert client.metric("caravan_decode_step_seconds_count") == steps
        assert client.engine._jobs == {}


async def test_what_cannot_be_resumed_is_refused_by_name() -> None:
    """Tokens outside the vocabulary, none, more than the answer may have, no seed."""
    async with running_engine("demo=scripted:?tokens=5&context=64") as client:
        whole = await client.ask("hi")
        bad: list[tuple[Callable[[pb.GenerateRequest], object], str]] = [
            (lambda request: request.resume.SetInParent(), "resume.token_ids"),
            (lambda request: request.resume.token_ids.extend([1, 512]), "resume.token_ids[1]"),
            (lambda request: request.resume.token_ids.extend([65] * 70), "resume.token_ids["),
            (
                lambda request: request.resume.token_ids.extend([*whole.tokens, 65]),
                "resume.token_ids[6]",
            ),
        ]
        for change, param in bad:
            request = client.request("hi")
            change(request)
            error = await client.refusal(request)
            assert error.reason == "INVALID_VALUE"
            assert (error.param or "").startswith(param)
        unseeded = resumed(client.request("hi", temperature=1), [65])
        error = await client.refusal(unseeded)
        assert (error.reason, error.param) == ("INVALID_VALUE", "sampling.seed")
        unseeded.sampling.top_k = 1
        assert (await client.run(unseeded)).tokens


async def test_log_probabilities_are_of_the_new_tokens_only() -> None:
    """One for each token that is sent."""
    async with running_engine("demo=scripted:?tokens=5") as client:
        request = client.request("hi")
        request.top_logprobs = 2
        whole = await client.run(request)
        rest = await client.run(resumed(request, whole.tokens[:2]))
        assert rest.logprobs == whole.logprobs[2:]


async def test_saved_blocks_of_prompt_and_answer_are_not_computed_again(tmp_path: Path) -> None:
    """The second engine finds what the first one saved behind the prompt too; usage counts the prompt's tokens only."""
    script = "demo=scripted:?tokens=700&context=2000"
    settings: dict[str, Any] = {"KV_ROOTS": f"disk:{tmp_path}:64MiB"}
    async with running_cache() as cache:
        settings["CACHE"] = cache.address
        async with (
            running_engine(script, ID="first", **settings) as first,
            running_engine(script, ID="second", **settings) as second,
        ):
            await first.until_joined()
            await second.until_joined()
            request = first.request("hi " * 100, max_tokens=600)
            whole = await first.run(request)
            await first.until_saved()
            rest = await second.run(resumed(request, whole.tokens[:500]))
            assert whole.tokens[500:] == rest.tokens
            assert second.metric("caravan_prompt_tokens_total") < 256
            assert rest.cached == rest.started[0].prompt_tokens < 500
            assert rest.hit == "EXACT"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.9, "seed": 7},
        {"temperature": 1.1, "seed": 8, "top_k": 40, "min_p": 0.02},
        {"temperature": 1.0, "seed": 9, "top_p": 0.9, "frequency_penalty": 0.7},
        {"repeat_penalty": 1.3, "presence_penalty": 0.5, "ignore_eos": True},
        {"stop": ["the ", "XYZ"], "ignore_eos": True},
    ],
)
async def test_the_demo_model_goes_on(
    pair: tuple[EngineClient, EngineClient], fields: dict[str, Any]
) -> None:
    """Greedy and seeded, with penalties and stops: the rest is what the first engine would have said."""
    first, second = pair
    for case in SURE[:2]:
        request = first.request(case["messages"][0]["content"], max_tokens=50, **fields)
        whole = await goes_on(first, second, request, cuts=8)
        if not fields:
            assert case["answer"].startswith(whole.text)


async def test_a_grammar_goes_on_where_it_was(pair: tuple[EngineClient, EngineClient]) -> None:
    """JSON that was cut anywhere is completed by the rules of its schema."""
    first, second = pair
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 10},
            "mood": {"enum": ["good", "bad", None]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["name", "mood", "tags"],
    }
    for seed, temperature in ((0, 0.0), (3, 0.8)):
        request = first.request("Give me JSON.", max_tokens=120, temperature=temperature, seed=seed)
        request.sampling.grammar.json_schema = json.dumps(schema)
        whole = await goes_on(first, second, request, cuts=12)
        if whole.reason == generation.FINISH_REASON_STOP:
            assert set(json.loads(whole.text)) == {"name", "mood", "tags"}
    # A token that the grammar cannot have allowed: llama.cpp would end the process.
    error = await second.refusal(resumed(request, first.tokenize("}}")))
    assert (error.reason, error.param) == ("INVALID_VALUE", "resume.token_ids[0]")
    assert (await second.ask("Hello!", max_tokens=3)).tokens


async def test_a_tool_call_of_the_demo_model_goes_on(
    pair: tuple[EngineClient, EngineClient],
) -> None:
    """Cut inside the call, its name, arguments and id are those of the undisturbed one."""
    first, second = pair
    case = next(case for case in STABLE if case["tools"])
    request = first.request(case["messages"][0]["content"], max_tokens=100)
    for tool in case["tools"]:
        function = tool["function"]
        request.chat.tools.add(
            name=function["name"],
            description=function["description"],
            parameters_json=json.dumps(function["parameters"]),
        )
    for mode in (chat_pb2.ToolChoice.MODE_AUTO, chat_pb2.ToolChoice.MODE_REQUIRED):
        request.chat.tool_choice.mode = mode
        whole = await goes_on(first, second, request, cuts=8)
        assert whole.calls
