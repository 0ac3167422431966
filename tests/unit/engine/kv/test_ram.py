"""The RAM tier: the quota holds, leaves go first, what is used stays, and every change is told."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.engine.kv.ram import OVERHEAD_BYTES, RamTier, common_prefix, worth
from services.engine.kv.store import SavedBlock
from tests.support.kv import NAMESPACE, chain_of, prompt_of, whole_of

STATE = 10_000
SIZE = STATE + OVERHEAD_BYTES


def keys_of(blocks: Sequence[SavedBlock]) -> list[bytes]:
    return [block.key for block in blocks]


def filled(ram: RamTier, blocks: Sequence[SavedBlock]) -> RamTier:
    for block in blocks:
        assert ram.put(block, 1.0)
    return ram


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_common_prefix_is_that_of_a_plain_loop(one: list[int], other: list[int]) -> None:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    assert common_prefix(tuple(one), tuple(other)) == length


def test_worth_grows_with_use_and_depth_and_shrinks_with_size() -> None:
    base = worth(1, 256, 256, 1 << 20)
    assert worth(2, 256, 256, 1 << 20) > base
    assert worth(1, 256, 8192, 1 << 20) > base
    assert worth(1, 256, 256, 2 << 20) < base
    assert worth(10_000, 256, 256, 1 << 20) == worth(64, 256, 256, 1 << 20)


def test_a_chain_is_found_up_to_its_first_hole() -> None:
    blocks = chain_of(prompt_of(1, 256 * 4), state_bytes=STATE)
    ram = filled(RamTier(10 * SIZE), [blocks[0], blocks[1], blocks[3]])
    assert ram.chain(keys_of(blocks)) == blocks[:2]
    assert ram.chain(keys_of(blocks[2:])) == []
    assert ram.bytes == 3 * SIZE


def test_whole_states_stand_beside_each_other_and_tell_their_lengths() -> None:
    """A longer one takes no shorter one's place; the lengths are those of the last that came."""
    prompt = prompt_of(1, 900)
    states = [whole_of(prompt, end, state_bytes=STATE) for end in (300, 512, 700)]
    ram = filled(RamTier(10 * SIZE), states)
    assert all(ram.chain([state.key]) == [state] for state in states)
    assert (ram.whole_lengths(10), ram.whole_lengths(2)) == ({300, 512, 700}, {512, 700})
    blocks = filled(RamTier(10 * SIZE), chain_of(prompt, state_bytes=STATE))
    assert blocks.whole_lengths(10) == set()


def test_states_are_not_copied() -> None:
    block = chain_of(prompt_of(1, 256))[0]
    ram = filled(RamTier(1 << 20), [block])
    assert ram.chain([block.key])[0].state is block.state


def test_the_longest_matching_sibling_is_found() -> None:
    prompt = prompt_of(1, 300)
    short, long = chain_of([*prompt, 1, 2]), chain_of([*prompt[:280], 9, 9, 9])
    ram = filled(RamTier(1 << 20), [short[0], short[1], long[1]])
    parent = short[0].key
    assert ram.partial(parent, prompt[256:]) == (short[1], 44)
    assert ram.partial(parent, [*prompt[256:280], 9]) == (long[1], 25)
    assert ram.partial(parent, [1, 2, 3]) is None
    assert ram.partial(NAMESPACE.root_key(), prompt[:10]) == (short[0], 10)


def test_a_longer_tail_supersedes_the_one_that_it_continues() -> None:
    prompt = prompt_of(1, 400)
    ram = filled(RamTier(1 << 20), chain_of(prompt[:300]))
    other = chain_of([*prompt[:290], 7])[1]
    assert ram.put(other, 1.0)
    longer = chain_of(prompt)
    assert ram.put(longer[1], 1.0)
    assert {entry.block.key for entry in ram.entries()} == {longer[0].key, longer[1].key, other.key}
    ram.check_integrity()


def test_leaves_go_first_and_the_front_of_a_chain_stays() -> None:
    blocks = chain_of(prompt_of(1, 256 * 8), state_bytes=STATE)
    ram = RamTier(5 * SIZE)
    kept = [ram.put(block, 1.0) for block in blocks]
    assert kept == [True] * 5 + [False] * 3  # Nothing but the new block's own ancestors could go.
    other = chain_of(prompt_of(2, 256), state_bytes=STATE)[0]
    assert ram.put(other, 1.0)
    assert ram.chain(keys_of(blocks)) == blocks[:4]
    assert ram.evictions == 1


