"""A small value that follows a JSON schema: what the scripted model answers where one is asked for. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

DEPTH_MAX: Final = 16
_LENGTH_MAX: Final = 64


class SchemaError(ValueError):
    """A JSON schema that makes no sense."""


def instance(schema: Mapping[str, Any], *, depth: int = DEPTH_MAX) -> Any:
    """A value for a schema of the parts that providers support: types, enum, const, anyOf, $ref within it, required properties.

    Deeper than `depth` it gives null: a schema may contain itself. Raises SchemaError for one that makes no sense.
    """
    try:
        return _value(schema, schema, depth)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SchemaError(f"no JSON schema: {error!r}") from error


def _value(schema: Any, root: Mapping[str, Any], depth: int) -> Any:
    if depth <= 0 or not isinstance(schema, dict):
        return None
    if isinstance(reference := schema.get("$ref"), str):
        return _value(_referred(reference, root), root, depth - 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for name in ("anyOf", "oneOf", "allOf"):
        if schema.get(name):
            return _value(schema[name][0], root, depth - 1)
    return _typed(schema, root, depth)


def _typed(schema: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> Any:
    kind = schema.get("type", "object")
    if isinstance(kind, list):
        kind = kind[0] if kind else "null"
    # Gemini writes the names of types in capitals.
    kind = str(kind).lower()
    if kind == "object":
        properties = schema.get("properties") or {}
        wanted = [name for name in schema.get("required", properties) if name in properties]
        return {name: _value(properties[name], root, depth - 1) for name in wanted}
    if kind == "array":
        count = min(max(int(schema.get("minItems", 1)), 0), _LENGTH_MAX)
        return [_value(schema.get("items", {}), root, depth - 1)] * count
    simple = {
        "string": "scripted".ljust(min(int(schema.get("minLength", 0)), _LENGTH_MAX), "."),
        "integer": int(schema.get("minimum", 1)),
        "number": float(schema.get("minimum", 1)),
        "boolean": True,
    }
    return simple.get(kind)


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for name in reference.removeprefix("#").strip("/").split("/"):
        if name:
            found = found.get(name) if isinstance(found, dict) else None
    return found
