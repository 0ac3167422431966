"""The options of `caravan dev`."""

from __future__ import annotations

import argparse
from typing import Final

from services.cli.oncall_arguments import Commands, duration
from services.dev.provider.fault_text import fault_from_text
from services.dev.provider.faults import ALWAYS, Fault, FaultError, Kind
from services.dev.provider.script import TOKENS_MAX

DEFAULT_PORT: Final = 9009
_PROVIDER: Final = """\
Runs a provider that answers by script, on this machine and for nothing: the APIs of OpenAI, Anthropic
and Gemini, streaming and plain, with tool calls and JSON. It can be told to misbehave, with --fault
and while it runs. Ctrl-C ends it."""
_PROVIDER_MORE: Final = f"""\
faults: {", ".join(kind.value for kind in Kind)}.
        KIND[=VALUE][,FIELD=VALUE]...: VALUE is the status, the seconds, the size, or the number of pieces
        before it. FIELDs: after, seconds, status, retry_after, reason, size, times (default 1; `{ALWAYS}`).
        They hit one request after the other, in the order given.
exit:   0 ended as asked, 1 the port is taken, 2 wrong use."""


def add(commands: Commands) -> None:
    """Adds the command."""
    dev = commands.add_parser(
        "dev",
        help="what developing and testing need",
        description="What developing and testing need.",
    )
    tools = dev.add_subparsers(dest="tool", required=True, metavar="TOOL")
    provider = tools.add_parser(
        "provider",
        help="a provider that answers by script",
        description=_PROVIDER,
        epilog=_PROVIDER_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    provider.add_argument(
        "--port",
        type=_port,
        default=DEFAULT_PORT,
        help="port on 127.0.0.1; 0 takes a free one (default: %(default)s)",
    )
    provider.add_argument(
        "--key",
        action="append",
        default=[],
        dest="keys",
        metavar="KEY",
        help="accept only this key; may be repeated (default: any key, and none)",
    )
    provider.add_argument(
        "--model",
        action="append",
        default=[],
        dest="models",
        metavar="NAME",
        help="serve only this model; may be repeated (default: any)",
    )
    _add_answers(provider)
    provider.add_argument(
        "--fault",
        type=_fault,
        action="append",
        default=[],
        dest="faults",
        metavar="KIND[=...]",
        help="misbehave, such as status=429,retry_after=2 or cut=5; may be repeated",
    )


def _add_answers(provider: argparse.ArgumentParser) -> None:
    what = provider.add_mutually_exclusive_group()
    what.add_argument("--text", default="", help="answer this (default: words drawn at random)")
    what.add_argument("--echo", action="store_true", help="answer what the user said last")
    provider.add_argument(
        "--tokens",
        type=_tokens,
        default=32,
        metavar="N",
        help="words of a random answer (default: %(default)s)",
    )
    provider.add_argument(
        "--delay",
        type=duration,
        default=0.0,
        metavar="TIME",
        help="time to the first word, such as 200ms (default: none)",
    )
    provider.add_argument(
        "--pace",
        type=duration,
        default=0.02,
        metavar="TIME",
        help="time between two words; 0s: as fast as they go (default: 20ms)",
    )


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError("not within 0 to 65535")
    return int(text)


def _tokens(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= TOKENS_MAX:
        raise argparse.ArgumentTypeError(f"not within 1 to {TOKENS_MAX}")
    return int(text)


def _fault(text: str) -> Fault:
    try:
        return fault_from_text(text)
    except FaultError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
