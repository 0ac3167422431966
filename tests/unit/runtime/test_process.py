"""The one `main`: what every service does before and after it serves."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from services.runtime.process import REFUSED, run_process
from services.runtime.server import PortTakenError
from services.runtime.settings import ProcessSettings, integer, setting


@dataclass(frozen=True)
class _Settings(ProcessSettings):
    size: int = setting("CARAVAN_TEST_SIZE", "3", "A size", integer(1, 9))


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """A process has its logs for itself; a test gives them back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


async def _serve(settings: _Settings) -> int:
    return settings.size


def test_the_exit_code_is_that_of_the_service() -> None:
    """The settings come from the environment that was given, and the code from `serve`."""
    assert run_process("test", _Settings, _serve, {"CARAVAN_TEST_SIZE": "7"}) == 7


def test_something_may_come_first() -> None:
    """`before` sees the settings before anything is served."""
    order: list[object] = []

    async def serve(settings: _Settings) -> int:
        order.append("serve")
        return 0

    def before(settings: _Settings) -> None:
        order.append(settings.size)

    assert run_process("test", _Settings, serve, {}, before=before) == 0
    assert order == [3, "serve"]


def test_all_wrong_settings_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Code 2, the name of the service, and a line for each mistake; nothing is served."""

    async def serve(settings: _Settings) -> int:
        raise AssertionError("it must not come so far")

    wrong = {"CARAVAN_TEST_SIZE": "12", "CARAVAN_LOG_LEVEL": "loud"}
    assert run_process("test", _Settings, serve, wrong) == REFUSED == 2
    errors = capsys.readouterr().err
    assert errors.startswith("caravan test: CARAVAN_LOG_LEVEL='loud': not one of")
    assert "CARAVAN_TEST_SIZE='12': not within 1 to 9" in errors


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Code 2, and no traceback."""

    async def serve(settings: _Settings) -> int:
        raise PortTakenError("cannot listen on 127.0.0.1:1: taken")

    assert run_process("test", _Settings, serve, {}) == REFUSED
    assert capsys.readouterr().err == "caravan test: cannot listen on 127.0.0.1:1: taken\n"


def test_a_defect_is_not_swallowed() -> None:
    """Anything else is a defect: its traceback is what the log needs."""

    async def serve(settings: _Settings) -> int:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_process("test", _Settings, serve, {})
