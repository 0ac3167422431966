"""The command line of `caravan`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from services.cli import model_sources, ports

DEFAULT_URL: Final = f"http://127.0.0.1:{ports.DEFAULT_PUBLIC}"

_UP = """\
Starts Envoy, gateway, coordinator and engines on this machine, and restarts what dies.
Prints the URL when it is ready. Ctrl-C finishes what runs and stops everything."""

_UP_MORE = """\
ports:  8080 REST and gRPC, 9901 Envoy's admin page, 7001 gateway, 7002 coordinator, 7010... engines,
        9101, 9102, 9110... their metrics. With another --port the internal ones are free ports;
        STATE_DIR/endpoints.json tells them.
exit:   0 stopped as asked, 1 no model can be served, 2 wrong use or a taken port.
The services read their settings (CARAVAN_...) from the environment: docs/OPERATING.md lists them."""

_CHAT_MORE = """\
In the chat: /help, /reset, /exit. Ctrl-C ends the running answer, Ctrl-D the chat.
Input that is no terminal is read line by line, a turn each; only the answers are printed."""


def parser() -> argparse.ArgumentParser:
    """The parser; the result has `command` and the options of the command."""
    top = argparse.ArgumentParser(
        prog="caravan", description="Serves GGUF models with llama.cpp: the OpenAI API and gRPC."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_up(commands)
    _add_chat(commands)
    return top


def _add_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up = commands.add_parser(
        "up",
        help="start everything on this machine",
        description=_UP,
        epilog=_UP_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    up.add_argument(
        "--port",
        type=_port,
        default=ports.DEFAULT_PUBLIC,
        help="public port, REST and gRPC (default: %(default)s)",
    )
    up.add_argument(
        "--model",
        type=_model,
        action="append",
        default=[],
        metavar="NAME=PATH",
        dest="models",
        help="serve this GGUF file under this name; may be repeated (default: the demo model as `demo`)",
    )
    up.add_argument(
        "--engines",
        type=_count,
        default=1,
        metavar="N",
        help="engines per model (default: %(default)s)",
    )
    up.add_argument(
        "--threads",
        type=_count,
        default=None,
        metavar="N",
        help="compute threads per engine (default: all cores; several engines split them)",
    )
    up.add_argument(
        "--state-dir",
        type=Path,
        default=Path(".state"),
        metavar="DIR",
        help="endpoints.json, logs and locks (default: %(default)s in the current folder)",
    )


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="Talks to a model that `caravan up` serves.",
        epilog=_CHAT_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chat.add_argument(
        "--url", default=DEFAULT_URL, help="where it is served (default: %(default)s)"
    )
    chat.add_argument("--model", default=None, help="name of the model (default: the first one)")
    chat.add_argument("--system", default=None, help="a system message for the model")
    chat.add_argument(
        "--temperature",
        type=float,
        default=None,
        metavar="T",
        help="0 takes the likeliest token always (default: the server's)",
    )


def _port(text: str) -> int:
    value = _integer(text)
    if not 1 <= value <= 65_535:
        raise argparse.ArgumentTypeError("not within 1 to 65535")
    return value


def _count(text: str) -> int:
    value = _integer(text)
    if not 1 <= value <= 1024:
        raise argparse.ArgumentTypeError("not within 1 to 1024")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _model(text: str) -> model_sources.ModelSource:
    try:
        return model_sources.parse(text)
    except model_sources.ModelSourceError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
