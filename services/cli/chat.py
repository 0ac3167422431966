"""`caravan chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Final, TextIO

from services.cli.chat_client import ChatClient, ChatError, Message

_HELP: Final = """\
/help   this
/reset  forget the conversation
/exit   leave; so does Ctrl-D
Ctrl-C  end the running answer"""


class Conversation:
    """What has been said, as messages of the OpenAI API."""

    def __init__(self, system: str | None) -> None:
        self._system = system
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        system = self._system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def add(self, role: str, content: str) -> None:
        """Adds a message."""
        self.messages.append({"role": role, "content": content})

    def take_back(self) -> None:
        """Removes the last message."""
        self.messages.pop()


def chat(url: str, model: str | None, system: str | None, source: TextIO, out: TextIO) -> int:
    """Runs the command; returns the exit code: 1 if the server cannot be reached or, from a pipe, an answer failed."""
    interactive = source.isatty() and out.isatty()
    with ChatClient(url) as client:
        try:
            chosen = model or _first(client.models())
        except ChatError as error:
            sys.stderr.write(f"caravan chat: {error}\n")
            return 1
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  gives input() line editing and a history
            out.write(f"Talking to {chosen}. /help lists the commands.\n")
        return _converse(client, chosen, Conversation(system), source, out, interactive=interactive)


def _first(models: list[str]) -> str:
    if not models:
        raise ChatError("the server has no models")
    return models[0]


def _converse(
    client: ChatClient,
    model: str,
    conversation: Conversation,
    source: TextIO,
    out: TextIO,
    *,
    interactive: bool,
) -> int:
    lines = _typed(out) if interactive else (line.rstrip("\n") for line in source)
    for line in lines:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            conversation.reset()
        elif text == "/help":
            out.write(_HELP + "\n")
        elif text.startswith("/") and interactive:
            out.write(f"{text.split()[0]} is no command; /help lists them.\n")
        elif text and not _take_turn(client, model, conversation, text, out) and not interactive:
            return 1
    return 0


def _typed(out: TextIO) -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            out.write("\n")  # Ctrl-C at the prompt drops the line
        except EOFError:
            out.write("\n")
            return


def _take_turn(
    client: ChatClient, model: str, conversation: Conversation, text: str, out: TextIO
) -> bool:
    """Asks and prints the answer; False if it failed. What was answered before Ctrl-C stays in the conversation."""
    conversation.add("user", text)
    answer: list[str] = []
    ok = True
    try:
        with contextlib.closing(client.answer(model, conversation.messages)) as stream:
            for piece in stream:
                answer.append(piece)
                out.write(piece)
                out.flush()
    except KeyboardInterrupt:
        out.write(" [ended]")
    except ChatError as error:
        out.flush()
        sys.stderr.write(f"\ncaravan chat: {error}" if answer else f"caravan chat: {error}")
        ok = False
    out.write("\n")
    out.flush()
    if answer:
        conversation.add("assistant", "".join(answer))
    else:
        conversation.take_back()
    return ok
