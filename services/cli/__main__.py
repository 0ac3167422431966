"""`caravan`, also as `python -m services.cli`: parses the command line and runs the command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from services.cli.arguments import parser
from services.cli.settings import environment, load_settings
from services.runtime.clock import SystemClock
from services.runtime.settings import SettingsError

_PIPE_CLOSED: Final = 141
"""The code that shells give to commands that end for this."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = parser().parse_args(arguments)
    commands = {
        "up": _up,
        "chat": _chat,
        "cache": _cache,
        "deploy": _deploy,
        "dev": _dev,
        "remote": _remote,
    }
    try:
        code = commands.get(options.command, _on_call)(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever reads has seen enough, as `| head` does. What is still buffered must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED


def _up(options: argparse.Namespace) -> int:
    # Each command imports what it needs: `chat` does without gRPC, `up` without an HTTP client.
    from services.cli.display import Display
    from services.cli.model_sources import ModelSource
    from services.cli.plan import UpOptions
    from services.cli.prepare import DEMO_MODEL, WRONG_USE
    from services.cli.up import up

    display = Display(sys.stdout)
    try:
        settings = load_settings(environment())
    except SettingsError as error:
        display.say(f"caravan up: {error}")
        return WRONG_USE
    models: tuple[ModelSource, ...] = tuple(options.models)
    if options.deployments is None:
        models = models or (ModelSource("demo", str(DEMO_MODEL)),)
    elif options.engines is not None:
        options.refuse("--engines goes with --model; a deployment has `replicas`")
    wanted = UpOptions(
        port=options.port,
        models=models,
        engines=options.engines or 1,
        state_dir=Path(options.state_dir).absolute(),
        threads=options.threads,
        cache=options.cache,
        deployments=options.deployments and options.deployments.absolute(),
    )
    return up(wanted, settings, environment(), SystemClock(), display)


def _chat(options: argparse.Namespace) -> int:
    from services.cli.chat import Asked, chat

    asked = Asked(options.url, options.model, options.system, options.temperature)
    return chat(asked, sys.stdin, sys.stdout)


def _cache(options: argparse.Namespace) -> int:
    from services.cli import cache

    if options.action == "verify":
        return cache.verify(options.roots or [options.state_dir / "kv"])
    asked: cache.Listing | cache.Dropping | None = None
    if options.action == "ls":
        asked = cache.Listing(options.prefix or "", options.limit, options.as_json)
    elif options.action == "evict":
        asked = cache.Dropping(options.free_bytes, options.everything, tuple(options.keys))
    try:
        cache.ask(options.address, options.state_dir, asked, sys.stdout, SystemClock().wall())
    except cache.CacheCommandError as error:
        print(f"caravan cache: {error}", file=sys.stderr)
        return error.code
    return cache.OK


def _deploy(options: argparse.Namespace) -> int:
    from services.cli import deploy

    return deploy.run(options)


def _dev(options: argparse.Namespace) -> int:
    from services.cli import dev

    return dev.run(options)


def _remote(options: argparse.Namespace) -> int:
    from services.cli import remote

    return remote.run(options)


def _on_call(options: argparse.Namespace) -> int:
    from services.cli import oncall

    return oncall.run(options)


if __name__ == "__main__":
    sys.exit(main())
