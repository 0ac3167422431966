"""What the log says of failed calls: each kind is told, and no storm of them fills the disk."""

from __future__ import annotations

import pytest

from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.failure_log import QUIET_S, FailureLog


def test_a_kind_is_told_once_in_a_while_with_how_many_were_not() -> None:
    """The first is told at once; later ones are counted until the time is over."""
    log = FailureLog()
    away = ProviderError(Failure.SERVER_ERROR, "OpenAI says: away")
    assert log.line(away, 0.0) == "a call failed: provider_failed: OpenAI says: away"
    assert [log.line(away, QUIET_S - 0.1) for _ in range(3)] == ["", "", ""]
    again = log.line(away, QUIET_S)
    assert again.endswith("OpenAI says: away (3 more of the kind since it was told last)")
    assert log.line(away, 2 * QUIET_S).endswith("OpenAI says: away")


def test_the_providers_id_of_the_request_is_told() -> None:
    """Its support asks for it."""
    away = ProviderError(Failure.SERVER_ERROR, "OpenAI says: away")
    away.provider_request_id = "req_7"
    assert FailureLog().line(away, 0.0).endswith("away (its id of the request: req_7)")


def test_kinds_do_not_hide_each_other() -> None:
    """Timeouts all the time must not keep a refused credential from being told."""
    log = FailureLog()
    assert log.line(ProviderError(Failure.TIMEOUT, "slow"), 0.0)
    assert "provider_unauthorized" in log.line(ProviderError(Failure.UNAUTHORIZED, "no"), 0.1)


@pytest.mark.parametrize(
    "failure",
    [Failure.REJECTED, Failure.CONTENT_FILTERED, Failure.CONTEXT_LENGTH_EXCEEDED],
)
def test_what_a_request_is_to_blame_for_is_not_told(failure: Failure) -> None:
    """The provider may quote the prompt, and the client reads it anyway."""
    assert not FailureLog().line(ProviderError(failure, "your prompt 'my secret plan'"), 0.0)


def test_a_provider_cannot_write_lines_or_commands_into_the_log() -> None:
    """Its text is one line without control characters."""
    line = FailureLog().line(ProviderError(Failure.SERVER_ERROR, "a\nERROR b\x1b[2J"), 0.0)
    assert line.endswith("a ERROR b [2J")
