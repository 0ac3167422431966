"""docs/API.md says what the gateway does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from services.gateway.openai_fields import CHAT_FIELDS, COMPLETION_FIELDS, InertField
from services.gateway.openai_schema import Caravan, ChatCompletion, Completion
from services.runtime.errors import TABLE

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "API.md").read_text()


def _section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def _rows(title: str) -> list[str]:
    lines = [line for line in _section(title).splitlines() if line.startswith("| ")]
    return [line for line in lines if not line.startswith(("| --- ", "| field ", "| reason "))]


def error_rows() -> list[str]:
    """The rows of the table of errors, as the one error table says."""
    return [
        f"| `{reason}` | {row.http_status} | `{row.grpc_code.name}` | `{row.openai_type}` | "
        + (f"`{row.openai_code}` |" if row.openai_code else "null |")
        for reason, row in TABLE.items()
    ]


def inert_rows() -> list[str]:
    """The rows of the fields without effect."""
    rows = []
    for name in sorted({*CHAT_FIELDS, *COMPLETION_FIELDS}):
        for endpoints, field in _by_meaning(name).items():
            rows.append(f"| `{name}` | {endpoints} | {field.accepted or 'nothing'} | {field.why} |")
    return rows


def _by_meaning(name: str) -> Mapping[str, InertField]:
    chat, completion = CHAT_FIELDS.get(name), COMPLETION_FIELDS.get(name)
    if chat is not None and chat == completion:
        return {"both": chat}
    found = {"chat": chat, "completions": completion}
    return {endpoint: field for endpoint, field in found.items() if field is not None}


def test_every_error_has_its_row() -> None:
    """The table of errors is the one of the code (I10)."""
    assert _rows("Errors") == error_rows()


def test_every_field_without_effect_has_its_row() -> None:
    """What is accepted without effect, and what is refused, is written down."""
    assert _rows("Fields without effect") == inert_rows()


def test_every_field_is_described() -> None:
    """Each field that is acted on stands in a table of its endpoint, and no other does."""
    chat = "".join(_rows("`POST /v1/chat/completions`"))
    completion = "".join(_rows("`POST /v1/completions`"))
    for name in ChatCompletion.__struct_fields__:
        assert f"`{name}" in chat, name
    for name in Caravan.__struct_fields__:
        assert f"| `caravan.{name}` |" in chat, name
    whole = completion + _section("`POST /v1/completions`") + chat
    for name in Completion.__struct_fields__:
        assert f"`{name}" in whole, name
    named = {
        name.split(".")[0]
        for row in _rows("`POST /v1/chat/completions`")
        for name in re.findall(r"`([\w.]+)`", row.split("|")[1])
    }
    assert named == set(ChatCompletion.__struct_fields__)
