"""What `caravan up` prints: one line that is rewritten on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from typing import TextIO

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


def ready_text(plan: Plan, served: tuple[str, ...]) -> str:
    """What to print when it is ready: where it is and how to use it. `served` are the models that can be asked for."""
    model = served[0]
    count = plan.options.engines
    engines = f"{count} engine{'s' if count > 1 else ''}{' each' if len(served) > 1 else ''}"
    return f"""\
Caravan is ready.

  OpenAI API  {plan.url}/v1
  gRPC        127.0.0.1:{plan.ports.public}  (caravan.inference.v1.InferenceService; reflection is on)
  models      {", ".join(served)}  ({engines})
  state       {plan.options.state_dir}  (endpoints.json, logs/)

Try it:

  curl {plan.url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello, who are you?"}}]}}'

In Python, with `pip install openai`:

  from openai import OpenAI
  client = OpenAI(base_url="{plan.url}/v1", api_key="none")
  answer = client.chat.completions.create(
      model="{model}", messages=[{{"role": "user", "content": "Tell me a story."}}], stream=True
  )
  for chunk in answer:
      print(chunk.choices[0].delta.content or "", end="", flush=True)

Ctrl-C finishes what runs and stops everything."""
