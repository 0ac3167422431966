"""What is decoded next: pure continuous batching over sequence slots and KV cells.

A sequence is admitted when there are cells for its prompt and a little more; prefixes that the cells already hold are shared,
and a prefix that another sequence is computing is waited for. When cells run out, finished sequences go first, and then the
youngest sequence is swapped out; it goes on before anything new is admitted. The oldest is never swapped out, and a request
alone always fits, so somebody always progresses and everybody ends.
"""

from __future__ import annotations

import bisect
from typing import Final

from services.engine.batching import Limits, Step, chunk_end, prefill_budget
from services.engine.kv_space import KvMemory
from services.engine.residents import Resident
from services.engine.scheduler_state import SchedulerState
from services.engine.sequence import Owner, Phase, Sequence
from services.engine.sharing import (
    Holder,
    best_coming,
    best_held,
    best_whole_coming,
    best_whole_held,
)

RESERVE_TOKENS: Final = 16
"""Cells per sequence that must be left at an admission, so that what is admitted is not swapped out at once."""
JOIN_TOKENS_BESIDE_ROWS: Final = 1024
"""Tokens restored between two steps while others decode: some milliseconds."""
JOIN_TOKENS_ALONE: Final = 8192
"""Tokens restored at a time when nobody decodes; a cancel is heard in between."""


class QueueFullError(Exception):
    """The waiting queue holds as many requests as it may."""


class TooLargeError(Exception):
    """The request needs more cells than there are."""


