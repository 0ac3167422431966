"""Images in messages: what is taken, and what is refused by the path of the field."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from caravan.core.v1 import chat_pb2
from caravan.inference.v1 import inference_service_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.images import MEDIA_TYPES, PARTS_MAX, URL_BYTES_MAX
from services.gateway.openai_request import parse_chat
from services.gateway.prefix_hashes import prefix_hashes
from services.gateway.typed_request import from_chat
from services.runtime.errors import CaravanError

PNG = "data:image/png;base64,iVBORw0KGgo="
WEB = "https://example.org/a.png?size=1#x"
AT = "messages[0].content[0].image_url"


def _image(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _openai(*parts: dict[str, Any], role: str = "user", **fields: Any) -> chat_pb2.ChatMessage:
    message = {"role": role, "content": list(parts), **fields}
    body = json.dumps({"model": "demo", "messages": [message]}).encode()
    return parse_chat(body).generate.chat.messages[0]


def _typed(message: chat_pb2.ChatMessage) -> chat_pb2.ChatMessage:
    prompt = chat_pb2.ChatPrompt(messages=[message])
    return from_chat(pb.ChatRequest(model="demo", prompt=prompt)).generate.chat.messages[0]


def test_parts_keep_their_order() -> None:
    """Texts and images reach the engine as they stand, the data of a URL as bytes."""
    message = _openai(_text("a"), _image(PNG, detail="low"), _image(WEB), _text("b"), name="Ann")
    assert message == chat_pb2.ChatMessage(
        role=chat_pb2.ROLE_USER,
        name="Ann",
        parts=[
            chat_pb2.ContentPart(text="a"),
            chat_pb2.ContentPart(
                image=chat_pb2.Image(
                    data=b"\x89PNG\r\n\x1a\n",
                    media_type="image/png",
                    detail=chat_pb2.Image.DETAIL_LOW,
                )
            ),
            chat_pb2.ContentPart(image=chat_pb2.Image(url=WEB)),
            chat_pb2.ContentPart(text="b"),
        ],
    )
    assert _typed(message) == message, "both APIs take the same"


def test_texts_alone_are_one_text() -> None:
    """Without an image a list is what it always was."""
    message = _openai(_text("a"), _text("b"))
    assert (message.content, len(message.parts)) == ("ab", 0)


@given(st.binary(min_size=1, max_size=200), st.sampled_from(MEDIA_TYPES), st.booleans())
def test_any_data_comes_back(data: bytes, media_type: str, upper: bool) -> None:
    """The bytes are those that were encoded; scheme and media type are words without case."""
    head = f"data:{media_type};base64,"
    url = (head.upper() if upper else head) + base64.b64encode(data).decode()
    image = _openai(_image(url)).parts[0].image
    assert (image.data, image.media_type) == (data, media_type)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "example.org/a.png",
        "//example.org/a.png",
        "ftp://example.org/a.png",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "http://",
        "http:///a.png",
        "https://[::1/a.png",
        "https://example.org/a b.png",
        "https://example.org/a\n.png",
        " https://example.org/a.png",
        "https://example.org/" + "é" * (URL_BYTES_MAX // 2),
        "data:",
        "data:image/png",
        "data:image/png,abc",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png;charset=utf-8;base64,YQ==",
        "data:image/png;base64,YQ",
        "data:image/png;base64,YQ=",
        "data:image/png;base64,Y Q==",
        "data:image/png;base64,YQ==YQ==",
        "data:image/png;base64,-_==",
        "data:image/png;base64,é",
        "data:image/jpg;base64,YQ==",
        "data:image/svg+xml;base64,YQ==",
        "data:text/plain;base64,YQ==",
        "data:;base64,YQ==",
    ],
)
def test_bad_urls(url: str) -> None:
    """Only addresses of the web, and strict base64 of the four types; the message does not repeat the image."""
    with pytest.raises(CaravanError) as caught:
        _openai(_image(url))
    assert (caught.value.reason, caught.value.param) == ("INVALID_VALUE", f"{AT}.url")
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("part", "reason", "param"),
    [
        ({"type": "image_url"}, "MISSING_FIELD", "messages[0].content[0].image_url"),
        ({"type": "image_url", "image_url": WEB}, "WRONG_TYPE", AT),
        ({"type": "image_url", "image_url": {}}, "MISSING_FIELD", f"{AT}.url"),
        (_image(WEB, detail="highest"), "INVALID_VALUE", f"{AT}.detail"),
        (_image(WEB, width=5), "UNKNOWN_FIELD", f"{AT}.width"),
    ],
)
def test_bad_parts(part: dict[str, Any], reason: str, param: str) -> None:
    """Each mistake names its field by the path in the body."""
    with pytest.raises(CaravanError) as caught:
        _openai(part)
    assert (caught.value.reason, caught.value.param) == (reason, param)


def test_only_the_user_shows_images() -> None:
    """The others' messages are text."""
    for role, fields in (("system", {}), ("assistant", {}), ("tool", {"tool_call_id": "c"})):
        with pytest.raises(CaravanError) as caught:
            _openai(_text("a"), _image(WEB), role=role, **fields)
        assert caught.value.reason == "UNSUPPORTED_FIELD"
        assert caught.value.param == "messages[0].content[1].type"


