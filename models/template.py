"""The chat template, rendered the same way for training, evaluation and export."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")


def _plain_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _sorted_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


class Renderer:
    """Renders messages to the text that the model reads.

    `sort_keys` chooses which of two common `tojson` filters is imitated: the one of chat servers,
    which keeps the order of keys, or the one of plain jinja2, which sorts them.
    """

    def __init__(self, sort_keys: bool = False) -> None:
        # The same two flags as in transformers and llama-cpp-python: the template relies on them.
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        to_json: Callable[[object], str] = _sorted_json if sort_keys else _plain_json
        env.filters["tojson"] = to_json
        self._template = env.from_string(TEMPLATE)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """Text of the dialogue; with `add_generation_prompt` it ends where an answer starts."""
        return self._template.render(
            messages=messages,
            tools=list(tools) or None,
            add_generation_prompt=add_generation_prompt,
        )
