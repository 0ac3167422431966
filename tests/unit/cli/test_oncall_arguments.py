"""The command line of the person on call."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.arguments import parser


@pytest.mark.parametrize(
    "line",
    [
        "cancel",
        "cancel a --tenant t",
        "drain",
        "drain e --grace 30",
        "drain e --grace -1s",
        "drain e --grace 61min",
        "undrain",
        "status extra",
        "requests --address h:1 --state-dir d",
    ],
)
def test_wrong_use(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Contradictions and bad values are code 2 and a line of help."""
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(line.split())
    assert caught.value.code == 2
    assert "usage: caravan" in capsys.readouterr().err


def test_defaults_and_values() -> None:
    """Graces are seconds; an empty tenant is a tenant too."""
    drain = parser().parse_args(["drain", "engine-0"])
    assert (drain.engine, drain.grace, drain.stop, drain.wait) == ("engine-0", 30.0, False, False)
    assert parser().parse_args(["drain", "e", "--grace", "1.5min"]).grace == 90.0
    assert parser().parse_args(["drain", "e", "--grace", "250ms"]).grace == 0.25
    assert parser().parse_args(["drain", "e", "--grace", "1h"]).grace == 3600.0
    cancel = parser().parse_args(["cancel", "--tenant", ""])
    assert (cancel.ids, cancel.tenant) == ([], "")
    assert parser().parse_args(["cancel", "a", "b"]).ids == ["a", "b"]
    status = parser().parse_args(["status", "--state-dir", "x"])
    assert (status.state_dir, status.once, status.as_json) == (Path("x"), False, False)
