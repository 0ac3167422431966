"""What the documents claim is what the code has."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from services.runtime.settings import infos

ROOT = Path(__file__).resolve().parents[2]
OPERATING = (ROOT / "docs" / "OPERATING.md").read_text()
SERVICES = ("coordinator", "cache", "engine", "engine.remote", "gateway", "cli")
SETTINGS = [f"services.{name}.settings" for name in SERVICES]


@pytest.mark.parametrize("module", SETTINGS)
def test_every_setting_is_documented_with_its_default(module: str) -> None:
    """docs/OPERATING.md has a row for each setting, with the variable and the default in force."""
    classes = [
        value
        for value in vars(importlib.import_module(module)).values()
        if isinstance(value, type) and value.__module__ == module and list(infos(value))
    ]
    assert classes
    for settings_class in classes:
        for _, info in infos(settings_class):
            row = f"| `{info.env}` | {f'`{info.default}`' if info.default else 'empty'} | {info.meaning} |"
            assert row in OPERATING, row


def test_no_setting_is_documented_that_does_not_exist() -> None:
    """A variable in the settings tables is one that some service reads."""
    known = {
        info.env
        for module in SETTINGS
        for value in vars(importlib.import_module(module)).values()
        if isinstance(value, type) and hasattr(value, "__dataclass_fields__")
        for _, info in infos(value)
    }
    assert set(re.findall(r"^\| `(CARAVAN_\w+)` \|", OPERATING, re.MULTILINE)) == known


def test_every_metric_is_documented() -> None:
    """docs/OPERATING.md names each series, and no other."""
    names: set[str] = set()
    for path in (ROOT / "services").rglob("*metrics.py"):
        names |= set(re.findall(r"""["'](caravan_\w+)["']""", path.read_text()))
    assert names
    assert set(re.findall(r"^\| `(caravan_\w+)` \|", OPERATING, re.MULTILINE)) == names


def test_every_environment_variable_and_target_in_the_readme_exists() -> None:
    """The README names only make targets that the Makefile has."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named
    assert named <= targets
