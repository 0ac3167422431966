"""The engine as the event loop sees it: its state, its requests, and the way to the decode thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from caravan.engine.v1 import engine_service_pb2 as pb

from services.engine import refusals
from services.engine.backend import Backend, ModelError, ModelFacts
from services.engine.decoder import Decoder
from services.engine.drain import Drain
from services.engine.finding import Finder, Restorable
from services.engine.inflight import Inflight, InflightTable
from services.engine.job import Job, Work
from services.engine.kv.tiered_store import TieredStore
from services.engine.messages import inflight_request, model_info
from services.engine.outbox import Outbox
from services.engine.preparation import Preparation
from services.engine.progress import ProgressTimer
from services.engine.prompt import PromptTokenizer
from services.engine.rate import Rate
from services.engine.templates import ChatTemplate, TemplateFailedError
from services.runtime.clock import Clock
from services.runtime.server import cancel_all

_LOG = logging.getLogger(__name__)

_WORKERS = 2


@dataclass(frozen=True)
class Identity:
    """Who the engine is. `incarnation` is the life of its process, `revision` the deployment's for which it was started."""

    engine_id: str
    incarnation: str
    model_name: str
    model_path: str
    revision: str = ""


class Engine:
    """Lives on the event loop. `start` begins to load; `on_change` is called when it begins or ceases to take requests.

    `on_serving` is told whether new requests are taken, and `on_stopped` is called when a drain is over that was to end the
    process.
    """

    def __init__(
        self,
        identity: Identity,
        decoder: Decoder,
        inflight: InflightTable,
        *,
        clock: Clock,
        new_seed: Callable[[], int],
        template_seconds: float,
        kv_min_tokens: int,
        progress_s: float,
    ) -> None:
        self.identity = identity
        self.inflight = inflight
        self.on_change: Callable[[], None] = lambda: None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_serving: Callable[[bool], None] = lambda _serving: None
        self.on_stopped: Callable[[], None] = lambda: None
        self._decoder = decoder
        self._clock = clock
        self._new_seed = new_seed
        self._template_seconds = template_seconds
        self._kv_min_tokens = kv_min_tokens
        self._backend: Backend | None = None
        self._preparation: Preparation | None = None
        self._progress = 0.0
        self._failure = ""
        self._drain = Drain(self._move)
        self._ticking: asyncio.Task[None] | None = None
        self._progress_s = progress_s
        self._jobs: dict[Inflight, Job] = {}
        self._finder = Finder(clock, kv_min_tokens)
        self._store: TieredStore | None = None
        self._is_loaded = asyncio.Event()
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="prepare")
        self._empty = asyncio.Event()
        self._empty.set()
        self._rate = Rate()

    def start(self) -> None:
        """Loads the model on the decode thread."""
        self._decoder.on_progress = self._loading
        self._decoder.on_ready = self._ready
        self._decoder.on_failed = self._failed
        self._decoder.start()
        if self._progress_s:
            timer = ProgressTimer(self._progress_s, lambda: self._decoder.rounds, self._streams)
            self._ticking = asyncio.create_task(timer.run())

    def drain(self, grace_s: float, *, stop: bool = False, for_good: bool = False) -> None:
        """Takes no new requests; those that still run after `grace_s` seconds end with DRAINING. With `stop`, `on_stopped` is
        called when none is left. One drain `for_good` outlasts all others."""
        self._drain.start(grace_s, stop=stop, for_good=for_good)
        self.on_serving(False)  # noqa: FBT003 - there is nothing else that it could mean
        self.on_change()
        self._look_for_end()

    def undrain(self) -> None:
        """Takes requests again."""
        self._drain.undo()
        self.on_serving(self._preparation is not None and not self._drain.draining)
        self.on_change()

    def _move(self) -> None:
        """Ends what is left for another engine to go on with; what is still being prepared is refused by `submit`."""
        self._finder.give_up_all()
        if self._decoder.loaded:
            self._decoder.hand_over(refusals.draining())

    def abandon(self) -> None:
        """Ends what is left without the decode thread, which did not end it."""
        for row in self.inflight.oldest_first():
            row.outbox.fail(refusals.draining())

    async def emptied(self, timeout_s: float) -> bool:
        """Waits until no request is in flight; False if one is left."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def _look_for_end(self) -> None:
        if self._drain.stop and not self.inflight.depth:
            self.on_stopped()

    def _streams(self) -> Iterator[tuple[Outbox, int]]:
        for row in self.inflight.oldest_first():
            job = self._jobs.get(row)
            yield row.outbox, 0 if job is None else min(job.sequence.computed, row.prompt_tokens)

    async def stop(self, timeout_s: float) -> bool:
        """Ends the decode thread; False if a decode would not end in time."""
        if self._ticking is not None:
            await cancel_all([self._ticking])
        self._decoder.stop()
        self._workers.shutdown(wait=False, cancel_futures=True)
        return await asyncio.to_thread(self._decoder.join, timeout_s)

    def register(self, request_id: str) -> Inflight:
        """Admits a request to this engine. Raises DRAINING, MODEL_LOADING, MODEL_INVALID, or what the table refuses."""
        name = self.identity.model_name
        if self._drain.draining:
            raise refusals.draining()
        if self._failure:
            raise refusals.invalid_model(name, self.identity.model_path, self._failure)
        if self._preparation is None:
            raise refusals.loading(name)
        row = self.inflight.register(request_id, self._clock.monotonic())
        self._empty.clear()
        return row

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
        cache = work.cache
        if cache.chain is None or self._store is None or row.cancelled:
            return Restorable()
        held = self._decoder.scheduler.reusable(cache.salt, work.token_array)
        return await self._finder.find(self._store, row, work, held)

    def submit(self, row: Inflight, work: Work, found: Restorable) -> None:
        """Hands the work to the decode thread; events come in the row's outbox. Raises DRAINING if it is too late for it."""
        if self._drain.moving:
            raise refusals.draining()
        row.prompt_tokens = work.prompt_tokens
        row.completion_tokens = work.answer.tokens
        job = Job(row, work, found.blocks, found.seconds)
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
        self._finder.give_up(row)
        if row in self._jobs:
            self._decoder.cancel(self._jobs[row])
        return True

    async def end_session(self, salt: bytes, session_id: str) -> bool:
        """Lets go of what the cells keep for a conversation of a salt; says whether there was something."""
        if self._backend is None or self._failure:
            return False
        told: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def tell(found: bool) -> None:
            if not told.done():
                told.set_result(found)

        self._decoder.end_session(salt, session_id, tell)
        return await told

    def release(self, row: Inflight) -> None:
        """The call of the request has ended: its sequence is freed if it still runs."""
        self.inflight.unregister(row)
        if not self.inflight.depth:
            self._empty.set()
            self._look_for_end()
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
        return model_info(self.identity.model_name, self._backend.facts)

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

    def requests(self, most: int | None = None) -> list[pb.InflightRequest]:
        """The requests in flight, oldest first, at most `most`."""
        now = self._clock.monotonic()
        return [inflight_request(row, now) for row in islice(self.inflight.oldest_first(), most)]

    def _phase(self) -> pb.EnginePhase.ValueType:
        if self._failure:
            return pb.ENGINE_PHASE_FAILED
        if self._drain.draining:
            return pb.ENGINE_PHASE_DRAINING
        if self._preparation is None:
            return pb.ENGINE_PHASE_LOADING
        scheduler = self._decoder.scheduler
        if scheduler.prefilling:
            return pb.ENGINE_PHASE_PREFILLING
        return pb.ENGINE_PHASE_GENERATING if scheduler.decoding else pb.ENGINE_PHASE_IDLE

    def _loading(self, share: float) -> None:
        self._progress = share

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
        self.on_serving(not self._drain.draining)
        self.on_change()

    def _failed(self, error: Exception) -> None:
        self._failure = str(error) or type(error).__name__
        _LOG.error("the model cannot be served: %s", self._failure)
        self.on_change()
