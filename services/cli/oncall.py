"""Runs the commands for the person on call."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from services.cli import costs, engines, requests, status
from services.cli.coordinator_client import FAILED, CommandError, Where
from services.runtime.clock import SystemClock


def run(options: argparse.Namespace) -> int:
    """Runs the command of the options; returns the exit code."""
    try:
        return asyncio.run(_command(options, Where(options.address, options.state_dir)))
    except CommandError as error:
        print(f"caravan {options.command}: {error}", file=sys.stderr)
        return FAILED


def _command(options: argparse.Namespace, where: Where) -> Coroutine[Any, Any, int]:
    out = sys.stdout
    commands: dict[str, Callable[[], Coroutine[Any, Any, int]]] = {
        "status": lambda: _status(options, where),
        "requests": lambda: requests.list_requests(where, out, as_json=options.as_json),
        "cancel": lambda: _cancel(options, where),
        "engines": lambda: engines.list_engines(where, out, as_json=options.as_json),
        "drain": lambda: engines.drain(where, _draining(options), out, SystemClock()),
        "costs": lambda: costs.list_costs(where, out, as_json=options.as_json),
        "undrain": lambda: engines.undrain(where, options.engine, out),
    }
    return commands[options.command]()


def _status(options: argparse.Namespace, where: Where) -> Coroutine[Any, Any, int]:
    if options.once or options.as_json or not sys.stdout.isatty():
        return status.print_once(where, sys.stdout, sys.stderr, in_json=options.as_json)
    return status.watch(where, sys.stdout)


def _cancel(options: argparse.Namespace, where: Where) -> Coroutine[Any, Any, int]:
    if options.tenant is not None:
        return requests.cancel_tenant(where, options.tenant, sys.stdout)
    return requests.cancel(where, options.ids, sys.stdout, sys.stderr)


def _draining(options: argparse.Namespace) -> engines.Draining:
    return engines.Draining(options.engine, options.grace, options.stop, options.wait)
