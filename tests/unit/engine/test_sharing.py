"""What sequences share: cells of residents and of each other, saved blocks; and how long residents stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from services.engine.sequence import Phase, Sequence
from tests.support.cell_memory import piece
from tests.support.scheduler import LIMITS, SHARING, Rig


def test_the_next_turn_goes_on_in_the_slot_of_the_last() -> None:
    """A prompt that extends what is resident takes its slot over: nothing is copied, only the rest is computed."""
    rig = Rig(SHARING)
    first = rig.add(list(range(20)))
    slot = rig.scheduler.limits.max_sequences and first.slot
    held = rig.finish(first, 5)
    assert len(held) == 24
    assert rig.scheduler.resident_cells == 24
    second = rig.add([*held, 7, 8, 9])
    assert (second.slot, second.computed, second.shared_tokens) == (slot, 24, 24)
    assert rig.scheduler.residents == 0
    assert [span[1] for span in rig.run()] == [[24, 25]]


def test_a_turn_that_was_rendered_anew_shares_up_to_where_it_differs() -> None:
    """The common part is shared and the rest computed, not all of it (W52); what was resident stays."""
    rig = Rig(SHARING)
    held = rig.finish(rig.add(list(range(20))), 5)
    second = rig.add([*held[:15], 500, 501])
    assert second.computed == 15
    assert rig.scheduler.residents == 1
    assert rig.scheduler.free_cells == 200 - 24


def test_the_same_prompt_again_computes_its_last_token_only() -> None:
    """The logits of the last token are of an older batch, so it is computed again (W53)."""
    rig = Rig(SHARING)
    rig.finish(rig.add(list(range(20))), 5)
    again = rig.add(list(range(20)))
    assert again.computed == 19
    assert rig.run() == [(again.slot, [19], 1)]


def test_the_same_prompt_at_once_is_computed_once() -> None:
    """Those who come while it is computed wait for it, also for a part of it; each computes its own rest."""
    rig = Rig(SHARING)
    prompt = list(range(20))
    crowd = [rig.add(prompt), rig.add(prompt), rig.add([*prompt[:17], 70, 71, 72])]
    while rig.scheduler.prefilling:
        rig.run()
    assert rig.prefilled == 20 + 1 + 3
    assert [s.shared_tokens for s in crowd] == [0, 19, 17]
    assert rig.scheduler.free_cells == 200 - rig.memory.used
    for sequence in crowd:
        assert rig.memory.tokens(sequence.slot) == sequence.tokens[: sequence.computed]


def test_who_waited_for_another_takes_what_there_is_when_that_one_leaves() -> None:
    """The leader is cancelled half-way: its follower goes on from there."""
    rig = Rig(SHARING)
    leader, follower = rig.add(list(range(20))), rig.add(list(range(20)))
    rig.run()
    assert follower.phase is Phase.FOLLOWING
    rig.scheduler.end(leader, 0)
    assert (follower.phase, follower.computed) == (Phase.PREFILLING, 8)


def test_tenants_share_nothing() -> None:
    """Neither what is resident nor what is being computed."""
    rig = Rig(SHARING)
    prompt = list(range(20))
    rig.finish(rig.add(prompt, salt=b"a"), 5)
    assert rig.add(prompt, salt=b"b").computed == 0
    assert rig.add(prompt, salt=b"a").computed == 19
    assert rig.add(prompt, salt=b"c").phase is Phase.PREFILLING


def test_a_short_common_beginning_is_not_worth_sharing() -> None:
    """Every chat begins with the same few tokens."""
    rig = Rig(SHARING)
    rig.finish(rig.add(list(range(20))), 5)
    assert rig.add([0, 1, 2, *range(50, 60)]).computed == 0


def test_saved_blocks_go_on_where_the_cells_end() -> None:
    """What is resident is shared, what was saved is joined behind it, the rest is computed. Blocks that do not connect, or
    that are refused, are computed."""
    rig = Rig(SHARING)
    prompt = list(range(30))

    def warm(*starts: int) -> Sequence[str]:
        rig.finish(rig.add(prompt[:10]), 1)
        sequence = Sequence("", prompt, 8, sharable=True)
        sequence.pieces.extend(piece(prompt[at : at + 8], at, saved=True) for at in starts)
        rig.scheduler.submit(sequence, 0)
        rig.run()
        rig.scheduler.end(sequence, 0)
        return sequence

    connected = warm(8, 16)
    assert (connected.shared_tokens, connected.restored_tokens) == (10, 14)
    apart = warm(16)
    assert (apart.shared_tokens, apart.restored_tokens) == (10, 0)
    rig.memory.refuse = True
    refused = warm(8, 16)
    assert (refused.shared_tokens, refused.restored_tokens, refused.computed) == (10, 0, 16)


def test_residents_of_sessions_stay_longest_and_not_for_ever() -> None:
    """Others go first; a session that was not used for long is like any other."""
    rig = Rig(SHARING)
    kept = [*range(20)]
    rig.finish(rig.add(kept, session="s"), 1)
    for base in (100, 200, 300):
        rig.finish(rig.add([base + n for n in range(20)]), 1)
    assert rig.scheduler.residents == 2
    assert rig.add([*kept, 1, 2]).computed == 20, "older than all others, and still there"
    rig = Rig(SHARING)
    rig.finish(rig.add(kept, session="s"), 1)
    rig.now = 61
    for base in (100, 200):
        rig.finish(rig.add([base + n for n in range(20)]), 1)
    assert rig.add([*kept, 1, 2]).computed == 0


def test_a_session_keeps_its_last_turn_until_it_is_ended() -> None:
    """One resident per session; ending it frees the cells, ending it again frees nothing."""
    rig = Rig(SHARING)
    rig.finish(rig.add(list(range(20)), session="s"), 1)
    rig.finish(rig.add(list(range(50, 70)), session="s"), 1)
    assert rig.scheduler.residents == 1
    assert rig.scheduler.end_session(b"", "s")
    assert rig.scheduler.free_cells == 200
    assert not rig.scheduler.end_session(b"", "s")


def test_residents_give_way_before_anybody_waits_or_is_swapped_out() -> None:
    """A prompt that needs their cells gets them."""
    rig = Rig(replace(SHARING, cells=64))
    rig.finish(rig.add(list(range(30))), 4)
    large = rig.add(list(range(100, 150)), 14)
    assert rig.finish(large, 14) == large.tokens[:-1]
    assert rig.scheduler.swapped_out == 0


def test_a_resident_that_is_shared_in_part_gives_the_rest_way() -> None:
    """Else a prompt could wait for ever for the cells of what it shares four tokens with."""
    rig = Rig(replace(SHARING, cells=64))
    rig.finish(rig.add([*range(4), *range(100, 118)]), 1)
    assert rig.scheduler.resident_cells == 22
    large = rig.add(list(range(40)), 9)
    assert (large.phase, large.shared_tokens) == (Phase.PREFILLING, 4)
    assert rig.finish(large, 9) == large.tokens[:-1]


def test_a_state_is_restored_only_where_there_is_room_for_all_of_it() -> None:
    """While it is joined it takes cells for tokens that are of no use; without room for these, the rest is computed."""
    rig = Rig(LIMITS)
    rig.add(10, 54)
    rig.run()
    sequence = Sequence("", range(5), 8, sharable=True)
    sequence.pieces.append(piece([0, 1, 2, 3], saved=True, beyond=56))
    rig.scheduler.submit(sequence, 0)
    rig.run()
    assert (sequence.restored_tokens, sequence.computed > 0) == (0, True)


def test_what_lies_far_back_does_not_stay() -> None:
    """Computed beside much else, its cells are behind many: every later step would pay for all of these."""
    rig = Rig(replace(SHARING, resident_cells=25))
    first, second = rig.add(list(range(30))), rig.add(list(range(100, 130)))
    for sequence in (first, second):
        while sequence.phase is not Phase.DECODING:
            rig.run()
    rig.scheduler.end(first, 0, keep=True)
    rig.scheduler.end(second, 0, keep=True)
    assert rig.scheduler.residents == 0
    rig.finish(rig.add(list(range(20))), 1)
    assert rig.scheduler.residents == 1


def test_residents_hold_no_more_cells_than_they_may() -> None:
    """The least recently used goes; one that is too large by itself does not stay."""
    rig = Rig(replace(SHARING, resident_cells=30))
    rig.finish(rig.add(list(range(20))), 1)
    rig.finish(rig.add(list(range(50, 70))), 1)
    assert (rig.scheduler.residents, rig.scheduler.resident_cells) == (1, 20)
    rig.finish(rig.add(list(range(100, 140))), 1)
    assert rig.scheduler.residents == 0


WHOLE = replace(SHARING, whole_states=True)


def whole_rig() -> Rig:
    """A rig whose state cannot be cut."""
    rig = Rig(WHOLE)
    rig.memory.whole = True
    return rig


def test_a_state_that_cannot_be_cut_is_gone_on_from_as_it_is() -> None:
    """By one who continues all of it, in its slot; not by one who wants less, and not by another tenant."""
    rig = whole_rig()
    held = rig.finish(rig.add(list(range(20))), 5)
    turn = [*held, 7, 8, 9]
    for other in (rig.add(held), rig.add([*held[:15], 500]), rig.add(turn, salt=b"other")):
        assert other.computed == 0
        rig.scheduler.end(other, 0)
    second = rig.add(turn)
    assert (second.computed, second.shared_tokens, rig.scheduler.residents) == (24, 24, 0)
    assert [span[1] for span in rig.run()] == [[24, 25]]


def test_whose_state_cannot_be_cut_is_waited_for_where_it_will_stand() -> None:
    """By the same prompt up to its last token, by one that parts from it up to the boundary before; not by others."""
    rig = whole_rig()
    prompt = list(range(20))
    crowd = [rig.add(prompt), rig.add(prompt), rig.add([*prompt[:18], 70, 71, 72])]
    assert rig.scheduler.known == ()
    while rig.scheduler.prefilling:
        rig.run()
    # Blocks have 8 tokens here.
    assert [s.shared_tokens for s in crowd] == [0, 19, 16]
    assert rig.prefilled == 20 + 1 + 5
    for sequence in crowd:
        assert rig.memory.tokens(sequence.slot) == sequence.tokens[: sequence.computed]
    for late in (rig.add([*prompt[:7], 90, 91, 92]), rig.add(prompt, salt=b"other")):
        assert late.phase is not Phase.FOLLOWING


def test_who_waits_in_vain_for_a_state_that_cannot_be_cut_goes_on_alone() -> None:
    """The other one ends before, or is past the length already."""
    rig = whole_rig()
    leader = rig.add([*range(20), 50, 51])
    follower = rig.add([*range(20), 60, 61])
    assert (follower.phase, follower.follow_end) == (Phase.FOLLOWING, 16)
    rig.scheduler.end(leader, 0)
    rig.run()
    assert follower.computed > 0
    late = rig.add([*range(15), 80, 81, 82])
    while rig.scheduler.prefilling:
        rig.run()
    assert late.shared_tokens in {0, 8}
    assert rig.memory.tokens(late.slot) == late.tokens[: late.computed]


def test_a_longer_saved_state_is_preferred_to_a_resident_and_an_equal_one_is_not() -> None:
    """What is in the cells needs no copy."""
    for length, joins in ((24, 0), (26, 1)):
        rig = whole_rig()
        held = rig.finish(rig.add(list(range(20))), 5)
        prompt = [*held, *range(300, 310)]
        sequence = Sequence("", prompt, 4, sharable=True)
        sequence.pieces.append(piece(prompt[:length], saved=True))
        rig.scheduler.submit(sequence, 0)
        rig.run()
        assert (rig.memory.joins, rig.scheduler.residents) == (joins, joins)
        assert sequence.restored_tokens == length * joins
        assert rig.memory.tokens(sequence.slot) == prompt[: sequence.computed]


def test_what_the_cells_hold_of_a_prompt_is_told_as_it_can_be_used() -> None:
    """All that is in common where state can be cut; else the whole of a finished sequence, or nothing."""
    for limits, common in ((SHARING, 18), (WHOLE, 0)):
        rig = Rig(limits)
        held = rig.finish(rig.add(list(range(20))), 5)
        longer, differs = np.array([*held, 1]), np.array([*held[:18], 900, 901])
        assert rig.scheduler.reusable(b"", longer) == len(held)
        assert rig.scheduler.reusable(b"", differs) == common
        assert rig.scheduler.reusable(b"tenant", longer) == 0
        same_prompt = rig.scheduler.reusable(b"", np.array(held))
        assert same_prompt == (0 if limits is WHOLE else len(held))
