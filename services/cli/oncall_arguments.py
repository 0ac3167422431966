"""The options of the commands for the person on call: status, requests, cancel, engines, drain, undrain."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Final, TypeAlias

GRACE_MAX_S: Final = 3_600.0
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|min|h)", re.ASCII)
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3_600.0}
_STATE_DIR: Final = Path(".state")
CODES: Final = """\
exit:   0 done, 1 it could not be done (the reason is on stderr), 2 wrong use."""
"""The end of their help."""
_STATUS: Final = """\
Shows models, engines, requests and the cache, redrawn each second until Ctrl-C.
With --once or --json, or where the output is no terminal, it prints once and ends."""
_DRAIN: Final = """\
Takes an engine out of service. It gets no more requests; those that run may finish within the
grace, and then move to another engine of the model, without their clients noticing."""
# argparse has no public name for it.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001


def add(commands: Commands) -> None:
    """Adds the commands."""
    status = _command(commands, "status", "a live view of models, engines and requests", _STATUS)
    status.add_argument("--once", action="store_true", help="print once and end")
    add_json(status, "one JSON object, once")
    requests = _command(commands, "requests", "the requests that run and wait, oldest first")
    add_json(requests, "a JSON object per line")
    _add_cancel(commands)
    engines = _command(commands, "engines", "the engines and what they do")
    add_json(engines, "a JSON object per line")
    _add_drain(commands)
    undrain = _command(commands, "undrain", "put a drained engine back into service")
    undrain.add_argument("engine", metavar="ENGINE", help="its id, such as engine-0")


def _add_cancel(commands: Commands) -> None:
    cancel = _command(commands, "cancel", "end requests, wherever they run or wait")
    what = cancel.add_mutually_exclusive_group(required=True)
    what.add_argument("ids", nargs="*", default=[], metavar="ID", help="ids of requests")
    what.add_argument(
        "--tenant", default=None, metavar="T", help="all requests of a tenant; '' is those without"
    )


def _add_drain(commands: Commands) -> None:
    drain = _command(commands, "drain", "take an engine out of service", _DRAIN)
    drain.add_argument("engine", metavar="ENGINE", help="its id, such as engine-0")
    drain.add_argument(
        "--grace",
        type=duration,
        default=30.0,
        metavar="TIME",
        help="time to finish, such as 500ms or 2min, at most 1h (default: 30s)",
    )
    drain.add_argument("--stop", action="store_true", help="end its process when nothing runs")
    drain.add_argument("--wait", action="store_true", help="return when nothing runs on it")


def _command(
    commands: Commands, name: str, help_text: str, description: str | None = None
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=help_text,
        description=description or f"{help_text[0].upper()}{help_text[1:]}.",
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_coordinator(command)
    return command


def add_coordinator(command: argparse.ArgumentParser, *, inherits: bool = False) -> None:
    """The options that tell where the coordinator is. `inherits`: what was told before the action of the command stays."""
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--address",
        default=argparse.SUPPRESS if inherits else None,
        metavar="HOST:PORT",
        help="coordinator (default: the one of DIR)",
    )
    where.add_argument(
        "--state-dir",
        type=Path,
        default=argparse.SUPPRESS if inherits else _STATE_DIR,
        metavar="DIR",
        help=f"of the running `caravan up` (default: {_STATE_DIR})",
    )


def add_json(command: argparse.ArgumentParser, help_text: str) -> None:
    """The option to print JSON."""
    command.add_argument("--json", action="store_true", dest="as_json", help=help_text)


def duration(text: str) -> float:
    """Seconds of a span such as `30s`, `500ms`, `2min`, within 0 and an hour. Raises argparse.ArgumentTypeError."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 30s, 500ms or 2min")
    seconds = float(found[1]) * _SECONDS[found[2]]
    if seconds > GRACE_MAX_S:
        raise argparse.ArgumentTypeError(f"{text!r} is more than an hour")
    return seconds
