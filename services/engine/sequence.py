"""One request's tokens on their way through the scheduler."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Owner = TypeVar("Owner")
TokenArray = NDArray[np.int32]


class Phase(Enum):
    """Where a sequence stands.

    FOLLOWING: it has a slot and waits for another sequence that is computing the same prefix. RESTORING: saved state is
    being joined. SWAPPED: its cells were needed by others; it goes on before anything new is admitted.
    """

    NEW = "new"
    WAITING = "waiting"
    FOLLOWING = "following"
    RESTORING = "restoring"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    SWAPPED = "swapped"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Piece:
    """KV state outside the cells: `state` restores tokens [start, whole_end), of which [start, end) are of use.

    `key` is the block's in the cache, and empty for what was swapped out.
    """

    start: int
    end: int
    whole_end: int
    state: memoryview
    key: bytes = b""

    @property
    def saved(self) -> bool:
        """Whether it comes from the cache."""
        return bool(self.key)


class Sequence(Generic[Owner]):
    """`tokens[:computed]` is exactly what its KV holds (S2.47, W48); `tokens[:target]` is computed before a token is chosen.

    Sequences with the same `salt` may share state, if they are `sharable`. `prompt` is the prompt as an array, for
    comparing.
    """

    __slots__ = (
        "computed",
        "far",
        "follow_end",
        "leader",
        "most_tokens",
        "order",
        "owner",
        "phase",
        "pieces",
        "prompt",
        "prompt_length",
        "restored_tokens",
        "salt",
        "session_id",
        "sharable",
        "shared_tokens",
        "slot",
        "target",
        "tokens",
    )

    def __init__(
        self,
        owner: Owner,
        prompt: Tokens[int],
        most_new_tokens: int,
        *,
        prompt_array: TokenArray | None = None,
        sharable: bool = False,
        salt: bytes = b"",
        session_id: str = "",
    ) -> None:
        self.owner = owner
        self.tokens = list(prompt)
        self.prompt = np.array(prompt, np.int32) if prompt_array is None else prompt_array
        self.prompt_length = len(prompt)
        self.most_tokens = len(prompt) + most_new_tokens
        self.target = len(prompt)
        self.computed = 0
        self.slot = -1
        self.far = False
        """Whether cells of it may lie behind those that residents may fill; see Limits."""
        self.order = -1
        self.phase = Phase.NEW
        self.sharable = sharable
        self.salt = salt
        self.session_id = session_id
        self.pieces: deque[Piece] = deque()
        self.leader: Sequence[Owner] | None = None
        self.follow_end = 0
        self.shared_tokens = 0
        self.restored_tokens = 0

    def wanted(self) -> TokenArray:
        """The tokens that are to be computed before the next one is chosen."""
        if self.target == self.prompt_length:
            return self.prompt
        return np.array(self.tokens[: self.target], np.int32)

    def held(self) -> TokenArray:
        """The tokens that its KV holds."""
        if self.computed <= self.prompt_length:
            return self.prompt[: self.computed]
        generated = self.tokens[self.prompt_length : self.computed]
        return np.concatenate([self.prompt, np.array(generated, np.int32)])

    def common_with(self, tokens: TokenArray) -> int:
        """How many leading tokens of its own, computed or not, are those of `tokens`."""
        common = common_prefix(self.prompt, tokens)
        if common < self.prompt_length or common == len(tokens):
            return common
        generated = np.array(self.tokens[common : len(tokens)], np.int32)
        return common + common_prefix(generated, tokens[common:])


def common_prefix(first: TokenArray, second: TokenArray) -> int:
    """How many leading tokens are the same."""
    length = min(len(first), len(second))
    if length == 0 or first[0] != second[0]:
        return 0
    different = first[:length] != second[:length]
    at = int(different.argmax())
    return at if different[at] else length
