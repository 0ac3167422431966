"""The options of `caravan deploy`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.cli.oncall_arguments import Commands, add_coordinator, duration

WAIT_S: Final = 300.0
_DEPLOY: Final = """\
Tells a running `caravan up` what to serve. FILE is TOML with [[deployment]] tables; docs/OPERATING.md
describes them. New deployments are added and changed ones changed; where model or engine settings
change, new engines take over when they are ready, without a failed request."""
_CODES: Final = """\
exit:   0 done, 1 it could not be done (the reason is on stderr), 2 wrong use or mistakes in FILE: nothing was changed."""


@dataclass(frozen=True)
class Deploying:
    """What to apply: a file; whether others are removed, and whether to rehearse only. `wait_s` None does not wait."""

    file: Path
    prune: bool = False
    dry_run: bool = False
    wait_s: float | None = None


@dataclass(frozen=True)
class Removing:
    """What to remove. `wait_s` None does not wait."""

    name: str
    wait_s: float | None = None


def add(commands: Commands) -> None:
    """Adds the command."""
    deploy = commands.add_parser(
        "deploy",
        help="change what is served",
        description=_DEPLOY,
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    deploy.set_defaults(refuse=deploy.error)
    what = deploy.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", type=Path, metavar="FILE", help="deployments to apply")
    what.add_argument("--list", action="store_true", dest="listing", help="show what is deployed")
    what.add_argument("--remove", metavar="NAME", help="drain and remove a deployment")
    deploy.add_argument("--prune", action="store_true", help="remove those that are not in FILE")
    deploy.add_argument("--dry-run", action="store_true", help="show what would change")
    deploy.add_argument("--wait", action="store_true", help="return when it has come about")
    deploy.add_argument(
        "--timeout",
        type=duration,
        default=None,
        metavar="TIME",
        help="with --wait: give up after this, such as 90s, at most 1h (default: 5min)",
    )
    add_coordinator(deploy)


def asked(options: argparse.Namespace) -> Deploying | Removing | None:
    """What the options ask for; None is to list. Ends the process with code 2 where they contradict each other."""
    if options.file is None and (options.prune or options.dry_run):
        options.refuse("--prune and --dry-run go with FILE")
    if options.wait and (options.listing or options.dry_run):
        options.refuse("--wait goes with a change")
    if options.timeout is not None and not options.wait:
        options.refuse("--timeout goes with --wait")
    wait_s = (WAIT_S if options.timeout is None else options.timeout) if options.wait else None
    if options.file is not None:
        return Deploying(options.file, options.prune, options.dry_run, wait_s)
    return None if options.remove is None else Removing(options.remove, wait_s)