def test_parts_are_bounded() -> None:
    """As many as the contract says, and not one more (I4)."""
    assert len(_openai(*[_image(WEB)] * PARTS_MAX).parts) == PARTS_MAX
    with pytest.raises(CaravanError) as caught:
        _openai(*[_image(WEB)] * (PARTS_MAX + 1))
    assert caught.value.param == "messages[0].content"


def _part(**image: Any) -> dict[str, Any]:
    return {"parts": [chat_pb2.ContentPart(image=chat_pb2.Image(**image))]}


@pytest.mark.parametrize(
    ("fields", "reason", "param"),
    [
        ({"parts": [chat_pb2.ContentPart()]}, "MISSING_FIELD", "parts[0].kind"),
        (_part(), "MISSING_FIELD", "parts[0].image.source"),
        (_part(url="file:///etc/passwd"), "INVALID_VALUE", "parts[0].image.url"),
        (_part(url=PNG), "INVALID_VALUE", "parts[0].image.url"),
        (_part(url=WEB, media_type="image/png"), "INVALID_VALUE", "parts[0].image.media_type"),
        (_part(url=WEB, detail=9), "INVALID_VALUE", "parts[0].image.detail"),
        (_part(data=b"a"), "INVALID_VALUE", "parts[0].image.media_type"),
        (_part(data=b"a", media_type="image/tiff"), "INVALID_VALUE", "parts[0].image.media_type"),
        (_part(data=b"", media_type="image/png"), "INVALID_VALUE", "parts[0].image.data"),
        ({**_part(url=WEB), "content": "a"}, "INVALID_VALUE", "content"),
        ({**_part(url=WEB), "role": chat_pb2.ROLE_SYSTEM}, "INVALID_VALUE", "parts"),
        (
            {"parts": [chat_pb2.ContentPart(text="a")] * (PARTS_MAX + 1)},
            "INVALID_VALUE",
            "parts",
        ),
    ],
)
def test_typed_mistakes(fields: dict[str, Any], reason: str, param: str) -> None:
    """The typed API has the same rules."""
    with pytest.raises(CaravanError) as caught:
        _typed(chat_pb2.ChatMessage(**{"role": chat_pb2.ROLE_USER, **fields}))
    assert (caught.value.reason, caught.value.param) == (reason, f"prompt.messages[0].{param}")


def test_another_image_is_another_prompt() -> None:
    """Requests are routed by what they show, too."""

    def hashes(image: str) -> tuple[bytes, ...]:
        parts = [_text("What is this?"), _image(image)]
        body = {"model": "demo", "messages": [{"role": "user", "content": parts}]}
        return prefix_hashes("demo", parse_chat(json.dumps(body).encode()).generate)

    assert hashes(PNG) == hashes(PNG)
    assert hashes(PNG) != hashes(WEB)
