"""At which lengths a state that cannot be cut is saved, and under which keys."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.engine.backend import Batch, StateError
from services.engine.key_chain import KeyChain
from services.engine.kv.keys import prefix_keys
from services.engine.kv.store import SaveReason
from services.engine.scripted import Script, ScriptedBackend, ScriptedShape
from services.engine.sequence import Sequence
from services.engine.whole_saving import WholeSaver
from tests.support.kv import NAMESPACE, prompt_of
from tests.support.memory_store import MemoryStore


class Rig:
    """A saver on a scripted backend."""

    def __init__(self) -> None:
        shape = ScriptedShape(4, 0, 0, 8192)
        self.backend = ScriptedBackend(Script(context=8192), shape, lambda _share: None)
        self.store = MemoryStore()
        self.packed: list[SaveReason] = []
        self.saver: WholeSaver[str] = WholeSaver(
            self.backend, self.store, lambda _s, reason: self.packed.append(reason), lambda: 0.0
        )

    def prefill(self, prompt: list[int], salt: bytes = b"") -> Sequence[str]:
        """Computes a prompt as the scheduler cuts it; the saver sees each chunk."""
        prompt = [token % 256 for token in prompt]
        sequence = Sequence("", prompt, 100, sharable=True, salt=salt)
        sequence.slot = 0
        self.backend.clear(0)
        self.chain = KeyChain(NAMESPACE.salted(salt), prompt)
        for end in chunk_ends(len(prompt)):
            self.compute(sequence, end)
            self.saver.prefilled(sequence, self.chain)
        return sequence

    def compute(self, sequence: Sequence[str], end: int) -> None:
        """Computes a sequence as far as `end`."""
        start, count = sequence.computed, end - sequence.computed
        tokens = sequence.tokens[start:end]
        self.backend.decode(Batch(tokens, list(range(start, end)), [0] * count, [count - 1]))
        sequence.computed = end

    def take(self) -> list[int]:
        """The lengths saved since the last look."""
        ends = [block.end for block in self.store.blocks]
        self.store.blocks = []
        return ends


def chunk_ends(length: int) -> Iterator[int]:
    """Where chunks end: at blocks, before the last token, and behind it."""
    yield from (end for end in range(256, length - 1, 256))
    yield from (end for end in (length - 1, length) if end)


@pytest.mark.parametrize(
    ("length", "saved"),
    [
        *[(1, []), (2, [1]), (100, [99]), (256, [255]), (257, [256]), (258, [256, 257])],
        *[(512, [256, 511]), (513, [512]), (700, [512, 699]), (769, [768])],
    ],
)
def test_a_prompt_is_saved_at_its_last_boundary_and_before_its_last_token(
    length: int, saved: list[int]
) -> None:
    """Once each; where both are one length, once."""
    rig = Rig()
    sequence = rig.prefill(prompt_of(1, length))
    for block in rig.store.blocks:
        (key,) = prefix_keys(NAMESPACE, sequence.tokens, [block.end])
        assert (block.key, block.parent) == (key, NAMESPACE.root_key())
        assert (block.start, block.whole, block.partial) == (0, True, False)
        assert block.tokens == tuple(sequence.tokens[: block.end][-256:])
        assert len(block.state) == 8 + 4 * block.end
    assert rig.packed == [SaveReason.COLD] * len(saved)
    assert rig.take() == saved


def test_an_end_is_saved_once() -> None:
    """Under the key that the next turn may name; what the store has is not packed again."""
    rig = Rig()
    sequence = rig.prefill(prompt_of(2, 300))
    sequence.tokens += [1, 2, 3]
    rig.compute(sequence, 302)
    for _ in range(2):
        assert rig.saver.finished(sequence, rig.chain, SaveReason.FINISH)
    assert [block.reason for block in rig.store.blocks[2:]] == [SaveReason.FINISH]
    assert rig.take() == [256, 299, 302]


def test_where_a_second_prompt_parts_from_the_first_is_saved() -> None:
    """At the boundary before, if it is not the last one of the prompt anyway; of other tenants nothing is known."""
    rig = Rig()
    first = prompt_of(3, 1_000)
    rig.prefill(first)
    assert rig.take() == [768, 999]
    for common, saved in ((255, []), (256, [256]), (600, [512]), (800, [])):
        rig.prefill([*first[:common], *prompt_of(4 + common, 900 - common)])
        assert rig.take() == [*saved, 768, 899], common
    rig.prefill(first, salt=b"tenant")
    assert rig.take() == [768, 999]


def test_a_state_that_cannot_be_packed_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its key is told to nobody."""
    rig = Rig()

    def refuse(*_arguments: object) -> memoryview:
        raise StateError("not now")

    monkeypatch.setattr(rig.backend, "pack", refuse)
    sequence = rig.prefill(prompt_of(5, 300))
    assert not rig.saver.finished(sequence, rig.chain, SaveReason.FINISH)
    assert rig.take() == []
