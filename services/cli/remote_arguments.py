"""The options of `caravan remote`."""

from __future__ import annotations

import argparse
from typing import Final

from services.cli.oncall_arguments import CODES, Commands, add_coordinator, add_json, duration

_REMOTE: Final = """\
Shows the engines in front of providers: whether calls are made, what is used of the limits, who waits, and
which credential is in use. With an action it changes one of these for all engines of a deployment."""
_ROTATE: Final = """\
Replaces the credential of a deployment's engines. By default each reads it again where it comes from. Calls
that run finish with the one before."""
_BREAKER: Final = """\
Holds the breaker of a deployment's engines open (no calls are made) or closed (calls are made, whatever
fails), or lets it go by failures again (auto)."""


def add(commands: Commands) -> None:
    """Adds the command."""
    remote = commands.add_parser(
        "remote",
        help="engines in front of providers: how they stand, credentials, breakers",
        description=_REMOTE,
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_coordinator(remote)
    add_json(remote, "a JSON object per line")
    actions = remote.add_subparsers(dest="action", metavar="ACTION")
    rotate = _action(actions, "rotate", "replace the credential", _ROTATE)
    rotate.add_argument(
        "--secret-from-stdin",
        action="store_true",
        help="use what stands on the standard input, until the engines end",
    )
    breaker = _action(actions, "breaker", "hold the breaker, or let it go", _BREAKER)
    breaker.add_argument("mode", choices=("open", "closed", "auto"))
    breaker.add_argument(
        "--for",
        dest="for_s",
        type=duration,
        default=None,
        metavar="TIME",
        help="for how long, such as 30s or 5min; then it goes by failures (default: until told)",
    )


def _action(actions: Commands, name: str, help_text: str, text: str) -> argparse.ArgumentParser:
    action = actions.add_parser(
        name,
        help=help_text,
        description=text,
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action.add_argument("deployment", metavar="DEPLOYMENT", help="its name, such as chat")
    add_coordinator(action, inherits=True)
    return action
