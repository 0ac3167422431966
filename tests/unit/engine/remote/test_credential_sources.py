"""What a file or a variable must hold to be a credential, and that what it holds instead is not shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.engine.remote.credential_sources import (
    FILE_BYTES_MAX,
    EnvSource,
    FileSource,
    InlineSource,
    Reading,
    SourceError,
)

CANARY = "sk-canary-4f9a"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"  \n",
        b"sk-canary\r\nX-Other: 1",
        b"sk canary",
        "sk-canäry".encode(),
        b"\xff\xfe",
        b"s" * (FILE_BYTES_MAX + 1),
        b'{"token": "sk-canary"',
        b'{"tokn": "sk-canary"}',
        b'{"token": ["sk-canary"]}',
        b'{"token": "sk-canary", "expires_at": "soon"}',
        b'{"token": "sk-canary", "expires_at": 7}',
    ],
)
def test_a_file_with_no_usable_secret_is_refused_without_showing_it(
    tmp_path: Path, content: bytes
) -> None:
    """Above all what would be refused, and quoted, by the HTTP library."""
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(SourceError) as caught:
        FileSource(str(tmp_path / "key")).read({})
    assert "canary" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """A variable that is not set, a file that is missing or none."""
    for source in (EnvSource("NOT_SET"), FileSource(str(tmp_path / "no")), FileSource("a\0b")):
        with pytest.raises(SourceError):
            source.read({})
    with pytest.raises(SourceError):
        FileSource(str(tmp_path)).read({})
    with pytest.raises(SourceError):
        InlineSource(" ").read({})


def test_what_was_read_does_not_show_itself() -> None:
    """Not in a log line or an assertion that prints it."""
    assert "canary" not in repr(InlineSource(CANARY)) + repr(InlineSource(CANARY).read({}))


def test_json_tells_when_it_expires(tmp_path: Path) -> None:
    """With a zone or without (UTC), or not at all."""
    path = tmp_path / "key"
    for text, expires_at in (
        ('"expires_at": "1970-01-01T00:20:00Z"', 1200.0),
        ('"expires_at": "1970-01-01T02:20:00+02:00"', 1200.0),
        ('"expires_at": "1970-01-01T00:20:00"', 1200.0),
        ('"expires_at": null', None),
        ('"other": 1', None),
    ):
        path.write_text(f'{{"token": "{CANARY}", {text}}}')
        assert FileSource(str(path)).read({}) == Reading(
            CANARY, expires_at, FileSource(str(path)).signature()
        )
