"""Images in messages, by the same rules in both public APIs. Pure: nothing is fetched here, nor anywhere in Caravan.

An address goes to the provider as it is. To fetch what a client names would let it reach what this machine can reach.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final
from urllib.parse import urlsplit

from caravan.core.v1 import chat_pb2

from services.gateway.rules import invalid
from services.runtime.errors import CaravanError

PARTS_MAX: Final = 256
URL_BYTES_MAX: Final = 8 * 1024
MEDIA_TYPES: Final = ("image/png", "image/jpeg", "image/gif", "image/webp")

_DATA: Final = re.compile(r"data:", re.IGNORECASE)
_DATA_HEAD: Final = re.compile(r"data:([^;,]{1,64});base64,", re.IGNORECASE)
_NOT_IN_URLS: Final = re.compile(r"[\x00-\x20\x7f]")
_DETAILS: Final = {
    None: chat_pb2.Image.DETAIL_UNSPECIFIED,
    "auto": chat_pb2.Image.DETAIL_AUTO,
    "low": chat_pb2.Image.DETAIL_LOW,
    "high": chat_pb2.Image.DETAIL_HIGH,
}


def add_from_openai(url: str, detail: str | None, image: chat_pb2.Image, at: str) -> None:
    """Sets the image of an `image_url`, whose path is `at`: a data URL becomes its bytes. Raises INVALID_VALUE."""
    if detail not in _DETAILS:
        raise invalid(f"{at}.detail", "it is not one of auto, low, high.")
    image.detail = _DETAILS[detail]
    if not _DATA.match(url):
        _check_url(url, f"{at}.url")
        image.url = url
        return
    head = _DATA_HEAD.match(url)
    if head is None:
        raise invalid(f"{at}.url", "a data URL begins with data:<media type>;base64,")
    image.media_type = head[1].lower()
    try:
        image.data = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"{at}.url", "its data is not base64.") from None
    _check_data(image, f"{at}.url", f"{at}.url")


def check_parts(message: chat_pb2.ChatMessage, at: str) -> None:
    """Refuses parts of a typed message, whose path is `at`, that no engine takes. Raises CaravanError."""
    if not message.parts:
        return
    if message.role != chat_pb2.ROLE_USER:
        raise invalid(f"{at}.parts", "only the user's messages have parts.")
    if message.content:
        raise invalid(f"{at}.content", "it must be empty beside 'parts'.")
    check_count(len(message.parts), f"{at}.parts")
    for index, part in enumerate(message.parts):
        where = f"{at}.parts[{index}]"
        kind = part.WhichOneof("kind")
        if kind is None:
            raise _missing(f"{where}.kind")
        if kind == "image":
            _check_image(part.image, f"{where}.image")


def check_count(parts: int, param: str) -> None:
    """Refuses too many parts."""
    if parts > PARTS_MAX:
        raise invalid(param, f"at most {PARTS_MAX} parts are allowed.")


def _check_image(image: chat_pb2.Image, at: str) -> None:
    source = image.WhichOneof("source")
    if source is None:
        raise _missing(f"{at}.source")
    if image.detail not in chat_pb2.Image.Detail.values():
        raise invalid(f"{at}.detail", "it is not known.")
    if source == "data":
        _check_data(image, f"{at}.data", f"{at}.media_type")
        return
    _check_url(image.url, f"{at}.url")
    if image.media_type:
        raise invalid(f"{at}.media_type", "it is for 'data' only.")


def _check_data(image: chat_pb2.Image, data_at: str, type_at: str) -> None:
    if image.media_type not in MEDIA_TYPES:
        raise invalid(type_at, f"the media type must be one of {', '.join(MEDIA_TYPES)}.")
    if not image.data:
        raise invalid(data_at, "the image is empty.")


def _check_url(url: str, param: str) -> None:
    if len(url.encode()) > URL_BYTES_MAX:
        raise invalid(param, f"a URL has at most {URL_BYTES_MAX} bytes.")
    try:
        parsed = urlsplit(url)
        is_web = parsed.scheme in {"http", "https"} and bool(parsed.hostname)
    except ValueError:
        is_web = False
    if not is_web or _NOT_IN_URLS.search(url):
        raise invalid(param, "it is no http, https or data URL.")


def _missing(param: str) -> CaravanError:
    return CaravanError("MISSING_FIELD", f"Missing required parameter: '{param}'.", param=param)
