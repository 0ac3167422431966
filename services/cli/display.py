"""What `caravan up` prints: one line that is rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from typing import Final, TextIO

from services.cli.plan import Plan


class Display:
    """Writes to `out`. Lines of the progress are shown again only when they changed."""

    def __init__(self, out: TextIO, columns: Callable[[], int] | None = None) -> None:
        self._out = out
        self.terminal = out.isatty()
        self._columns = columns or (lambda: shutil.get_terminal_size().columns)
        self._progress = ""

    def say(self, line: str) -> None:
        """Prints a line; on a terminal the progress stays below it."""
        progress = self._progress
        self._clear()
        self._write(line + "\n")
        if self.terminal and progress:
            self.progress(progress)

    def progress(self, line: str) -> None:
        """Shows how far the start is."""
        if line == self._progress:
            return
        self._clear()
        self._write(line[: max(10, self._columns() - 1)] if self.terminal else line + "\n")
        self._progress = line

    def done(self) -> None:
        """Takes the progress away."""
        self._clear()

    def _clear(self) -> None:
        if self.terminal and self._progress:
            self._write("\r\x1b[2K")
            self._progress = ""

    def _write(self, text: str) -> None:
        # A reader or terminal that went away must not keep the processes from being stopped in order.
        with contextlib.suppress(OSError):
            self._out.write(text)
            self._out.flush()


_END: Final = "Ctrl-C finishes what runs and stops everything."


def ready_text(plan: Plan, served: Mapping[str, int]) -> str:
    """What to print when it is ready: where it is and how to use it. `served` are the engines of each model that answers."""
    if not served:
        return f"{_where(plan, 'none yet: `caravan deploy FILE` adds some')}\n{_END}"
    counts = set(served.values())
    alike = len(counts) == 1
    count = counts.pop() if alike else sum(served.values())
    each = " each" if alike and len(served) > 1 else ""
    models = f"{', '.join(served)}  ({count} engine{'s' if count > 1 else ''}{each})"
    return f"{_where(plan, models)}\n{_examples(plan.url, next(iter(served)))}\n{_END}"


def _where(plan: Plan, models: str) -> str:
    return f"""\
Caravan is ready.

  OpenAI API  {plan.url}/v1
  gRPC        127.0.0.1:{plan.ports.public}  (caravan.inference.v1.InferenceService; reflection is on)
  models      {models}
  state       {plan.options.state_dir}  (endpoints.json, logs/)
"""


def _examples(url: str, model: str) -> str:
    return f"""\
Try it:

  curl {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello, who are you?"}}]}}'

In Python, with `pip install openai`:

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  answer = client.chat.completions.create(
      model="{model}", messages=[{{"role": "user", "content": "Tell me a story."}}], stream=True
  )
  for chunk in answer:
      print(chunk.choices[0].delta.content or "", end="", flush=True)
"""
