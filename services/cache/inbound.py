"""What an engine says on its stream after it has joined."""

from __future__ import annotations

from caravan.cache.v1 import cache_service_pb2 as pb

from services.cache import checks
from services.cache.effects import Effects
from services.cache.places import Place
from services.cache.sessions import Session
from services.cache.state import CacheState
from services.runtime.errors import CaravanError


def take(state: CacheState, session_id: str, request: pb.JoinRequest, now: float) -> Effects:
    """Takes one message. Raises CaravanError: SESSION_UNKNOWN, MISSING_FIELD, INVALID_VALUE."""
    session = state.hear(session_id, now)
    kind = request.WhichOneof("message")
    if kind == "heartbeat":
        beat = request.heartbeat
        return state.heartbeat(session, beat.memory_used_bytes, beat.memory_total_bytes, now)
    if kind == "inventory":
        inventory = request.inventory
        place = state.root(session, inventory.root_id)
        blocks = checks.to_all_facts("inventory.blocks", inventory.blocks)
        return state.take_inventory(session, place, blocks, complete=inventory.complete, now=now)
    if kind == "ram":
        added = checks.to_all_facts("ram.added", request.ram.added)
        removed = checks.checked_keys("ram.removed", request.ram.removed)
        return state.change_ram(session, added, removed, now)
    if kind == "withdrawal":
        withdrawal = request.withdrawal
        keys = checks.checked_keys("withdrawal.keys", withdrawal.keys)
        place = _place(state, session, withdrawal.root_id)
        return state.withdraw(place, keys, corrupt=withdrawal.corrupt, now=now)
    if kind == "dropped":
        keys = checks.checked_keys("dropped.keys", request.dropped.keys)
        place = _place(state, session, request.dropped.root_id)
        return state.dropped(session, place, keys, now)
    if kind == "settled":
        return _settled(state, session, request.settled, now)
    if kind == "register":
        raise checks.invalid("register", "comes once, in the first message")
    raise CaravanError("MISSING_FIELD", "'message' is missing.", param="message")


def _settled(state: CacheState, session: Session, settled: pb.Settled, now: float) -> Effects:
    place = state.root(session, settled.root_id)
    key = checks.checked_key("settled.key", settled.key)
    facts = None
    if settled.HasField("block"):
        facts = checks.to_facts("settled.block", settled.block)
        if facts.key != key:
            raise checks.invalid("settled.block.key", "is not 'settled.key'")
    return state.settled(session, place, key, facts, now)


def _place(state: CacheState, session: Session, root_id: str) -> Place:
    """The root, or the engine's RAM where the id is empty."""
    return state.root(session, root_id) if root_id else session.ram
