"""Reading JSON schemas: what keywords mean, and the two ways in which a schema can be wrong. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

REPEAT_MAX: Final = 1000
STARTS: Final = '{["0tfn'
TYPES: Final = ("object", "array", "string", "number", "integer", "boolean", "null")
_IMPLYING: Final = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
}
_RESTRICTIONS: Final = frozenset(
    {"$ref", "const", "enum", "anyOf", "oneOf", "allOf", "type"}.union(*_IMPLYING.values())
)


class SchemaError(Exception):
    """The schema is no schema; the message says where."""


class UnsupportedSchemaError(Exception):
    """The schema asks for what is not supported; the message names it."""


def start_of(text: str) -> str:
    """The class of the first character of a JSON text: 0 stands for every number."""
    return text[0] if text[0] in STARTS else "0"


def is_harmless(keyword: str, value: Any) -> bool:
    """Whether a refused keyword restricts nothing, or is a list of one, which is that one."""
    if keyword == "allOf":
        return isinstance(value, list) and len(value) == 1
    return value is False and keyword in {"uniqueItems"}


def check_alone(schema: Mapping[str, Any], keyword: str, *also: str) -> None:
    """Refuses restrictions beside $ref, enum and alternatives: they would have to be intersected."""
    others = _RESTRICTIONS & set(schema) - {keyword, *also}
    if others:
        raise UnsupportedSchemaError(f"{keyword!r} beside {', '.join(sorted(others))}")


def is_of_type(value: Any, kinds: Any) -> bool:
    """Whether a value has the type, or one of the types, that `type` names."""
    names = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind in ("number", "integer") and not isinstance(value, bool):
            if isinstance(value, int) or (isinstance(value, float) and kind == "number"):
                return True
        elif isinstance(kind, str) and isinstance(value, names.get(kind, ())):
            return True
    return False


def implied_type(schema: Mapping[str, Any]) -> str | None:
    """The type that a schema without `type` speaks of."""
    for kind, keywords in _IMPLYING.items():
        if keywords & set(schema):
            return kind
    return None


def count_of(schema: Mapping[str, Any], keyword: str, default: int | None) -> int | None:
    """A keyword that counts, within REPEAT_MAX."""
    value = schema.get(keyword, default)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SchemaError(f"{keyword} is not a whole number from 0")
    if value > REPEAT_MAX:
        raise UnsupportedSchemaError(f"{keyword} above {REPEAT_MAX}")
    return value


def resolve(document: Any, target: str) -> Any:
    """The part of the document that a JSON pointer (RFC 6901) in a fragment names."""
    found = document
    for step in target.removeprefix("#").split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        else:
            raise SchemaError(f"$ref {target!r} leads nowhere")
    return found
