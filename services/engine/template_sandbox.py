"""A Jinja environment for templates that came with a model file: untrusted code, bounded in time, memory and output.

Jinja's sandbox keeps a template from reaching Python. It does not keep it from looping or from doubling a string thirty
times, so here every loop and macro body ticks, and everything that can make a large value is measured before it is made.
"""

# ruff: noqa: N802 - Jinja names the visit methods
from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, do_join, do_replace
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

VALUE_NODES_MAX: Final = 200_000
"""Most values inside one value, counted along every path, so that nested sharing cannot explode when it is printed."""
WIDTH_MAX: Final = 4096
_SIMPLE_FORMAT = re.compile(r"%[sdifr%]")
_TEXT_FILTERS: Final = frozenset(
    {
        "capitalize",
        "e",
        "escape",
        "forceescape",
        "lower",
        "safe",
        "string",
        "striptags",
        "title",
        "trim",
        "upper",
        "wordcount",
    }
)
_REMOVED_FILTERS: Final = frozenset(
    {"center", "filesizeformat", "format", "pprint", "random", "urlize", "wordwrap", "xmlattr"}
)
_REMOVED_METHODS: Final = frozenset({"expandtabs", "translate"})
_PADDING_METHODS: Final = frozenset({"center", "ljust", "rjust", "zfill"})


class TemplateLimitError(Exception):
    """The template passed a limit or did what is not allowed; the message says which."""


