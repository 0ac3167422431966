"""The command line of `caravan`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Final

from services.cli import (
    costs_arguments,
    deploy_arguments,
    dev_arguments,
    model_sources,
    oncall_arguments,
    ports,
    remote_arguments,
)
from services.runtime.settings import byte_size

_KEY: Final = re.compile(r"[0-9a-fA-F]{1,64}")
DEFAULT_URL: Final = f"http://127.0.0.1:{ports.DEFAULT_PUBLIC}"

_UP = """\
Starts Envoy, gateway, coordinator, cache service and engines on this machine, and restarts what dies.
Prints the URL when it is ready. Ctrl-C finishes what runs and stops everything."""

_UP_MORE = """\
ports:  8080 REST and gRPC, 9901 Envoy's admin page, 7001 gateway, 7002 coordinator, 7003 cache service,
        7010... engines, 9101, 9102, 9103, 9110... their metrics. With another --port the internal ones are
        free ports; STATE_DIR/endpoints.json tells them.
exit:   0 stopped as asked, 1 no model can be served, 2 wrong use or a taken port.
The services read their settings (CARAVAN_...) from the environment: docs/OPERATING.md lists them."""

_CACHE = """\
Shows and drops the KV blocks that the engines of `caravan up` share, and checks their files."""

_CACHE_MORE = """\
exit:   0 done, 1 it could not be done or a file is bad, 2 wrong use."""

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
    _add_cache(commands)
    deploy_arguments.add(commands)
    oncall_arguments.add(commands)
    costs_arguments.add(commands)
    dev_arguments.add(commands)
    remote_arguments.add(commands)
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
    up.set_defaults(refuse=up.error)
    served = up.add_mutually_exclusive_group()
    served.add_argument(
        "--model",
        type=_model,
        action="append",
        default=[],
        metavar="NAME=PATH",
        dest="models",
        help="serve this GGUF file under this name; may be repeated (default: the demo model as `demo`)",
    )
    served.add_argument(
        "--deployments",
        type=_file,
        default=None,
        metavar="FILE",
        help="serve what this file of deployments says; see `caravan deploy`",
    )
    up.add_argument(
        "--engines",
        type=_count,
        default=None,
        metavar="N",
        help="engines of each --model (default: 1)",
    )
    up.add_argument(
        "--threads",
        type=_count,
        default=None,
        metavar="N",
        help="compute threads per engine (default: all cores; several engines split them)",
    )
    _add_state_dir(
        up,
        help_text="endpoints.json, logs, locks and KV blocks (default: %(default)s in the current folder)",
    )
    up.add_argument(
        "--no-cache",
        action="store_false",
        dest="cache",
        help="no cache service and no KV blocks on disk: engines reuse what is in their own memory only",
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


def _add_cache(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    cache = commands.add_parser(
        "cache",
        help="look into the KV cache",
        description=_CACHE,
        epilog=_CACHE_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    stats = actions.add_parser("stats", help="sizes, quotas and hit rates")
    ls = actions.add_parser("ls", help="the blocks, by key")
    evict = actions.add_parser("evict", help="drop blocks that nobody uses")
    for action in (stats, ls, evict):
        action.add_argument(
            "--address",
            default=None,
            metavar="HOST:PORT",
            help="cache service (default: the one of DIR)",
        )
        _add_state_dir(action, help_text="of the running `caravan up` (default: %(default)s)")
    ls.add_argument("--json", action="store_true", dest="as_json", help="a JSON object per line")
    ls.add_argument(
        "--limit", type=_count, default=0, metavar="N", help="at most so many (default: all)"
    )
    ls.add_argument(
        "--prefix", type=_key, default=None, metavar="HEX", help="keys that begin so (default: all)"
    )
    what = evict.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--bytes",
        type=_size,
        default=0,
        metavar="SIZE",
        dest="free_bytes",
        help="the least worth keeping, until so much is free, such as 512MiB",
    )
    what.add_argument("--all", action="store_true", dest="everything", help="everything")
    what.add_argument(
        "keys",
        type=_key,
        nargs="*",
        default=[],
        metavar="KEY",
        help="blocks by the first digits of their keys",
    )
    verify = actions.add_parser("verify", help="check the files on this machine")
    verify.add_argument(
        "roots",
        type=Path,
        nargs="*",
        metavar="FOLDER",
        help="folders of block files (default: DIR/kv)",
    )
    _add_state_dir(verify, help_text="of `caravan up` (default: %(default)s)")


def _add_state_dir(command: argparse.ArgumentParser, help_text: str) -> None:
    command.add_argument(
        "--state-dir", type=Path, default=Path(".state"), metavar="DIR", help=help_text
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


def _size(text: str) -> int:
    try:
        value = byte_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is {error}") from None
    if not 1 <= value < 2**63:
        raise argparse.ArgumentTypeError("not within 1 byte to 8 EiB")
    return value


def _key(text: str) -> str:
    if not _KEY.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to 64 hexadecimal digits")
    return text.lower()


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no file")
    return path


def _model(text: str) -> model_sources.ModelSource:
    try:
        return model_sources.parse(text)
    except model_sources.ModelSourceError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
