"""Which blocks are saved, in what order, how many at a time, and under which keys."""

from __future__ import annotations

from collections.abc import Sequence

from services.engine.backend import Batch
from services.engine.key_chain import KeyChain
from services.engine.kv.keys import block_keys
from services.engine.kv.store import SaveReason
from services.engine.saving import BLOCKS_AT_AN_END, Saver, Saving
from services.engine.scripted import Script, ScriptedBackend, ScriptedShape
from tests.support.kv import NAMESPACE
from tests.support.memory_store import MemoryStore


class Rig:
    """A saver on a scripted backend with computed sequences."""

    def __init__(self) -> None:
        shape = ScriptedShape(4, 0, 0, 8192)
        self.backend = ScriptedBackend(Script(context=8192), shape, lambda _share: None)
        self.store = MemoryStore()
        self.packed: list[SaveReason] = []
        self.saver = Saver(
            self.backend, self.store, lambda _s, reason: self.packed.append(reason), lambda: 0.0
        )

    def compute(self, slot: int, tokens: Sequence[int], prompt_length: int) -> Saving:
        """A sequence that holds these tokens in its slot."""
        count = len(tokens)
        self.backend.decode(Batch(list(tokens), list(range(count)), [slot] * count, []))
        chain = KeyChain(NAMESPACE, tokens[:prompt_length])
        return Saving(chain, list(tokens), prompt_length)


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + n) % 500 for n in range(length)]


def test_blocks_of_prompt_and_answer_and_the_rest_at_the_end() -> None:
    """A block of the prompt, the one in which it ended, one of the answer, and the tail, each with its reason and its key."""
    rig = Rig()
    tokens = prompt(800)
    saving = rig.compute(0, tokens, 300)
    rig.saver.offer(saving, 0, 600)
    rig.saver.work(10)
    rig.saver.offer(saving, 0, 800, SaveReason.FINISH)
    rig.saver.work(10)
    assert rig.store.places == [
        (0, 256, SaveReason.COLD, False),
        (256, 512, SaveReason.CONTINUED, True),
        (512, 768, SaveReason.CONTINUED, False),
        (768, 800, SaveReason.FINISH, True),
    ]
    keys = [block.key for block in rig.store.blocks]
    hasher = NAMESPACE.hasher()
    root = hasher.key()
    hasher.feed(tokens)
    assert keys == [*block_keys(NAMESPACE, tokens), hasher.key()]
    assert [block.parent for block in rig.store.blocks] == [root, *keys[:-1]]
    assert [token for block in rig.store.blocks for token in block.tokens] == tokens
    assert not rig.saver.pending


def test_the_block_that_grew_over_an_earlier_tail_tells_its_tokens() -> None:
    """So that it takes the tail's place: the next turn of a chat began inside the block and its prompt ended after it."""
    rig = Rig()
    saving = rig.compute(0, prompt(600), 600)
    saving.reused = 300
    rig.saver.offer(saving, 0, 600)
    rig.saver.work(10)
    assert rig.store.places == [
        (0, 256, SaveReason.COLD, False),
        (256, 512, SaveReason.COLD, True),
    ]


def test_no_more_blocks_at_a_time_than_allowed_and_none_twice() -> None:
    """Blocks that the store holds cost nothing and do not count."""
    rig = Rig()
    first, second = rig.compute(0, prompt(1024), 1024), rig.compute(1, prompt(1100), 1100)
    rig.saver.offer(first, 0, 1024)
    for done in range(4):
        assert len(rig.packed) == done
        rig.saver.work(1)
    rig.saver.offer(second, 1, 1100, SaveReason.SHUTDOWN)
    rig.saver.work(1)
    assert rig.store.places[4:] == [(1024, 1100, SaveReason.SHUTDOWN, True)]
    assert len(rig.packed) == 5


def test_what_is_left_is_packed_when_the_cells_are_needed() -> None:
    """Up to a limit; the beginning of a chain is worth most."""
    rig = Rig()
    saving = rig.compute(0, prompt(256 * 20), 256 * 20)
    rig.saver.offer(saving, 0, 256 * 20, SaveReason.FINISH)
    rig.saver.flush(0)
    assert len(rig.store.blocks) == BLOCKS_AT_AN_END
    assert rig.store.blocks[0].start == 0
    assert not rig.saver.pending


def test_a_sequence_that_comes_back_goes_on_being_saved() -> None:
    """Swapped out, its packed blocks are saved from the packing; afterwards it is saved from its new slot."""
    rig = Rig()
    tokens = prompt(700)
    saving = rig.compute(0, tokens, 600)
    rig.saver.offer(saving, 0, 600)
    rig.saver.keep(saving, 0, 256, rig.backend.pack(0, 0, 256))
    rig.saver.keep(saving, 256, 512, rig.backend.pack(0, 256, 512))
    rig.saver.keep(saving, 512, 600, rig.backend.pack(0, 512, 600))
    rig.saver.forget(0)
    assert not rig.saver.pending
    rig.backend.share(0, 2, 700)
    rig.saver.offer(saving, 2, 700, SaveReason.FINISH)
    rig.saver.work(1)
    assert rig.store.places == [
        (0, 256, SaveReason.EVICT, False),
        (256, 512, SaveReason.EVICT, False),
        (512, 700, SaveReason.FINISH, True),
    ]


def test_keys_of_a_growing_sequence_are_those_of_its_prefixes() -> None:
    """In one pass, whatever is asked for later: the end, a boundary, or a length in between."""
    tokens = prompt(900)
    chain = KeyChain(NAMESPACE, tokens[:300])
    assert chain.block_keys() == block_keys(NAMESPACE, tokens[:300])
    for end in (300, 511, 512, 700, 900, 300, 511, 0):
        hasher = NAMESPACE.hasher()
        hasher.feed(tokens[:end])
        assert chain.key(tokens, end) == hasher.key()
    assert chain.key(tokens, 256) == block_keys(NAMESPACE, tokens)[0]
