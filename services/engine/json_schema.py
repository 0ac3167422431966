"""JSON schema to GBNF. Pure.

Keywords that only describe are ignored, as JSON schema says. Keywords that restrict are followed or refused by name, never
ignored; the grammar may be narrower than the schema (properties keep their order, extra properties appear only where none
are named), so that every answer fits the schema.

A grammar that leaves many ways open at once makes llama.cpp slow without bound, so alternatives that start alike may
multiply to WAYS_MAX at most, and not within a recursion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from services.engine.gbnf import Rules, json_literal, literal, one_of
from services.engine.schema_reading import (
    STARTS,
    TYPES,
    SchemaError,
    UnsupportedSchemaError,
    check_alone,
    count_of,
    implied_type,
    is_harmless,
    is_of_type,
    resolve,
    start_of,
)

DEPTH_MAX: Final = 32
PARTS_MAX: Final = 2000
ENUM_MAX: Final = 1000
OPTIONAL_MAX: Final = 64
GRAMMAR_CHARACTERS_MAX: Final = 256 * 1024
WAYS_MAX: Final = 64
INTEGER_RANGE_MAX: Final = 1000
_REFUSED: Final = frozenset(
    "allOf not if then else dependentRequired dependentSchemas patternProperties propertyNames minProperties "  # noqa: SIM905
    "maxProperties uniqueItems contains minContains maxContains prefixItems unevaluatedItems unevaluatedProperties "
    "pattern multipleOf $dynamicRef $recursiveRef".split()
)
_FORMATS: Final = {"date": "date", "time": "time", "uuid": "uuid"}
_STARTS: Final = {
    "object": "{",
    "array": "[",
    "string": '"',
    "number": "0",
    "integer": "0",
    "nonnegative": "0",
    "positive": "0",
    "boolean": "tf",
    "null": "n",
}


class SchemaConverter:
    """Converts schemas that may refer to each other within one document."""

    def __init__(self, document: Any, rules: Rules) -> None:
        self._document = document
        self._rules = rules
        self._references: dict[str, str] = {}
        self._parts = 0
        # Of each rule: the characters that it may start with, the rules that it contains, and its alternatives.
        self._starts: dict[str, str] = dict(_STARTS)
        self._contains: dict[str, list[str]] = {}
        self._alternatives_of: dict[str, list[str]] = {}

    def rule(self, schema: Any, depth: int = 0) -> str:
        """The name of the rule for a schema. Raises SchemaError or UnsupportedSchemaError."""
        self._parts += 1
        if depth > DEPTH_MAX:
            raise UnsupportedSchemaError(f"a schema deeper than {DEPTH_MAX}")
        if self._parts > PARTS_MAX or self._rules.size > GRAMMAR_CHARACTERS_MAX:
            raise UnsupportedSchemaError("a schema of this size")
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            raise SchemaError(f"{json_literal(schema)[:80]} is not a schema that anything fits")
        for keyword in schema:
            if keyword in _REFUSED and not is_harmless(keyword, schema[keyword]):
                raise UnsupportedSchemaError(f"the keyword {keyword!r}")
        return self._kind(schema, depth)

    def check_ways(self) -> None:
        """Raises UnsupportedSchemaError where too many ways may be open at once."""
        groups = {name: [[rule] for rule in rules] for name, rules in self._contains.items()}
        for name, rules in self._alternatives_of.items():
            starts = {rule: self._starts_of(rule, set()) for rule in rules}
            # Ways add up among alternatives that start with the same character; others exclude each other.
            groups[name] = [[rule for rule in rules if first in starts[rule]] for first in STARTS]
        ways = dict.fromkeys(groups, 1)
        changed = True
        while changed:
            changed = False
            for name, together in groups.items():
                most = max((sum(ways.get(r, 1) for r in group) for group in together), default=1)
                if most > WAYS_MAX:
                    raise UnsupportedSchemaError("too many alternatives that start alike")
                if most > ways[name]:
                    ways[name], changed = most, True

    def _starts_of(self, rule: str, seen: set[str]) -> str:
        if rule in seen:
            return ""
        seen.add(rule)
        if rule in self._alternatives_of:
            return "".join(self._starts_of(way, seen) for way in self._alternatives_of[rule])
        return self._starts.get(rule, STARTS)

    def _leaf(self, body: str, starts: str, contains: list[str] | None = None) -> str:
        """A rule that starts with one of `starts`."""
        name = self._rules.add(body)
        self._starts[name] = starts
        self._contains[name] = contains or []
        return name

    def _kind(self, schema: Mapping[str, Any], depth: int) -> str:
        if "$ref" in schema:
            check_alone(schema, "$ref")
            return self._reference(schema["$ref"], depth)
        if "const" in schema:
            return self._values(schema, "const", [schema["const"]])
        if "enum" in schema:
            return self._values(schema, "enum", schema["enum"])
        for keyword in ("anyOf", "oneOf", "allOf"):
            if keyword in schema:
                check_alone(schema, keyword)
                return self._alternatives(schema[keyword], keyword, depth)
        kind = schema.get("type", implied_type(schema))
        if isinstance(kind, list):
            if not all(isinstance(one, str) for one in kind):
                raise SchemaError("type is not a list of names")
            variants = [{**schema, "type": one} for one in kind]
            return self._alternatives(variants, "type", depth)
        return self._typed(kind, schema, depth)

    def _typed(self, kind: Any, schema: Mapping[str, Any], depth: int) -> str:
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "string":
            return self._string(schema)
        if kind in ("number", "integer"):
            return self._number(kind, schema)
        if kind in ("boolean", "null"):
            return str(kind)
        if kind is None:
            return "value"
        raise SchemaError(f"type {json_literal(kind)[:80]} is not one of {', '.join(TYPES)}")

    def _reference(self, target: Any, depth: int) -> str:
        if not isinstance(target, str) or not target.startswith("#"):
            raise UnsupportedSchemaError("a $ref to another document")
        known = self._references.get(target)
        if known is not None:
            return known
        name = self._references[target] = self._rules.reserve()
        found = self.rule(resolve(self._document, target), depth + 1)
        self._rules.define(name, found)
        self._alternatives_of[name] = [found]
        self._check_progress(name, target)
        return name

    def _check_progress(self, name: str, target: str) -> None:
        """A rule that can become itself without a character in between has no end (left recursion)."""
        seen: set[str] = set()
        rest = list(self._alternatives_of[name])
        while rest:
            rule = rest.pop()
            if rule == name:
                raise SchemaError(f"$ref {target!r} refers to itself")
            if rule not in seen:
                seen.add(rule)
                rest.extend(self._alternatives_of.get(rule, ()))

    def _values(self, schema: Mapping[str, Any], keyword: str, values: Any) -> str:
        check_alone(schema, keyword, "type")
        if not isinstance(values, list) or not values:
            raise SchemaError("enum is not a list of values")
        if len(values) > ENUM_MAX:
            raise UnsupportedSchemaError(f"an enum of more than {ENUM_MAX} values")
        kinds = schema.get("type", list(TYPES))
        texts = [json_literal(value) for value in values if is_of_type(value, kinds)]
        if not texts:
            raise SchemaError(f"no value of {keyword} is of the type")
        return self._leaf(one_of(texts), "".join({start_of(text) for text in texts}))

    def _alternatives(self, schemas: Any, keyword: str, depth: int) -> str:
        if not isinstance(schemas, list) or not schemas:
            raise SchemaError(f"{keyword} is not a list of schemas")
        rules = list(dict.fromkeys(self.rule(schema, depth + 1) for schema in schemas))
        if len(rules) == 1:
            return rules[0]
        name = self._rules.add(" | ".join(rules))
        self._alternatives_of[name] = rules
        return name

    def _object(self, schema: Mapping[str, Any], depth: int) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise SchemaError("properties is not an object, or required is not a list")
        if not all(isinstance(name, str) for name in required):
            raise SchemaError("required is not a list of names")
        named = {**properties, **{name: True for name in required if name not in properties}}
        if not named:
            return self._map(schema.get("additionalProperties", True), depth)
        if len(named) - len(set(required)) > OPTIONAL_MAX:
            raise UnsupportedSchemaError(f"more than {OPTIONAL_MAX} optional properties")
        values = {name: self.rule(value, depth + 1) for name, value in named.items()}
        body = self._members(values, set(required))
        return self._leaf(f'"{{" ws {body} "}}"', "{", list(values.values()))

    def _members(self, values: dict[str, str], required: set[str]) -> str:
        """Properties in their order; the optional ones may be left out, each with its comma."""
        first, following = '""', "ws"
        for name, value in reversed(values.items()):
            member = f'{literal(json_literal(name))} ws ":" ws {value} {following}'
            later = f'ws "," ws {member}'
            if name in required:
                first, following = self._rules.add(member), self._rules.add(later)
            else:
                first = self._rules.add(f"{member} | {first}")
                following = self._rules.add(f"{later} | {following}")
        return first

    def _map(self, value_schema: Any, depth: int) -> str:
        if value_schema is False:
            return self._leaf('"{" ws "}"', "{")
        value = self.rule(value_schema, depth + 1)
        if value == "value":
            return "object"
        member = f'string ws ":" ws {value}'
        body = f'"{{" ws ({member} (ws "," ws {member})* ws)? "}}"'
        return self._leaf(body, "{", [value])

    def _array(self, schema: Mapping[str, Any], depth: int) -> str:
        least, most = count_of(schema, "minItems", 0), count_of(schema, "maxItems", None)
        item = self.rule(schema.get("items", True), depth + 1)
        if most is not None and most < (least or 0):
            raise SchemaError("maxItems is less than minItems")
        if most == 0:
            return self._leaf('"[" ws "]"', "[")
        more = f"{{{max(0, (least or 0) - 1)},{'' if most is None else most - 1}}}"
        items = f'{item} (ws "," ws {item}){more} ws'
        body = items if least else f"({items})?"
        return self._leaf(f'"[" ws {body} "]"', "[", [item])

    def _string(self, schema: Mapping[str, Any]) -> str:
        least, most = count_of(schema, "minLength", 0), count_of(schema, "maxLength", None)
        form = schema.get("format")
        if form == "date-time":
            return self._leaf(r'"\"" date "T" time "\""', '"')
        if isinstance(form, str) and form in _FORMATS:
            return self._leaf(rf'"\"" {_FORMATS[form]} "\""', '"')
        if not least and most is None:
            return "string"
        if most is not None and most < (least or 0):
            raise SchemaError("maxLength is less than minLength")
        upper = "" if most is None else most
        return self._leaf(rf'"\"" char{{{least},{upper}}} "\""', '"')

    def _number(self, kind: str, schema: Mapping[str, Any]) -> str:
        bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"} & set(schema)
        if not bounds:
            return kind
        for bound in bounds:
            if not isinstance(schema[bound], int | float) or isinstance(schema[bound], bool):
                raise SchemaError(f"{bound} is not a number")
            if not math.isfinite(schema[bound]):
                raise SchemaError(f"{bound} is not finite")
        if kind == "integer":
            return self._integer_range(schema)
        raise UnsupportedSchemaError("bounds of numbers that are not integers")

    def _integer_range(self, schema: Mapping[str, Any]) -> str:
        low, high = schema.get("minimum"), schema.get("maximum")
        if "exclusiveMinimum" in schema:
            low = max(int(schema["exclusiveMinimum"]) + 1, low if low is not None else -(1 << 62))
        if "exclusiveMaximum" in schema:
            high = min(int(schema["exclusiveMaximum"]) - 1, high if high is not None else 1 << 62)
        if high is None and low in {0, 1}:
            return "nonnegative" if low == 0 else "positive"
        if low is None or high is None or high - low > INTEGER_RANGE_MAX:
            raise UnsupportedSchemaError(
                f"an integer range other than 0.., 1.. or at most {INTEGER_RANGE_MAX} values"
            )
        values = [str(value) for value in range(int(low), int(high) + 1) if low <= value]
        if not values:
            raise SchemaError("maximum is less than minimum")
        return self._leaf(one_of(values), "0")
