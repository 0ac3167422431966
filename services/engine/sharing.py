"""Who holds, or will hold, the longest beginning of a sequence. Pure.

Only sequences of the same salt share (a tenant learns nothing of another), and only where at least `min_shared` tokens agree:
less is not worth a prefill that starts off the block boundaries.
"""

from __future__ import annotations

from collections.abc import Iterable

from services.engine.residents import Resident
from services.engine.sequence import Owner, Phase, Sequence, common_prefix

Holder = Resident | Sequence[Owner]


def best_held(
    sequence: Sequence[Owner],
    residents: Iterable[Resident],
    running: Iterable[Sequence[Owner]],
    min_shared: int,
) -> tuple[Holder[Owner] | None, int]:
    """Who holds the longest beginning now, and how many tokens. The last token is never shared: its logits are needed."""
    best: Holder[Owner] | None = None
    most = min_shared - 1
    if not sequence.sharable:
        return None, 0
    wanted = sequence.wanted()[: sequence.target - 1]
    for resident in residents:
        if resident.salt == sequence.salt:
            common = common_prefix(resident.tokens, wanted)
            if common > most:
                best, most = resident, common
    for other in running:
        if other.sharable and other.salt == sequence.salt and other.computed > most:
            common = min(other.common_with(wanted), other.computed)
            if common > most:
                best, most = other, common
    return best, most if best is not None else 0


def best_coming(
    sequence: Sequence[Owner], held: int, running: Iterable[Sequence[Owner]], min_shared: int
) -> tuple[Sequence[Owner] | None, int]:
    """Who is computing a longer beginning than can be had now (`held` tokens, and saved pieces from there on), and up to
    which token it is worth waiting for."""
    best: Sequence[Owner] | None = None
    if not sequence.sharable:
        return None, 0
    for piece in sequence.pieces:
        if piece.start <= held:
            held = max(held, piece.end)
    most = held + min_shared - 1
    wanted = sequence.wanted()[: sequence.target - 1]
    for other in running:
        comparable = other.sharable and other.salt == sequence.salt
        if comparable and other.phase is not Phase.DECODING and other.target > most:
            common = min(other.common_with(wanted), other.target)
            if common > most:
                best, most = other, common
    return best, most if best is not None else 0


# --- state that cannot be cut ------------------------------------------------------------------------------------------


def best_whole_held(
    sequence: Sequence[Owner],
    residents: Iterable[Resident],
    running: Iterable[Sequence[Owner]],
    min_shared: int,
) -> tuple[Holder[Owner] | None, int]:
    """As best_held, of those who hold exactly a beginning; nobody where a saved state is longer."""
    best: Holder[Owner] | None = None
    if not sequence.sharable:
        return None, 0
    most = max([min_shared, *(piece.end for piece in sequence.pieces)]) - 1
    wanted = sequence.wanted()[: sequence.target - 1]
    for resident in residents:
        length = len(resident.tokens)
        same_tenant = resident.salt == sequence.salt
        if same_tenant and length > most and common_prefix(resident.tokens, wanted) == length:
            best, most = resident, length
    for other in running:
        length = other.computed
        comparable = other.sharable and other.salt == sequence.salt
        if comparable and length > most and other.common_with(wanted) >= length:
            best, most = other, length
    return best, most if best is not None else 0


def best_whole_coming(
    sequence: Sequence[Owner],
    held: int,
    running: Iterable[Sequence[Owner]],
    min_shared: int,
    block_tokens: int,
) -> tuple[Sequence[Owner] | None, int]:
    """As best_coming, up to a length at which the other one will stand between two batches: a block boundary, or all of its
    prompt but the last token."""
    best: Sequence[Owner] | None = None
    if not sequence.sharable:
        return None, 0
    most = max([held, *(piece.end for piece in sequence.pieces)]) + min_shared - 1
    wanted = sequence.wanted()[: sequence.target - 1]
    for other in running:
        comparable = other.sharable and other.salt == sequence.salt
        if comparable and other.phase is not Phase.DECODING and other.target > most:
            end = min(other.common_with(wanted), other.target - 1)
            if end < other.target - 1:
                end -= end % block_tokens
            if end > max(most, other.computed):
                best, most = other, end
    return best, most if best is not None else 0
