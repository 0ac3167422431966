"""The one `main` of every service: settings, logs, exit code."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

from services.runtime import logs
from services.runtime.server import PortTakenError
from services.runtime.settings import ProcessSettings, SettingsError, load

Settings = TypeVar("Settings", bound=ProcessSettings)

REFUSED: Final = 2
"""Exit code of a service whose settings are wrong or whose port is taken: starting it again would not help."""


def run_process(
    name: str,
    settings_class: type[Settings],
    serve: Callable[[Settings], Coroutine[Any, Any, int]],
    environ: Mapping[str, str],
    *,
    before: Callable[[Settings], None] = lambda _: None,
) -> int:
    """Runs a service to its end; returns its exit code: what `serve` returns, or 2 with a line on stderr that says why.

    `before` is called with the settings while nothing else of the process has begun.
    """
    try:
        settings = load(settings_class, environ)
        before(settings)
        logs.configure(name, settings.log_level)
        # What was imported stays until the end: collections of garbage need not look at it, again and again.
        gc.freeze()
        return asyncio.run(serve(settings))
    except (SettingsError, PortTakenError) as error:
        print(f"caravan {name}: {error}", file=sys.stderr)
        return REFUSED
