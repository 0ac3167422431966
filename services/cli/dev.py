"""`caravan dev provider`: runs the scripted provider and says how to use it."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from typing import Final, TextIO

from services.cli.ports import describe_owner
from services.dev.provider.script import Script
from services.dev.provider.server import ScriptedProvider

OK: Final = 0
FAILED: Final = 1
_USAGE: Final = """\
Scripted provider: {base_url}
A deployment for it, with `runtime` openai_compatible, openai, anthropic or gemini (Ctrl-C ends it):

  [[deployment]]
  name = "scripted"
  model = "{model}"
  runtime = "openai_compatible"
  [deployment.remote]
  base_url = "{base_url}"{credential}

Ask it:         curl -N {base_url}/chat/completions{header} \\
                  -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'
Break it:       curl {origin}/_control/faults -d '{{"kind": "status", "status": 429, "retry_after": "2"}}'
Mend it:        curl -X DELETE {origin}/_control/faults
See what came:  curl {origin}/_control/requests"""


def run(options: argparse.Namespace) -> int:
    """Runs the tool of the options until it is asked to end; returns the exit code."""
    provider = ScriptedProvider(_script(options), accepted_keys=options.keys, port=options.port)
    for fault in options.faults:
        provider.faults.add(fault)
    try:
        asyncio.run(_serve(provider, sys.stdout))
    except OSError as error:
        owner = describe_owner(options.port)
        print(
            f"caravan dev provider: port {options.port}: {error.strerror}{owner}", file=sys.stderr
        )
        return FAILED
    return OK


def _script(options: argparse.Namespace) -> Script:
    return Script(
        tokens=options.tokens,
        text=options.text,
        echo=options.echo,
        delay_s=options.delay,
        pace_s=options.pace,
        models=tuple(options.models),
    )


async def _serve(provider: ScriptedProvider, out: TextIO) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    async with provider:
        print(usage(provider), file=out, flush=True)
        await ended.wait()


def usage(provider: ScriptedProvider) -> str:
    """How to use a provider that runs. Keys are not in it: the deployment names a variable."""
    keyed = bool(provider.accepted_keys)
    credential = '\n  credential = { env = "SCRIPTED_KEY" }' if keyed else ""
    header = ' -H "Authorization: Bearer $SCRIPTED_KEY"' if keyed else ""
    return _USAGE.format(
        base_url=provider.base_url,
        origin=provider.origin,
        model=(provider.script.models or ("scripted",))[0],
        credential=credential,
        header=header,
    )
