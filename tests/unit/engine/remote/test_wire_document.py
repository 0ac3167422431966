"""What docs/PROVIDERS.md says of each provider is what its wire does."""

from __future__ import annotations

from pathlib import Path

import pytest
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.remote.provider import Provider
from services.runtime.errors import CaravanError
from tests.support.wires import chat, sampling, system, user, wire_of

DOCUMENT = Path(__file__).resolve().parents[4] / "docs" / "PROVIDERS.md"
COLUMNS = (
    (Provider.OPENAI,),
    (Provider.ANTHROPIC,),
    (Provider.GEMINI,),
    (Provider.LITELLM, Provider.OPENAI_COMPATIBLE),
)
Stop = generation_pb2.StopConditions
Image = chat_pb2.Image
NAMED = chat_pb2.ToolChoice(mode=chat_pb2.ToolChoice.MODE_NAMED, name="look")


def _image(detail: Image.Detail.ValueType = Image.DETAIL_UNSPECIFIED) -> pb.GenerateRequest:
    part = chat_pb2.ContentPart(image=Image(url="https://e.org/a.png", detail=detail))
    return chat(user("", parts=[part]))


def _schema(text: str) -> pb.GenerateRequest:
    return chat(sampling=sampling(grammar=generation_pb2.Grammar(json_schema=text)))


BIAS = [generation_pb2.LogitBias(token_id=1, bias=1)]
PROBES: dict[str, list[pb.GenerateRequest]] = {
    "`messages`": [chat(system("x"), user())],
    "instructions behind the first other message": [chat(user(), system("x"))],
    "`messages[].name`": [chat(user(name="ann"))],
    "images": [_image()],
    "`detail` of images, `low` or `high`": [
        _image(Image.DETAIL_LOW),
        _image(Image.DETAIL_HIGH),
    ],
    "`tools`, `tool_choice`": [chat(tools=["look"]), chat(tools=["look"], choice=NAMED)],
    "`response_format` with a schema": [_schema('{"type": "object"}')],
    "`response_format` `json_object`": [_schema("{}")],
    "`prompt` as text": [pb.GenerateRequest(text="x")],
    "`prompt` as tokens": [pb.GenerateRequest(tokens=pb.TokenPrompt(ids=[1]))],
    "`max_tokens`": [chat(stop=Stop(max_tokens=5))],
    "`stop`, up to 4": [chat(stop=Stop(stop=list("abcd")))],
    "`stop`, 5": [chat(stop=Stop(stop=list("abcde")))],
    "`stop`, 6 to 16": [chat(stop=Stop(stop=list("abcdef")))],
    "`temperature` up to 1, `top_p`": [chat(sampling=sampling(temperature=1, top_p=0.5))],
    "`temperature` above 1": [chat(sampling=sampling(temperature=1.5))],
    "`top_k`": [chat(sampling=sampling(top_k=5))],
    "`min_p`, `repeat_penalty`, `ignore_eos`": [
        chat(sampling=sampling(min_p=0.5)),
        chat(sampling=sampling(repeat_penalty=1.5)),
        chat(stop=Stop(ignore_eos=True)),
    ],
    "`presence_penalty`, `frequency_penalty`": [
        chat(sampling=sampling(presence_penalty=1)),
        chat(sampling=sampling(frequency_penalty=1)),
    ],
    "`seed`": [chat(sampling=sampling(seed=1))],
    "`logit_bias`": [chat(sampling=sampling(logit_bias=BIAS))],
    "log probabilities": [chat(top_logprobs=0), chat(top_logprobs=5)],
}


def _rows() -> dict[str, list[str]]:
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row[1:] for row in cells}


def test_every_row_is_probed() -> None:
    """No claim without a test, and no test of something else."""
    assert list(_rows()) == list(PROBES)


@pytest.mark.parametrize("field", PROBES)
def test_the_table_is_true(field: str) -> None:
    """What it allows is translated, and what it denies is refused as unsupported."""
    for column, claim in zip(COLUMNS, _rows()[field], strict=True):
        for provider in column:
            for generate in PROBES[field]:
                assert _is_supported(provider, generate) == (claim == "yes"), provider


def _is_supported(provider: Provider, generate: pb.GenerateRequest) -> bool:
    try:
        wire_of(provider).request(generate, "m")
    except CaravanError as error:
        if error.reason != "UNSUPPORTED_FIELD":
            raise
        return False
    return True
