"""Strict JSON into the shapes of openai_schema.py, every mistake named by its path. Pure.

A body is one JSON document in UTF-8. Of a key that stands twice in one object the last value counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn, TypeVar

import msgspec

from services.gateway.openai_fields import InertField, take_inert
from services.runtime.errors import CaravanError

T = TypeVar("T")

_PLACE: Final = re.compile(r" - at `(?:key` in `)?\$(.*)`$")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_OUT_OF_RANGE: Final = re.compile(r"(Number|Integer value) out of range")
_BAD_CHOICE: Final = re.compile(r"Invalid value (.*)", re.DOTALL)
_SHOWN_MAX: Final = 120


def parse(body: bytes, shape: type[T], fields: Mapping[str, InertField]) -> T:
    """The body as `shape`, or CaravanError: INVALID_JSON, WRONG_TYPE, MISSING_FIELD, UNKNOWN_FIELD, UNSUPPORTED_FIELD..."""
    tree = _document(body, shape)
    if not isinstance(tree, dict):
        raise CaravanError("WRONG_TYPE", "The body is not a JSON object.")
    try:
        return msgspec.convert(take_inert(tree, fields), shape)
    except msgspec.ValidationError as error:
        _refuse(str(error))
    except RecursionError:
        raise CaravanError("INVALID_JSON", "The body has too many levels.") from None


def _document(body: bytes, shape: type[object]) -> object:
    try:
        return msgspec.json.decode(body)
    except msgspec.ValidationError:
        # A number beyond every type. Decoding without a shape does not tell where; with one it does.
        try:
            msgspec.json.decode(body, type=shape)
        except msgspec.ValidationError as placed:
            error = placed
        raise CaravanError(
            "INVALID_VALUE", f"{_sentence(str(error))}.", **_param(_path(str(error)))
        ) from None
    except (ValueError, RecursionError) as error:
        raise CaravanError(
            "INVALID_JSON", f"The body is not one JSON document in UTF-8: {_short(str(error))}."
        ) from None


def _refuse(message: str) -> NoReturn:
    """Raises what a message of msgspec means."""
    path, sentence = _path(message), _sentence(message)
    if found := _UNKNOWN.match(sentence):
        param = _join(path, found[1])
        raise CaravanError("UNKNOWN_FIELD", f"Unknown parameter: '{_short(param)}'.", param=param)
    if found := _MISSING.match(sentence):
        param = _join(path, found[1])
        raise CaravanError("MISSING_FIELD", f"Missing required parameter: '{param}'.", param=param)
    if found := _BAD_CHOICE.match(sentence):
        raise CaravanError(
            "INVALID_VALUE", f"Invalid '{path}': {_short(found[1])} is not known.", **_param(path)
        )
    if _OUT_OF_RANGE.match(sentence):
        raise CaravanError("INVALID_VALUE", f"Invalid '{path}': {sentence}.", **_param(path))
    raise CaravanError("WRONG_TYPE", f"Invalid type for '{path}': {sentence}.", **_param(path))


def _path(message: str) -> str:
    found = _PLACE.search(message)
    # `[...]` stands for any key of an object; the object is named then.
    return found[1].lstrip(".").replace("[...]", "") if found else ""


def _sentence(message: str) -> str:
    return _short(_PLACE.sub("", message).rstrip("."))


def _short(text: str) -> str:
    """Errors travel as HTTP headers, so what a client sent is not repeated at any length."""
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."


def _join(path: str, name: str) -> str:
    return _short(f"{path}.{name}" if path else name)


def _param(path: str) -> dict[str, Any]:
    return {"param": path} if path else {}