class Budget:
    """What one rendering may use: seconds on `now`, and characters of text that it makes."""

    def __init__(self, now: Callable[[], float], seconds: float, characters: int) -> None:
        self._now = now
        self._deadline = now() + seconds
        self._seconds = seconds
        self._left = characters
        self.characters = characters

    def spend(self, characters: int) -> None:
        """Counts text; raises TemplateLimitError beyond a limit."""
        self._left -= characters
        if self._left < 0:
            raise TemplateLimitError(f"it makes more than {self.characters} characters of text")
        if self._now() > self._deadline:
            raise TemplateLimitError(f"it runs longer than {self._seconds:g} s")


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`: a training mark that means nothing here."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body, as if the block were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Renders within `budget(...)` only; one rendering at a time per thread."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, GenerationBlock],
            finalize=self._finalize,
        )
        self._local = threading.local()
        self.globals.pop("lipsum", None)
        self.globals["dict"] = lambda *args, **kwargs: self.measured(dict(*args, **kwargs))
        for name in _REMOVED_FILTERS:
            self.filters.pop(name, None)
        for name in _TEXT_FILTERS:
            self.filters[name] = self._measure_first(self.filters[name])
        self.filters["join"] = self._join_filter
        self.filters["replace"] = self._replace_filter
        self.filters["indent"] = self._indent_filter

    @property
    def budget(self) -> Budget:
        """The budget of the rendering that runs on this thread."""
        found: Budget = self._local.budget
        return found

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self._local.budget = budget

    # What the compiled template calls.

    def tick(self, characters: int) -> None:
        """A loop or macro body begins; `characters` of the template's own text may come out of it."""
        self.budget.spend(characters)

    def measured(self, value: object) -> Any:
        """`value`, if it is not too large."""
        self._size(value)
        return value

    def concatenated(self, *parts: object) -> str:
        """The `~` operator."""
        self.budget.spend(sum(self._size(part) for part in parts))
        return "".join(str(part) for part in parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`*`, `**`, `%` and `+`, where the result is not too large."""
        if operator == "**":
            self._check_power(left, right)
        elif operator == "*":
            self._check_product(left, right)
        elif operator == "%" and isinstance(left, str):
            if "%" in _SIMPLE_FORMAT.sub("", left):
                raise TemplateLimitError("it formats with widths")
            self.budget.spend(len(left) + self._size(right))
        elif operator == "+" and not isinstance(left, int | float):
            self.budget.spend(self._size(left) + self._size(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls, except for string methods that can make large strings."""
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            self._check_string_method(owner, obj.__name__, args, kwargs)
        self.budget.spend(0)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja hides str.format behind a function of its own; a width in a format can make a string of any size."""
        if super().wrap_str_format(value) is not None:
            raise TemplateLimitError("it uses str.format")
        return None

    def _check_string_method(
        self, owner: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        if name in _REMOVED_METHODS:
            raise TemplateLimitError(f"it uses str.{name}")
        if name in _PADDING_METHODS:
            _check_width(args[0] if args else None)
        elif name == "replace" and len(args) >= 2:
            self._check_replace(owner, args[0], args[1])
        elif name == "join" and args:
            self._check_join(owner, args[0])
        else:
            self.budget.spend(len(owner))

    def _check_power(self, left: Any, right: Any) -> None:
        if isinstance(left, str) or abs(right) > 64 or abs(left) > 1 << 32:
            raise TemplateLimitError("it computes too large a power")

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and not isinstance(right, int | float):
            left, right = right, left
        if isinstance(left, int | float):
            if max(abs(left), abs(right)) > 1 << 64:
                raise TemplateLimitError("it computes with too large numbers")
            return
        count = max(0, right) if isinstance(right, int) else 0
        self.budget.spend(self._size(left) * count)
        if not isinstance(left, str) and len(left) * count > VALUE_NODES_MAX:
            raise TemplateLimitError("it makes too large a list")

    def _check_replace(self, text: Any, old: Any, new: Any) -> None:
        source, found, put = str(text), str(old), str(new)
        times = source.count(found)
        self.budget.spend(len(source) + times * len(put))

    def _check_join(self, separator: str, values: Any) -> None:
        if isinstance(values, list | tuple | dict):
            self.budget.spend(self._size(values) + len(separator) * len(values))

    def _finalize(self, value: object) -> object:
        self.budget.spend(len(value) if isinstance(value, str) else self._size(value))
        return value

    # Filters.

    def _measure_first(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def measuring(value: object, *args: Any, **kwargs: Any) -> Any:
            self.budget.spend(self._size(value))
            return original(value, *args, **kwargs)

        return measuring

    def _join_filter(self, value: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
        values = list(value)
        self._check_join(str(d), values)
        return do_join(nodes.EvalContext(self), values, str(d), attribute)

    def _replace_filter(self, s: str, old: str, new: str, count: int | None = None) -> Any:
        self._size(s)
        self._check_replace(s, old, new)
        return do_replace(nodes.EvalContext(self), str(s), str(old), str(new), count)

    def _indent_filter(
        self, s: str, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> Any:
        self._size(s)
        size = width if isinstance(width, int) else len(width)
        _check_width(size)
        self.budget.spend(len(str(s)) + size * (str(s).count("\n") + 1))
        return do_indent(str(s), width, first, blank)

    def _size(self, value: object) -> int:
        """Characters that `value` would print, roughly; at most VALUE_NODES_MAX values are visited."""
        if isinstance(value, str):
            return len(value)
        characters, visited, rest = 0, 0, [value]
        while rest:
            item = rest.pop()
            visited += 1
            if visited > VALUE_NODES_MAX:
                raise TemplateLimitError("it makes too large a value")
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, Mapping):
                rest.extend(item.keys())
                rest.extend(item.values())
            elif isinstance(item, list | tuple | set | frozenset):
                rest.extend(item)
            else:
                characters += 20
            if characters > self.budget.characters:
                raise TemplateLimitError("it makes too long a text")
        return characters + 4 * visited

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        guarded: nodes.Template = _Guards().visit(tree)
        return guarded


def _check_width(width: Any) -> None:
    if not isinstance(width, int) or width > WIDTH_MAX:
        raise TemplateLimitError("it pads text too widely")


class _Guards(NodeTransformer):
    """Puts the calls of TemplateSandbox into a template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", node.nodes, node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._measured(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._measured(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        # A tuple that is stored to, as in `for a, b in x`, is no value.
        return self._measured(node) if node.ctx == "load" else node

    def _measured(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _call("measured", [node], node.lineno)

    def _ticking(self, node: Any) -> nodes.Node:
        own_text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        tick = _call("tick", [nodes.Const(own_text, lineno=node.lineno)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node  # type: ignore[no-any-return]


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    target = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(target, arguments, [], None, None, lineno=line)
