"""Opens the engine's KV cache once the model is known, and closes it. Until then, and without it, every prompt starts cold."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from caravan.cache.v1 import cache_service_pb2

from services.engine.backend import CacheSupport, ModelFacts
from services.engine.engine import Engine
from services.engine.kv.config import KvConfig
from services.engine.kv.fingerprint import file_fingerprint, text_fingerprint
from services.engine.kv.identity import context_hash
from services.engine.kv.keys import Namespace
from services.engine.kv.opening import KvCache, mount, open_store
from services.engine.kv.quant import quant_byte
from services.engine.kv.root import RootError
from services.engine.scripted import PREFIX
from services.engine.settings import EngineSettings
from services.runtime.clock import Clock, IdSource
from services.runtime.server import cancel_all
from services.runtime.settings import SettingsError

_LOG = logging.getLogger(__name__)
_MEMORY_NAME: Final = "fingerprints.json"


def kv_config(settings: EngineSettings, address: str) -> KvConfig:
    """What the settings say of the KV cache of an engine that serves at `address`."""
    return KvConfig(
        engine_id=settings.engine_id,
        address=address,
        cache_address=settings.cache,
        roots=settings.kv_roots,
        ram_quota_bytes=settings.kv_ram_bytes,
        queue_bytes=settings.kv_queue_bytes,
    )


async def check_roots(settings: EngineSettings, new_id: IdSource) -> None:
    """Raises SettingsError where a folder for blocks cannot be used: a wrong configuration must not start."""
    try:
        await asyncio.to_thread(mount, kv_config(settings, ""), new_id)
    except RootError as error:
        raise SettingsError(f"CARAVAN_ENGINE_KV_ROOTS: {error}") from error


class BlockCache:
    """Lives on the event loop. `opened` is set when the engine has its store, or when it is settled that it gets none."""

    def __init__(
        self,
        settings: EngineSettings,
        engine: Engine,
        address: str,
        *,
        clock: Clock,
        new_id: IdSource,
        jitter: Callable[[], float],
    ) -> None:
        self.opened = asyncio.Event()
        self._settings = settings
        self._engine = engine
        self._address = address
        self._clock = clock
        self._new_id = new_id
        self._jitter = jitter
        self._cache: KvCache | None = None
        self._opening: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Waits for the model behind, and opens the store then."""
        self._opening = asyncio.create_task(self._open())

    async def close(self, seconds: float) -> None:
        """Writes what is queued, for at most `seconds`. After the decode thread has ended: it saves until then."""
        if self._opening is not None:
            await cancel_all([self._opening])
        if self._cache is not None:
            await self._cache.close(seconds)

    async def _open(self) -> None:
        try:
            facts = await self._engine.loaded()
            if self._wanted(facts):
                namespace = Namespace(
                    await asyncio.to_thread(self._fingerprint),
                    quant_byte(facts.quant),
                    context_hash(_state_identity(facts)),
                )
                self._cache = await open_store(
                    kv_config(self._settings, self._address),
                    namespace,
                    self._clock,
                    self._new_id,
                    self._jitter,
                    whole_states=facts.cache_support is CacheSupport.WHOLE,
                )
                self._engine.attach(self._cache.store)
        except (OSError, RootError) as error:
            _LOG.error("the KV cache stays off: %s", error)
        finally:
            self.opened.set()

    def _wanted(self, facts: ModelFacts) -> bool:
        if facts.cache_support is CacheSupport.OFF:
            _LOG.warning("the KV cache stays off: %s", facts.cache_note)
            return False
        return bool(self._settings.cache or self._settings.kv_ram_bytes)

    def _fingerprint(self) -> bytes:
        path = self._settings.model.path
        if path.startswith(PREFIX):
            return text_fingerprint(path)
        disks = [
            root.path
            for root in self._settings.kv_roots
            if root.tier == cache_service_pb2.TIER_DISK
        ]
        return file_fingerprint(
            Path(path), disks[0] / _MEMORY_NAME if disks else None, self._new_id
        )


def _state_identity(facts: ModelFacts) -> Mapping[str, str]:
    """What the state depends on. A file with a whole state is never taken for one with a block."""
    if facts.cache_support is CacheSupport.WHOLE:
        return {**facts.context_identity, "state": "whole"}
    return facts.context_identity
