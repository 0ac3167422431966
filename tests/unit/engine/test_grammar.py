"""JSON schemas to grammars: what is followed, what is refused by name."""

from __future__ import annotations

import json

import pytest

from services.engine.grammar import json_grammar, tool_grammar
from services.runtime.errors import CaravanError


def reason(schema: object) -> str:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(CaravanError) as caught:
        json_grammar(text)
    assert caught.value.param == "sampling.grammar"
    return caught.value.reason


@pytest.mark.parametrize(
    "schema",
    [
        "nope",
        "[1]",
        "false",
        "[" * 50_000,
        '{"enum": ["\\ud800"]}',
        " " * 70_000,
        {"type": "foo"},
        {"type": {"a": 1}},
        {"enum": []},
        {"enum": "abc"},
        {"type": "string", "enum": [1, 2]},
        {"$ref": "#"},
        {"$ref": "#/a", "a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}},
        {"$ref": "#/a", "a": {"anyOf": [{"$ref": "#/a"}, {"type": "null"}]}},
        {"$ref": "#/nowhere"},
        {"properties": {"a": "b"}},
        {"required": [1]},
        {"type": "array", "minItems": 3, "maxItems": 2},
        {"type": "string", "minLength": -1},
        {"type": "integer", "minimum": "1"},
    ],
)
def test_what_is_no_schema_is_an_invalid_value(schema: object) -> None:
    """Broken schemas are the caller's mistake, and never an internal error."""
    assert reason(schema) == "INVALID_VALUE"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a*)*"},
        {"not": {}},
        {"$ref": "https://example.com/schema"},
        {"type": "string", "maxLength": 100_000},
        {"type": "number", "minimum": 0.5},
        {"type": "integer", "minimum": -5},
        {"anyOf": [{"type": "string"}], "type": "string"},
        {"enum": ["a"], "maxLength": 3},
        {"allOf": [{}, {}]},
        {"properties": {str(i): {} for i in range(100)}},
        {
            "anyOf": [
                {"type": "array", "items": {"$ref": "#"}},
                {"type": "array", "items": {"$ref": "#"}, "maxItems": 5},
            ]
        },
        json.loads('{"items":' * 40 + "{}" + "}" * 40),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(schema: object) -> None:
    """A restriction is never ignored, and a grammar that would be slow without bound is not made."""
    assert reason(schema) == "UNSUPPORTED_FIELD"


def test_nesting_alternatives_multiplies_their_ways() -> None:
    """Three levels of eight alternatives that start alike would leave 512 ways open."""

    def level(depth: int) -> dict[str, object]:
        inner = level(depth - 1) if depth else {"type": "string"}
        return {"anyOf": [{"type": "array", "items": inner, "maxItems": n} for n in range(1, 9)]}

    json_grammar(json.dumps(level(1)))
    assert reason(level(2)) == "UNSUPPORTED_FIELD"


def test_descriptions_cost_nothing() -> None:
    """Keywords that only describe do not change the grammar."""
    plain = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    told = {"title": "T", "description": "D", "$schema": "x", "default": 1, **plain}
    assert json_grammar(json.dumps(told)) == json_grammar(json.dumps(plain))


def test_an_enum_is_a_tree_of_its_beginnings() -> None:
    """Common beginnings are written once, so that the next character leaves one way open."""
    grammar = json_grammar(json.dumps({"enum": ["car", "cart", "dog"]}))
    assert '"\\"" ("car" ("\\"" | "t\\"") | "dog\\"")' in grammar


def test_a_grammar_for_tools_names_them() -> None:
    """One call, of one of the tools, with its arguments."""
    grammar = tool_grammar([("f", {"type": "object", "properties": {}}), ("g", {})])
    assert '"{\\"name\\": \\"f\\", \\"arguments\\": "' in grammar
    assert grammar.startswith('root ::= "<tool_call>" ws ')


def test_wrong_parameters_of_a_tool_are_named() -> None:
    """The parameter that is to blame is the tool's, not the grammar's."""
    with pytest.raises(CaravanError) as caught:
        tool_grammar([("f", {}), ("g", {"type": "string", "pattern": "a"})])
    assert (caught.value.reason, caught.value.param) == (
        "UNSUPPORTED_FIELD",
        "tools[1].parameters",
    )
