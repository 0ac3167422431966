"""The engine as the event loop sees it: its state, its requests, and the way to the decode thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine.answer import Answer
from services.engine.backend import Backend, ModelError, ModelFacts
from services.engine.decoder import Decoder
from services.engine.inflight import Inflight, InflightTable
from services.engine.job import Job, Work
from services.engine.kv.keys import BLOCK_TOKENS
from services.engine.kv.store import FoundBlock
from services.engine.kv.tiered_store import TieredStore
from services.engine.preparation import Preparation
from services.engine.prompt import PromptTokenizer
from services.engine.rate import Rate
from services.engine.sequence import longest_common_prefix
from services.engine.templates import ChatTemplate, TemplateFailedError
from services.engine.text import StopMatcher
from services.engine.tool_calls import ToolCallParser
from services.runtime.clock import Clock, IdSource
from services.runtime.errors import CaravanError

_LOG = logging.getLogger(__name__)

_WORKERS = 2
_RETRY_S = 1.0


@dataclass(frozen=True)
class Identity:
    """Who the engine is."""

    engine_id: str
    model_name: str
    model_path: str


@dataclass(frozen=True, slots=True)
class Restorable:
    """What the store has of a prompt, and the seconds that it took to find."""

    blocks: Sequence[FoundBlock] = ()
    seconds: float = 0.0


class Engine:
    """Lives on the event loop. `start` begins to load; `on_change` is called at each change of phase."""

    def __init__(
        self,
        identity: Identity,
        decoder: Decoder,
        inflight: InflightTable,
        *,
        clock: Clock,
        new_id: IdSource,
        new_seed: Callable[[], int],
        template_seconds: float,
        kv_min_tokens: int,
    ) -> None:
        self.identity = identity
        self.inflight = inflight
        self.on_change: Callable[[], None] = lambda: None
        self.on_ready: Callable[[], None] = lambda: None
        self._decoder = decoder
        self._clock = clock
        self._new_id = new_id
        self._new_seed = new_seed
        self._template_seconds = template_seconds
        self._kv_min_tokens = kv_min_tokens
        self._backend: Backend | None = None
        self._preparation: Preparation | None = None
        self._progress = 0.0
        self._failure = ""
        self._draining = False
        self._jobs: dict[Inflight, Job] = {}
        self._finding: dict[Inflight, asyncio.Future[list[FoundBlock]]] = {}
        self._store: TieredStore | None = None
        self._is_loaded = asyncio.Event()
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="prepare")
        self._rate = Rate()

    def start(self) -> None:
        """Loads the model on the decode thread."""
        self._decoder.on_progress = self._loading
        self._decoder.on_ready = self._ready
        self._decoder.on_failed = self._failed
        self._decoder.on_phase = self._phase_changed
        self._decoder.start()

    def drain(self) -> None:
        """Takes no new requests from now on."""
        self._draining = True
        self.on_change()

    async def stop(self, timeout_s: float) -> bool:
        """Ends the decode thread; False if a decode would not end in time."""
        self._decoder.stop()
        self._workers.shutdown(wait=False, cancel_futures=True)
        return await asyncio.to_thread(self._decoder.join, timeout_s)

    def register(self, request_id: str) -> Inflight:
        """Admits a request to this engine. Raises DRAINING, MODEL_LOADING, MODEL_INVALID, or what the table refuses."""
        name = self.identity.model_name
        if self._draining:
            raise CaravanError("DRAINING", "The engine is shutting down.", retry_after_s=_RETRY_S)
        if self._failure:
            raise CaravanError(
                "MODEL_INVALID",
                f"The model {name!r} could not be loaded: {self._failure}",
                path=self.identity.model_path,
            )
        if self._preparation is None:
            raise CaravanError(
                "MODEL_LOADING",
                f"The model {name!r} is still being loaded.",
                retry_after_s=_RETRY_S,
                model=name,
            )
        return self.inflight.register(request_id, self._clock.monotonic())

    async def loaded(self) -> ModelFacts:
        """What the model is, once it is loaded; waits for ever if that fails."""
        await self._is_loaded.wait()
        assert self._backend is not None
        return self._backend.facts

    @property
    def store(self) -> TieredStore | None:
        """Where blocks are kept; None while there is no such place."""
        return self._store

    def attach(self, store: TieredStore) -> None:
        """From now on blocks are looked for and kept in this store."""
        assert self._preparation is not None
        self._store = store
        self._preparation.namespace = store.namespace
        self._decoder.attach(store)

    async def prepare(self, request: pb.GenerateRequest, *, prefill_only: bool = False) -> Work:
        """Renders and tokenizes on a worker thread. Raises CaravanError."""
        assert self._preparation is not None
        loop = asyncio.get_running_loop()
        preparation = self._preparation
        prepare = preparation.prepare_prefill if prefill_only else preparation.prepare
        return await loop.run_in_executor(self._workers, prepare, request)

    async def find(self, row: Inflight, work: Work) -> Restorable:
        """What the store has of the prompt beyond what the cells hold or are about to. A cancel ends the search."""
        cache, store = work.cache, self._store
        if cache.chain is None or store is None or row.cancelled:
            return Restorable()
        held = longest_common_prefix(self._decoder.scheduler.known, cache.salt, work.prompt_array)
        if len(work.prompt) - held <= self._kv_min_tokens:
            return Restorable()
        began = self._clock.monotonic()
        finding = asyncio.ensure_future(
            store.find(
                work.prompt,
                cache.chain.block_keys(),
                held // BLOCK_TOKENS,
                namespace=cache.chain.namespace,
                parent_key=cache.parent_key,
            )
        )
        self._finding[row] = finding
        try:
            await asyncio.wait([finding])
            blocks = [] if finding.cancelled() else finding.result()
        finally:
            finding.cancel()
            del self._finding[row]
        return Restorable(blocks, self._clock.monotonic() - began)

    def submit(self, row: Inflight, work: Work, found: Restorable) -> None:
        """Hands the work to the decode thread; events come in the row's outbox."""
        row.prompt_tokens = len(work.prompt)
        stops = StopMatcher(work.stops) if work.stops else None
        tools = ToolCallParser(self._new_id) if work.parse_tools else None
        job = Job(row, work, Answer(stops, tools), found.blocks, found.seconds)
        self._jobs[row] = job
        self._decoder.submit(job)
        if row.cancelled:
            self._decoder.cancel(job)

    def cancel(self, request_id: str) -> bool:
        """Ends a request as cancelled; says whether it was in flight."""
        row = self.inflight.lookup(request_id)
        if row is None:
            return False
        row.cancelled = True
        if row in self._finding:
            self._finding[row].cancel()
        if row in self._jobs:
            self._decoder.cancel(self._jobs[row])
        return True

    async def end_session(self, session_id: str) -> bool:
        """Lets go of what the cells keep for a conversation; says whether there was something."""
        if self._backend is None or self._failure:
            return False
        told: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def tell(found: bool) -> None:
            if not told.done():
                told.set_result(found)

        self._decoder.end_session(session_id, tell)
        return await told

    def release(self, row: Inflight) -> None:
        """The call of the request has ended: its sequence is freed if it still runs."""
        self.inflight.unregister(row)
        job = self._jobs.pop(row, None)
        if job is not None and not job.ended:
            self._decoder.cancel(job)

    def token_bytes(self, token: int) -> bytes:
        """Bytes of a token of the loaded model."""
        assert self._backend is not None
        return self._backend.vocabulary.token_bytes(token)

    def model(self) -> pb.ModelInfo:
        """What the engine is; sizes are known once the model is loaded."""
        if self._backend is None:
            return pb.ModelInfo(name=self.identity.model_name)
        facts = self._backend.facts
        return pb.ModelInfo(
            name=self.identity.model_name,
            description=facts.description,
            context_tokens=facts.context_tokens,
            vocabulary_tokens=facts.vocabulary_tokens,
            max_sequences=facts.max_sequences,
            weight_bytes=facts.weight_bytes,
            cache_support=facts.cache_support.value,  # type: ignore[arg-type]
            cache_note=facts.cache_note,
        )

    def load(self) -> pb.EngineLoad:
        """What the engine does."""
        load = pb.EngineLoad(
            phase=self._phase(), load_progress=self._progress, failure=self._failure
        )
        if self._backend is not None:
            scheduler = self._decoder.scheduler
            load.active_sequences = scheduler.active
            # Requests that are rendered or on their way to the scheduler wait as well (W56).
            load.queued_requests = max(0, self.inflight.depth - scheduler.active)
            load.swapped_sequences = scheduler.swapped
            load.free_cells = scheduler.free_cells
            load.resident_cells = scheduler.resident_cells
            load.last_hit, load.last_hit_tokens = self._decoder.last_hit
            load.tokens_per_second = self._rate.sample(
                self._clock.monotonic(), self._decoder.generated
            )
        if self._store is not None:
            load.ram_bytes = self._store.ram_bytes
        return load

    def _phase(self) -> pb.EnginePhase.ValueType:
        if self._failure:
            return pb.ENGINE_PHASE_FAILED
        if self._draining:
            return pb.ENGINE_PHASE_DRAINING
        if self._preparation is None:
            return pb.ENGINE_PHASE_LOADING
        scheduler = self._decoder.scheduler
        if scheduler.prefilling:
            return pb.ENGINE_PHASE_PREFILLING
        return pb.ENGINE_PHASE_GENERATING if scheduler.decoding else pb.ENGINE_PHASE_IDLE

    def _loading(self, share: float) -> None:
        self._progress = share

    def _phase_changed(self, _busy: object) -> None:
        self.on_change()

    def _ready(self, backend: Backend) -> None:
        facts = backend.facts
        try:
            template = ChatTemplate(
                facts.chat_template,
                clock=self._clock,
                seconds=self._template_seconds,
                bos_text=facts.bos_text,
                eos_text=facts.eos_text,
            )
        except TemplateFailedError as error:
            self._failed(ModelError(f"its chat template is wrong: {error}"))
            return
        tokenizer = PromptTokenizer(backend.vocabulary, template)
        self._backend = backend
        self._preparation = Preparation(backend, tokenizer, self._new_seed, self._kv_min_tokens)
        self._progress = 1.0
        self._is_loaded.set()
        self.on_ready()
        self.on_change()

    def _failed(self, error: Exception) -> None:
        self._failure = str(error) or type(error).__name__
        _LOG.error("the model cannot be served: %s", self._failure)
        self.on_change()
