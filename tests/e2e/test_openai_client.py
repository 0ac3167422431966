"""The official Python client, unmodified."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.support.stack import Stack

pytestmark = pytest.mark.e2e
ASK: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    """The client, as the README shows it."""
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    """The list iterates, and one model can be retrieved."""
    assert {"fast", "slow"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("fast").object == "model"


def test_plain(client: openai.OpenAI) -> None:
    """An answer parses into the client's types, usage included."""
    answer = client.chat.completions.create(model="fast", messages=ASK, max_tokens=5)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream_helper(client: openai.OpenAI) -> None:
    """The client's own accumulator agrees with the final answer."""
    with client.chat.completions.stream(
        model="fast", messages=ASK, stream_options={"include_usage": True}
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == final.choices[0].message.content
    assert final.usage is not None


def test_completions(client: openai.OpenAI) -> None:
    """The older endpoint, whole and streamed."""
    whole = client.completions.create(model="fast", prompt="Once", max_tokens=8, temperature=0)
    parts = client.completions.create(
        model="fast", prompt="Once", max_tokens=8, temperature=0, stream=True
    )
    assert whole.choices[0].text == "".join(part.choices[0].text for part in parts)


async def test_async_client(stack: Stack) -> None:
    """The asynchronous client, streaming."""
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model="fast", messages=ASK, max_tokens=10, stream=True
        )
        text = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(text)


def test_unknown_model(client: openai.OpenAI) -> None:
    """A model that is not there is the client's NotFoundError, with its code."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert caught.value.code == "model_not_found"


def test_bad_value(client: openai.OpenAI) -> None:
    """A value out of range is the client's BadRequestError and names the field."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fast", messages=ASK, temperature=9)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")


def test_unknown_field(client: openai.OpenAI) -> None:
    """A field that does not exist is refused, not ignored."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fast", messages=ASK, extra_body={"tempo": 1})
    assert (caught.value.param, caught.value.code) == ("tempo", "unknown_parameter")


def test_capacity(stack: Stack, client: openai.OpenAI) -> None:
    """Beyond the capacity the client raises RateLimitError and knows when to come back."""
    more = {"ignore_eos": True}
    streams = [
        client.chat.completions.create(
            model="slow", messages=ASK, max_tokens=2000, stream=True, extra_body=more
        )
        for _ in range(8)
    ]
    try:
        for stream in streams:
            next(stream)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(
                model="slow", messages=ASK, extra_body={"caravan": {"max_wait": 0}}
            )
        assert caught.value.code == "capacity_exhausted"
        assert int(caught.value.response.headers["retry-after"]) >= 1
    finally:
        for stream in streams:
            stream.close()


def test_the_demo_model_says_hello(client: openai.OpenAI, demo: str) -> None:
    """The model that ships answers a greeting with a sentence and stops by itself."""
    answer = client.chat.completions.create(model=demo, messages=ASK, temperature=0, max_tokens=100)
    assert answer.choices[0].finish_reason == "stop"
    assert len((answer.choices[0].message.content or "").split()) >= 2
