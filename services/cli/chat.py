"""`caravan chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Asked:
    """The options of the command; None leaves the choice to the server."""

    url: str
    model: str | None = None
    system: str | None = None
    temperature: float | None = None


def chat(asked: Asked, source: TextIO, out: TextIO) -> int:
    """Runs the command; returns the exit code: 1 if the server cannot be reached or, from a pipe, an answer failed."""
    interactive = source.isatty() and out.isatty()
    with ChatClient(asked.url) as client:
        try:
            model = asked.model or _first(client.models())
        except ChatError as error:
            sys.stderr.write(f"caravan chat: {error}\n")
            return 1
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  gives input() line editing and a history
            out.write(f"Talking to {model}. /help lists the commands.\n")
        talk = _Talk(client, model, asked, out)
        return talk.run(_typed(out) if interactive else source, strict=not interactive)


def _first(models: list[str]) -> str:
    if not models:
        raise ChatError("the server has no models")
    return models[0]


def _typed(out: TextIO) -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            out.write("\n")  # Ctrl-C at the prompt drops the line
        except EOFError:
            out.write("\n")
            return


class _Talk:
    """One run: the lines of the user and the answers to them."""

    def __init__(self, client: ChatClient, model: str, asked: Asked, out: TextIO) -> None:
        self._client = client
        self._model = model
        self._temperature = asked.temperature
        self._out = out
        self._conversation = Conversation(asked.system)

    def run(self, lines: Iterable[str], *, strict: bool) -> int:
        """Takes the lines; with `strict`, as from a pipe, ends with 1 at the first answer that failed."""
        for line in lines:
            text = line.strip()
            if text == "/exit":
                break
            if text == "/reset":
                self._conversation.reset()
            elif text == "/help":
                self._out.write(_HELP + "\n")
            elif text.startswith("/") and not strict:
                self._out.write(f"{text.split()[0]} is no command; /help lists them.\n")
            elif text and not self._take_turn(text) and strict:
                return 1
        return 0

    def _take_turn(self, text: str) -> bool:
        """Asks and prints the answer; False if it failed. What came before Ctrl-C stays in the conversation."""
        conversation, out = self._conversation, self._out
        conversation.add("user", text)
        answer: list[str] = []
        ok = True
        asking = self._client.answer(self._model, conversation.messages, self._temperature)
        try:
            with contextlib.closing(asking) as stream:
                for piece in stream:
                    answer.append(piece)
                    out.write(piece)
                    out.flush()
        except KeyboardInterrupt:
            out.write(" [ended]")
        except ChatError as error:
            out.flush()
            sys.stderr.write(("\n" if answer else "") + f"caravan chat: {error}")
            ok = False
        out.write("\n")
        out.flush()
        if answer:
            conversation.add("assistant", "".join(answer))
        else:
            conversation.take_back()
        return ok
