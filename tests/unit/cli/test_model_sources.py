"""--model NAME=PATH and the mistakes that show early."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.model_sources import ModelSource, ModelSourceError, check, check_names, parse


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path means the user's folder, whatever folder a process runs in."""
    monkeypatch.chdir(tmp_path)
    assert parse("org/a:1=x=y.gguf") == ModelSource("org/a:1", str(tmp_path / "x=y.gguf"))


def test_scripts_stay_as_they_are() -> None:
    """A scripted model is no path, and its file is not looked for."""
    model = parse("slow=scripted:?step_ms=20&tokens=5")
    assert model == ModelSource("slow", "scripted:?step_ms=20&tokens=5")
    check(model)


@pytest.mark.parametrize(
    "text", ["", "a.gguf", "=a.gguf", "name=", "a b=c", "/x=y", "x" * 129 + "=y"]
)
def test_wrong_forms_are_refused(text: str) -> None:
    """What is not NAME=PATH is refused with its text."""
    with pytest.raises(ModelSourceError):
        parse(text)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot read"),
        (b"", "not a GGUF"),
        (b"GGML" + bytes(40), "not a GGUF"),
        (b"GGUF\3\0\0\0", "cut off"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    """A missing, foreign or cut file is refused before anything starts, naming model and file."""
    path = tmp_path / "m.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelSourceError, match=complaint) as caught:
        check(ModelSource("mine", str(path)))
    assert "mine" in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    """A folder is refused with the system's words."""
    with pytest.raises(ModelSourceError, match="directory"):
        check(ModelSource("mine", str(tmp_path)))


def test_names_are_unique() -> None:
    """A name cannot stand for two files."""
    with pytest.raises(ModelSourceError, match="twice"):
        check_names((ModelSource("a", "/x"), ModelSource("b", "/x"), ModelSource("a", "/y")))
