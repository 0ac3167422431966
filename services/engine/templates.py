"""The chat template of a model: messages and tools to the text that the model was trained on."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from jinja2 import TemplateError, meta
from jinja2.nodes import Template as TemplateTree

from services.engine.template_sandbox import Budget, TemplateLimitError, TemplateSandbox
from services.runtime.clock import Clock

OUTPUT_CHARACTERS_MAX: Final = 4 * 1024 * 1024
SOURCE_CHARACTERS_MAX: Final = 1024 * 1024
MESSAGE_CHARACTERS_MAX: Final = 500
# ChatML, for models that bring no template of their own.
CHATML: Final = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
Message = Mapping[str, Any]


class TemplateFailedError(Exception):
    """The template refused the messages or passed a limit; the message says why."""


class ChatTemplate:
    """A compiled template. Rendering may run on any thread, and never on the event loop: it takes up to `seconds`."""

    def __init__(
        self,
        source: str | None,
        *,
        clock: Clock,
        seconds: float,
        bos_text: str = "",
        eos_text: str = "",
    ) -> None:
        self.own = source is not None
        text = CHATML if source is None else source
        if len(text) > SOURCE_CHARACTERS_MAX:
            raise TemplateFailedError(f"it is longer than {SOURCE_CHARACTERS_MAX} characters")
        self._clock = clock
        self._seconds = seconds
        self._sandbox = _sandbox(clock)
        self._variables = {"bos_token": bos_text, "eos_token": eos_text}
        self._set_budget()
        try:
            tree: TemplateTree = self._sandbox.parse(text)
            self.knows_tools = "tools" in meta.find_undeclared_variables(tree)
            self._template = self._sandbox.from_string(text)
        except (TemplateError, TemplateLimitError, RecursionError) as error:
            raise TemplateFailedError(str(error)[:MESSAGE_CHARACTERS_MAX]) from error

    def render(self, messages: Sequence[Message], tools: Sequence[Message]) -> str:
        """The prompt, ready for the answer of the assistant. Raises TemplateFailedError."""
        self._set_budget()
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=tools or None,
                add_generation_prompt=True,
                **self._variables,
            ):
                length += len(piece)
                if length > OUTPUT_CHARACTERS_MAX:
                    raise TemplateLimitError(
                        f"it makes more than {OUTPUT_CHARACTERS_MAX} characters"
                    )
                pieces.append(piece)
        except Exception as error:
            # Whatever a template's code raises is the template's failure, TypeError and RecursionError included.
            raise TemplateFailedError(str(error)[:MESSAGE_CHARACTERS_MAX]) from error
        return "".join(pieces)

    def _set_budget(self) -> None:
        self._sandbox.budget = Budget(
            self._clock.monotonic, self._seconds, 4 * OUTPUT_CHARACTERS_MAX
        )


def _sandbox(clock: Clock) -> TemplateSandbox:
    sandbox = TemplateSandbox()
    sandbox.filters["tojson"] = _to_json(sandbox)
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now(clock)
    return sandbox


def _to_json(sandbox: TemplateSandbox) -> Callable[..., str]:
    """As Hugging Face has it: key order kept, no HTML escapes, characters beyond ASCII as they are."""

    def to_json(
        value: object,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        ensure_ascii: bool = False,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and not 0 <= indent <= 16:
            raise TemplateLimitError("tojson indents too widely")
        sandbox.measured(value)
        text = json.dumps(
            value,
            indent=indent,
            separators=separators,
            ensure_ascii=ensure_ascii,
            sort_keys=sort_keys,
        )
        sandbox.budget.spend(len(text))
        return text

    return to_json


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(clock: Clock) -> Callable[[str], str]:
    def strftime_now(format_text: str) -> str:
        if re.search(r"%[^a-zA-Z%]", format_text) or len(format_text) > 200:
            raise TemplateLimitError("it formats the time with widths")
        now = dt.datetime.fromtimestamp(clock.wall(), tz=dt.UTC)
        return now.strftime(format_text)

    return strftime_now
