"""Sums of requests and tokens over the last seconds, in bounded room. Pure."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

STEPS: Final = 20
"""Steps in which a span is forgotten: sums are of the last span, give or take one step."""


class Lately:
    """Sums over the last `span_s` seconds. What is added may be negative: a correction."""

    def __init__(self, span_s: float) -> None:
        self._step_s = span_s / STEPS
        self._steps: deque[tuple[int, int, int]] = deque()
        self._requests = 0
        self._tokens = 0

    def add(self, requests: int, tokens: int, now: float) -> None:
        """Adds to the present step."""
        step = self._forget(now)
        self._requests += requests
        self._tokens += tokens
        if self._steps and self._steps[-1][0] == step:
            _, requests_before, tokens_before = self._steps.pop()
            requests, tokens = requests + requests_before, tokens + tokens_before
        self._steps.append((step, requests, tokens))

    def totals(self, now: float) -> tuple[int, int]:
        """Requests and tokens, not below 0: what was corrected may have been forgotten before."""
        self._forget(now)
        return max(0, self._requests), max(0, self._tokens)

    def _forget(self, now: float) -> int:
        step = math.floor(now / self._step_s)
        while self._steps and self._steps[0][0] <= step - STEPS:
            _, requests, tokens = self._steps.popleft()
            self._requests -= requests
            self._tokens -= tokens
        return step