class Scheduler(SchedulerState[Owner]):
    """Owns the order of requests. `plan` makes everything ready and returns the next batch. Times are in seconds."""

    def __init__(self, limits: Limits, memory: KvMemory[Owner]) -> None:
        super().__init__(limits, memory)
        self._orders = 0
        self._freed = 0
        self._stuck: tuple[Sequence[Owner] | None, int] = (None, 0)
        self._now = 0.0

    # Arrivals and endings.

    def submit(self, sequence: Sequence[Owner], now: float) -> None:
        """Queues a sequence. Raises QueueFullError or TooLargeError."""
        if not sequence.tokens:
            raise ValueError("a prompt has at least one token")
        if sequence.most_tokens > self.limits.cells:
            raise TooLargeError
        self._now = now
        self._orders += 1
        sequence.order = self._orders
        sequence.phase = Phase.WAITING
        self._waiting.append(sequence)
        self._admit()
        if sequence.phase is Phase.WAITING and len(self._waiting) > self.limits.max_waiting:
            self._waiting.pop()
            sequence.phase = Phase.ENDED
            raise QueueFullError
        self._publish()

    def end(self, sequence: Sequence[Owner], now: float, *, keep: bool = False) -> bool:
        """Takes a sequence out, wherever it stands. With `keep` its cells may stay as a resident's; says whether they do."""
        self._now = now
        kept = False
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        elif sequence.phase is Phase.SWAPPED:
            self._swapped.remove(sequence)
        elif sequence.slot >= 0:
            self._unfollow(sequence)
            kept = self._leave(sequence, keep=keep)
            self._running.remove(sequence)
            self._freed += 1
        sequence.pieces.clear()
        sequence.slot = -1
        sequence.leader = None
        sequence.phase = Phase.ENDED
        self._publish()
        return kept

    def end_session(self, salt: bytes, session_id: str) -> bool:
        """Lets go of what is kept for a session of a salt; says whether there was something."""
        found = self._space.residents.of_session(salt, session_id)
        for resident in found:
            self._space.drop(resident)
        self._freed += 1
        self._publish()
        return bool(found)

    def _leave(self, sequence: Sequence[Owner], *, keep: bool) -> bool:
        worthwhile = sequence.sharable and sequence.computed >= self.limits.min_shared
        if not keep or not worthwhile or sequence.far:
            self._space.give(sequence.slot)
            return False
        resident = Resident(
            sequence.slot, sequence.held(), sequence.salt, sequence.session_id, self._now
        )
        others = [slot for slot in self._slots() if slot != sequence.slot]
        return self._space.keep(resident, self.limits.residents, self.limits.resident_cells, others)

    # The next batch.

    def plan(self, now: float) -> Step[Owner] | None:
        """Admits, restores, makes room, and returns the next batch; None if there is nothing to compute this time."""
        self._now = now
        self._admit()
        decoding = self._decoders()
        # Most steps end here: everybody decodes, and there are cells.
        if len(decoding) < len(self._running) or self._space.free < self.limits.batch_tokens:
            self._catch_up()
            self._restore()
            self._make_room()
            decoding = self._decoders()
        step: Step[Owner] = Step()
        if decoding:
            step.add_decode_rows(decoding)
        if len(decoding) < len(self._running):
            self._add_prefill(step, len(decoding))
        return step if step.spans else None

    def _decoders(self) -> list[Sequence[Owner]]:
        return [sequence for sequence in self._running if sequence.phase is Phase.DECODING]

    def _catch_up(self) -> None:
        """Those who waited for a prefix take it once it is computed."""
        for sequence in self._running:
            leader = sequence.leader
            if leader is not None and leader.computed >= sequence.follow_end:
                self._stop_following(sequence)

    def _add_prefill(self, step: Step[Owner], decoding: int) -> None:
        limits = self.limits
        prefilling = [s for s in self._running if s.phase is Phase.PREFILLING]
        budget = prefill_budget(limits, len(prefilling), decoding)
        for sequence in prefilling:
            end = chunk_end(sequence, limits, beside_rows=decoding > 0)
            # A chunk that does not fit whole waits for the next batch: where a prompt is cut must not depend on the
            # company it happens to be in.
            tokens = end - sequence.computed
            if tokens > budget or not self._room(len(step.batch.tokens) + tokens):
                break
            budget -= tokens
            step.add_prefill(sequence, end)

    def computed(self, step: Step[Owner]) -> None:
        """The batch was decoded: its tokens are in the KV."""
        extend = self._space.cells.extend
        for sequence, count in step.spans:
            extend(sequence.slot, count)
            sequence.computed += count
            if sequence.phase is Phase.PREFILLING:
                self._space.prefilled(sequence)
                if sequence.computed == sequence.target:
                    sequence.phase = Phase.DECODING
        if self._space.cells.used > self.limits.near_cells:
            for sequence, _count in step.spans:
                sequence.far = True

    # Admission.

    def _admit(self) -> None:
        """Gives slots to those who were swapped out, then to those who waited longest; stops at the first that does not
        fit (FIFO)."""
        started = False
        for queue in (self._swapped, self._waiting):
            while queue and self._start(queue[0]):
                del queue[0]
                started = True
            if queue:
                break
        if started:
            self._publish()

    def _start(self, sequence: Sequence[Owner]) -> bool:
        running = self._running
        if len(running) >= self.limits.max_sequences:
            return False
        if self._stuck == (sequence, self._freed):
            # Nothing was freed since it did not fit: comparing prompts again would cost every step.
            return False
        source, shared = self._best_held(sequence)
        leader, follow_end = self._best_coming(sequence, shared)
        spared = max(shared, follow_end)
        from_resident = shared if isinstance(source, Resident) else 0
        if not self._fits(sequence, sequence.target - spared, from_resident):
            self._stuck = (sequence, self._freed)
            return False
        bisect.insort(running, sequence, key=lambda other: other.order)
        sequence.leader, sequence.follow_end = leader, follow_end
        if leader is None:
            self._occupy(sequence, source, shared)
        else:
            sequence.slot = self._space.take()
            sequence.phase = Phase.FOLLOWING
        return True

    def _fits(self, sequence: Sequence[Owner], tokens: int, from_resident: int) -> bool:
        """Whether `tokens` more cells are there beside what runs, and what is shared with a resident. Residents do not
        count otherwise: they go when their cells are needed."""
        running = self._running
        reserve = RESERVE_TOKENS * len(running) + min(
            RESERVE_TOKENS, sequence.most_tokens - sequence.target
        )
        expected = sum(max(0, s.target - max(s.computed, s.follow_end)) for s in running)
        wanted = tokens + reserve + expected
        if wanted <= self._space.free:
            return True
        held = self._space.cells.distinct(self._slots()) + from_resident
        return wanted <= self.limits.cells - held

    def _best_held(self, sequence: Sequence[Owner]) -> tuple[Holder[Owner] | None, int]:
        residents, min_shared = self._space.residents, self.limits.min_shared
        best = best_whole_held if self.limits.whole_states else best_held
        return best(sequence, residents, self._running, min_shared)

    def _best_coming(
        self, sequence: Sequence[Owner], held: int
    ) -> tuple[Sequence[Owner] | None, int]:
        limits, running = self.limits, self._running
        if limits.whole_states:
            return best_whole_coming(
                sequence, held, running, limits.min_shared, limits.block_tokens
            )
        return best_coming(sequence, held, running, limits.min_shared)

    def _occupy(self, sequence: Sequence[Owner], source: Holder[Owner] | None, shared: int) -> None:
        """Puts a sequence into its slot, on what is shared with it."""
        space = self._space
        if isinstance(source, Resident) and shared == len(source.tokens):
            # The next turn of a chat: it goes on in the same slot.
            space.residents.remove(source)
            if sequence.slot >= 0:
                space.give(sequence.slot)
            sequence.slot = source.slot
        else:
            if sequence.slot < 0:
                sequence.slot = space.take()
            if isinstance(source, Resident):
                space.residents.use(source, self._now)
            if source is not None:
                space.share(source.slot, sequence.slot, shared)
        sequence.computed = shared
        sequence.far = isinstance(source, Sequence) and source.far
        sequence.shared_tokens += shared
        self._drop_useless_pieces(sequence)
        sequence.phase = Phase.RESTORING if sequence.pieces else Phase.PREFILLING

    def _drop_useless_pieces(self, sequence: Sequence[Owner]) -> None:
        pieces = sequence.pieces
        while pieces and pieces[0].end <= sequence.computed:
            pieces.popleft()
        if pieces and (
            pieces[0].start > sequence.computed or sequence.computed >= sequence.target - 1
        ):
            pieces.clear()

    def _stop_following(self, sequence: Sequence[Owner]) -> None:
        """Takes what is there of the prefix that it waited for."""
        sequence.leader, sequence.follow_end = None, 0
        self._occupy(sequence, *self._best_held(sequence))

    def _unfollow(self, leader: Sequence[Owner]) -> None:
        """The leader leaves: its followers go on alone."""
        for sequence in self._running:
            if sequence.leader is leader:
                self._stop_following(sequence)

    # Restoring and making room.

    def _restore(self) -> None:
        budget = JOIN_TOKENS_BESIDE_ROWS if self.decoding else JOIN_TOKENS_ALONE
        for sequence in tuple(self._running):
            while budget > 0 and sequence.phase is Phase.RESTORING:
                before = sequence.computed
                if not self._join_next(sequence):
                    break
                budget -= max(1, sequence.computed - before)

    def _join_next(self, sequence: Sequence[Owner]) -> bool:
        """Restores one piece, or gives restoring up; False where there is no room for it now."""
        piece = sequence.pieces[0]
        first = sequence is self._running[0]
        # While it is joined, the whole state takes cells beside what is there.
        room = piece.whole_end - piece.start
        while not self._room(room) and first and self._swap_out_one():
            pass
        if self._space.free < room and not first and piece.end == piece.whole_end:
            # Computing it would need these cells as well.
            return False
        end = min(piece.end, sequence.target - 1)
        if self._space.free >= room and self._space.join(sequence, piece, end):
            sequence.pieces.popleft()
            sequence.far |= self._space.cells.used > self.limits.near_cells
            self._drop_useless_pieces(sequence)
        else:
            sequence.pieces.clear()
        if not sequence.pieces:
            sequence.phase = Phase.PREFILLING
        return True

    def _room(self, count: int) -> bool:
        """Whether `count` cells are free, if need be at the price of residents."""
        dropped = False
        while self._space.free < count and self._space.drop_one(self._now):
            dropped = True
        if dropped:
            self._publish()
        return self._space.free >= count

    def _make_room(self) -> None:
        """Cells for every row that decodes, and for the chunk of the oldest sequence if it prefills."""
        while self._running:
            first, rows = self._running[0], self.decoding
            if first.phase is Phase.PREFILLING:
                rows += chunk_end(first, self.limits, beside_rows=rows > 0) - first.computed
            if self._room(rows) or not self._swap_out_one():
                return

    def _swap_out_one(self) -> bool:
        """Swaps the youngest out whose leaving frees cells; False if only the oldest is left."""
        holders = [s for s in self._running[1:] if s.computed]
        if not holders:
            return False
        freeing = [s for s in holders if self._space.cells.exclusive(s.slot)]
        self._swap_out((freeing or holders)[-1])
        return True

    def _swap_out(self, sequence: Sequence[Owner]) -> None:
        for follower in tuple(self._running):
            if follower.leader is sequence:
                self._swap_out(follower)
        if sequence.computed:
            taken = sum(
                len(piece.state)
                for other in (*self._swapped, *self._running)
                for piece in other.pieces
                if not piece.saved
            )
            packed = self._space.pack(sequence, self.limits.swap_bytes - taken)
            sequence.pieces.extendleft(reversed(packed))
            self.swapped_out += 1
        self._running.remove(sequence)
        self._space.give(sequence.slot)
        self._freed += 1
        sequence.slot, sequence.computed = -1, 0
        sequence.leader, sequence.follow_end = None, 0
        sequence.target = len(sequence.tokens)
        sequence.phase = Phase.SWAPPED
        bisect.insort(self._swapped, sequence, key=lambda other: other.order)
