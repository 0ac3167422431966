"""GBNF, the grammar language of llama.cpp: rules of JSON, literals, and a text that grows rule by rule. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

# White space between JSON tokens is bounded: a model that loves spaces must come to the point.
JSON_RULES: Final[Mapping[str, str]] = {
    "ws": r'("\n" [ ]{0,16} | " ")?',
    "string": r'"\"" char* "\""',
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": r'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": r'"true" | "false"',
    "null": r'"null"',
    "member": r'string ws ":" ws value',
    "object": r'"{" ws (member (ws "," ws member)* ws)? "}"',
    "array": r'"[" ws (value (ws "," ws value)* ws)? "]"',
    "value": r"object | array | string | number | boolean | null",
    "date": r'[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [1-2] [0-9] | "3" [0-1])',
    "time": r'([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? '
    r'("Z" | [+-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])',
    "uuid": r'[0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12}',
    "nonnegative": r'"0" | [1-9] [0-9]{0,15}',
    "positive": r"[1-9] [0-9]{0,15}",
}
_ESCAPES: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Rules:
    """Named rules. Rules with equal bodies are one, so equal parts of a schema cost nothing."""

    def __init__(self) -> None:
        self._bodies: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self.size = 0

    def add(self, body: str) -> str:
        """The name of the rule with this body."""
        name = self._names.get(body)
        if name is None:
            name = self._names[body] = self.reserve()
            self.define(name, body)
        return name

    def reserve(self) -> str:
        """A name whose body comes later, for rules that refer to themselves."""
        name = f"r{len(self._bodies)}"
        self._bodies[name] = ""
        return name

    def define(self, name: str, body: str) -> None:
        """Gives a reserved name its body."""
        self._bodies[name] = body
        self.size += len(body)

    def grammar(self, root: str) -> str:
        """The whole grammar."""
        bodies = {"root": root, **JSON_RULES, **self._bodies}
        wanted, rest = ["root"], ["root"]
        while rest:
            for name in re.findall(r"[a-z][a-z0-9]*", _without_literals(bodies[rest.pop()])):
                if name in bodies and name not in wanted:
                    wanted.append(name)
                    rest.append(name)
        return "".join(f"{name} ::= {bodies[name]}\n" for name in wanted)


def _without_literals(body: str) -> str:
    return re.sub(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]', " ", body)


def literal(text: str) -> str:
    """A text that must stand there exactly."""
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    code = ord(character)
    return f"\\x{code:02X}" if code < 0x20 or code == 0x7F else character


def json_literal(value: Any) -> str:
    """The JSON text of a value, as models write it."""
    return json.dumps(value, ensure_ascii=False)


def one_of(texts: Iterable[str]) -> str:
    """One of some texts. Common beginnings are factored out: then the next character leaves one way open, and checking a
    token costs as much for a thousand texts as for one."""
    return _branches(sorted(set(texts)))


def _branches(texts: list[str]) -> str:
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[:1], []).append(text)
    ways = [_branch(group) for group in groups.values()]
    return ways[0] if len(ways) == 1 else f"({' | '.join(ways)})"


def _branch(group: list[str]) -> str:
    if len(group) == 1:
        return literal(group[0])
    shared = _common_prefix(group[0], group[-1])
    return f"{literal(shared)} {_branches([text[len(shared) :] for text in group])}"


def _common_prefix(first: str, last: str) -> str:
    """Of sorted texts, the common beginning of first and last is that of all."""
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return first[:length]