def test_what_is_used_outlives_what_is_not_and_old_fame_fades() -> None:
    famous, *others = (chain_of(prompt_of(n, 256), state_bytes=STATE)[0] for n in range(400))
    ram = filled(RamTier(4 * SIZE), [famous])
    for _ in range(20):
        ram.chain([famous.key])
    for block in others[:10]:
        assert ram.put(block, 1.0)
        assert famous.key in ram
    for block in others[10:]:
        assert ram.put(block, 1.0)
    assert famous.key not in ram


def test_a_block_larger_than_the_quota_is_refused_and_drives_nothing_out() -> None:
    small = chain_of(prompt_of(1, 256), state_bytes=STATE)[0]
    ram = filled(RamTier(2 * SIZE), [small])
    assert not ram.put(chain_of(prompt_of(2, 256), state_bytes=3 * SIZE)[0], 1.0)
    assert small.key in ram
    assert not RamTier(0).put(small, 1.0)


def test_changes_are_told_once_and_only_while_somebody_listens() -> None:
    called: list[int] = []
    ram = RamTier(2 * SIZE, lambda: called.append(1))
    one, two, three = (chain_of(prompt_of(n, 256), state_bytes=STATE)[0] for n in range(3))
    filled(ram, [one])
    assert [entry.block for entry in ram.watch()] == [one]
    filled(ram, [two, three])
    told = ram.changes()
    assert [entry.block for entry in told.added] == [two, three]
    assert told.removed == [one.key]
    assert not ram.changes().added
    assert called
    ram.unwatch()
    ram.drop([two.key, three.key, bytes(32)])
    assert not ram.changes().removed
    assert ram.bytes == len(ram) == 0


def test_threads() -> None:
    """Putting, finding and dropping at once keeps the books in order."""
    chains = [chain_of(prompt_of(n, 256 * 6), state_bytes=STATE) for n in range(6)]
    ram = RamTier(12 * SIZE)

    def work(number: int) -> None:
        for turn in range(60):
            chain = chains[(number + turn) % len(chains)]
            for block in chain:
                ram.put(block, 1.0)
            for found in ram.chain(keys_of(chain)):
                assert found.state
            if turn % 7 == 0:
                ram.drop(keys_of(chain[2:]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ram.check_integrity()


class RamMachine(RuleBasedStateMachine):
    """Any order of operations on a few sequences that share prefixes."""

    SEQUENCES = tuple(
        chain_of([*prompt_of(1, shared), *prompt_of(2 + n, own)], state_bytes=1_000 * (1 + n))
        for n, (shared, own) in enumerate([(0, 700), (300, 400), (512, 100), (512, 130), (700, 90)])
    )

    def __init__(self) -> None:
        super().__init__()
        self.ram = RamTier(60_000)
        self.told: set[bytes] = set()
        self.ram.watch()

    @rule(sequence=st.sampled_from(range(5)), index=st.integers(0, 3))
    def put(self, sequence: int, index: int) -> None:
        blocks = self.SEQUENCES[sequence]
        block = blocks[min(index, len(blocks) - 1)]
        was_here = block.key in self.ram
        assert self.ram.put(block, 1.0) == (not was_here and block.key in self.ram)

    @rule(sequence=st.sampled_from(range(5)))
    def find(self, sequence: int) -> None:
        blocks = self.SEQUENCES[sequence]
        found = self.ram.chain(keys_of(blocks))
        assert keys_of(found) == keys_of(blocks[: len(found)])
        assert len(found) == len(blocks) or blocks[len(found)].key not in self.ram

    @rule(sequence=st.sampled_from(range(5)), index=st.integers(0, 3))
    def drop(self, sequence: int, index: int) -> None:
        blocks = self.SEQUENCES[sequence]
        self.ram.drop([blocks[min(index, len(blocks) - 1)].key])

    @rule()
    def tell(self) -> None:
        changes = self.ram.changes()
        self.told |= {entry.block.key for entry in changes.added}
        self.told -= set(changes.removed)
        assert self.told == {entry.block.key for entry in self.ram.entries()}

    @invariant()
    def the_books_agree(self) -> None:
        self.ram.check_integrity()


TestRamMachine = RamMachine.TestCase
TestRamMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
