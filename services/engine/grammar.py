"""Grammars that an answer must follow: JSON of a schema, and calls of tools. Pure; runs on worker threads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from services.engine.gbnf import Rules, json_literal, literal
from services.engine.json_schema import SchemaConverter
from services.engine.schema_reading import SchemaError, UnsupportedSchemaError
from services.engine.tool_calls import CLOSE, OPEN
from services.runtime.errors import CaravanError

SCHEMA_BYTES_MAX: Final = 64 * 1024


def json_grammar(schema_text: str) -> str:
    """GBNF of a JSON schema; "{}" admits every JSON object. Raises INVALID_VALUE or UNSUPPORTED_FIELD."""
    if len(schema_text.encode()) > SCHEMA_BYTES_MAX:
        raise CaravanError(
            "INVALID_VALUE",
            f"The JSON schema is longer than {SCHEMA_BYTES_MAX} bytes.",
            param="sampling.grammar",
        )
    rules = Rules()
    root = _guarded("sampling.grammar", lambda: _root(_parse(schema_text), rules))
    return rules.grammar(root)


def tool_grammar(tools: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """GBNF of one call of one of the tools, given by name and JSON schema of the arguments."""
    rules = Rules()
    calls = []
    for index, (name, parameters) in enumerate(tools):
        arguments = _guarded(f"tools[{index}].parameters", partial(_root, parameters, rules))
        head = f'{{"name": {json_literal(name)}, "arguments": '
        calls.append(f"{literal(head)} {arguments}")
    call = rules.add(" | ".join(calls))
    return rules.grammar(f"{literal(OPEN)} ws {call} {literal('}')} ws {literal(CLOSE)}")


def _parse(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError("it is not a JSON document") from error
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SchemaError("it has half a surrogate pair") from error
    return value


def _root(schema: Any, rules: Rules) -> str:
    if not isinstance(schema, dict):
        raise SchemaError("it is not an object")
    if not schema:
        return "object"
    converter = SchemaConverter(schema, rules)
    root = converter.rule(schema)
    converter.check_ways()
    return root


def _guarded(param: str, convert: Callable[[], str]) -> str:
    try:
        return convert()
    except SchemaError as error:
        raise CaravanError("INVALID_VALUE", f"The JSON schema: {error}.", param=param) from error
    except UnsupportedSchemaError as error:
        raise CaravanError(
            "UNSUPPORTED_FIELD", f"The JSON schema has {error}.", param=param
        ) from error
