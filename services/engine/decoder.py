"""The decode thread: takes requests from an inbox, runs the scheduler's batches, and posts what comes of them.

The thread owns the model and its context (invariant I3). It sleeps on its inbox when there is nothing to do.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from caravan.core.v1 import generation_pb2

from services.engine import refusals
from services.engine.answer import LENGTH
from services.engine.backend import Backend, DecodeError, Loader, ModelError, Progress
from services.engine.batching import Limits, Step
from services.engine.inflight import RequestPhase
from services.engine.job import Job
from services.engine.job_memory import JobMemory
from services.engine.kv.keys import BLOCK_TOKENS
from services.engine.kv.store import BlockStore, SaveReason
from services.engine.mailbox import Mailbox
from services.engine.observer import StepObserver
from services.engine.sampling import logprobs
from services.engine.scheduler import QueueFullError, Scheduler, TooLargeError
from services.runtime.clock import Clock
from services.runtime.errors import CaravanError

_LOG = logging.getLogger(__name__)
_NO_CELLS = 1
CANCELLED = generation_pb2.FINISH_REASON_CANCELLED

Command = Callable[[], None]


class Decoder:
    """Runs jobs. `submit`, `cancel`, `attach`, `end_session`, `hand_over` and `stop` may be called from any thread."""

    def __init__(
        self,
        load: Loader,
        make_limits: Callable[[Backend], Limits],
        mailbox: Mailbox,
        clock: Clock,
        observer: StepObserver,
    ) -> None:
        self._load = load
        self._make_limits = make_limits
        self._mailbox = mailbox
        self._clock = clock
        self._observer = observer
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="decode", daemon=True)
        self._stopping = False
        self._backend: Backend
        self._memory: JobMemory
        self.scheduler: Scheduler[Job]
        self.on_progress: Progress = lambda _share: None
        self.on_ready: Callable[[Backend], None] = lambda _backend: None
        self.on_failed: Callable[[Exception], None] = lambda _error: None
        self.generated = 0
        self.rounds = 0
        """How often the thread went round its loop: while this stands still, it sleeps or is stuck."""
        self.last_hit: tuple[generation_pb2.CacheHit.ValueType, int] = (
            generation_pb2.CACHE_HIT_UNSPECIFIED,
            0,
        )
        """Where the prompt that was admitted last came from, and how many tokens of it; replaced as a whole."""
        self._loaded = False

    def start(self) -> None:
        """Starts the thread, which loads the model first; set the `on_` callbacks before. They run on the loop."""
        self._thread.start()

    @property
    def loaded(self) -> bool:
        """Whether the model is loaded, so that there is a scheduler to read."""
        return self._loaded

    def submit(self, job: Job) -> None:
        """Runs a job; its outbox gets what comes of it."""
        self._inbox.put(lambda: self._submit(job))

    def cancel(self, job: Job) -> None:
        """Ends a job as cancelled, at the next step. Harmless if it has ended."""
        self._inbox.put(lambda: self._cancel(job))

    def attach(self, store: BlockStore) -> None:
        """From now on blocks are saved into this store."""
        self._inbox.put(lambda: self._memory.attach(store))

    def end_session(self, salt: bytes, session_id: str, told: Callable[[bool], None]) -> None:
        """Lets go of what is kept in cells for a session of a salt; `told` hears on the loop whether there was something."""
        self._inbox.put(
            lambda: self._mailbox.post(told, self.scheduler.end_session(salt, session_id))
        )

    def hand_over(self, error: CaravanError) -> None:
        """Ends all jobs with this error, after the tokens that they have; what they computed is saved for whoever goes on."""
        self._inbox.put(lambda: self._hand_over(error))

    def stop(self) -> None:
        """Ends the thread after the step that runs; jobs that are left end as cancelled."""
        self._inbox.put(self._stop)

    def join(self, timeout_s: float) -> bool:
        """Waits for the thread's end; False if it has not come in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # From here on: the decode thread.

    def _main(self) -> None:
        try:
            backend = self._load(self._progress)
        except ModelError as error:
            self._tell(self.on_failed, error)
            return
        except Exception as error:
            _LOG.exception("the model could not be loaded")
            self._tell(self.on_failed, error)
            return
        self._backend = backend
        self._memory = JobMemory(backend, self._clock, self._observer)
        self.scheduler = Scheduler(self._make_limits(backend), self._memory)
        self._loaded = True
        self._tell(self.on_ready, backend)
        try:
            self._loop()
        except Exception as error:
            _LOG.exception("the decode thread ends")
            self._tell(self.on_failed, error)
            for job in self.scheduler.owners():
                self._fail(job, refusals.defect())
        finally:
            self._mailbox.flush()
            backend.close()

    def _progress(self, share: float) -> None:
        if self._stopping:
            return
        self._tell(self.on_progress, share)

    def _tell(self, callback: Callable[..., None], argument: object) -> None:
        self._mailbox.post(callback, argument)
        self._mailbox.flush()

    def _loop(self) -> None:
        while not self._stopping:
            self._take_inbox()
            self.rounds += 1
            step = self.scheduler.plan(self._clock.monotonic())
            if step is not None:
                try:
                    self._run(step)
                except Exception:
                    # A defect must not end the engine: the requests of this step fail, the others go on.
                    _LOG.exception("a step failed")
                    self._fail_step(step, refusals.defect())
            # Tokens go out first; saving is nobody's wait.
            self._mailbox.flush()
            self._memory.save_some(rows=self.scheduler.decoding > 0, idle=self.scheduler.idle)
        for job in self.scheduler.owners():
            self._finish(job, CANCELLED, SaveReason.SHUTDOWN)
        self._memory.save_all()

    def _take_inbox(self) -> None:
        if self.scheduler.idle and not self._memory.saves_pending:
            self._inbox.get()()
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _stop(self) -> None:
        self._stopping = True

    def _submit(self, job: Job) -> None:
        if job.ended:
            return
        if job.work.resumed:
            self._observer.resumed()
        try:
            if job.answer.reason is not None:
                # What the engine before produced is the whole answer.
                self._finish(job, job.answer.reason)
                return
            if not job.work.sampling.greedy:
                job.sampler = self._backend.sampler(job.work.sampling)
                job.sampler.resume(job.work.resumed)
            self.scheduler.submit(job.sequence, self._clock.monotonic())
        except QueueFullError:
            self._fail(job, refusals.full())
        except TooLargeError:
            self._fail(job, refusals.too_large(job.work, self.scheduler.limits.cells))
        except CaravanError as error:
            self._fail(job, error)
        except Exception:
            _LOG.exception("a request could not be submitted")
            self._fail(job, refusals.defect())

    def _cancel(self, job: Job) -> None:
        if not job.ended:
            text, calls = job.answer.flush()
            if text or calls:
                self._mailbox.post(job.inflight.outbox.add, None, text, calls, None)
            self._finish(job, CANCELLED)

    def _hand_over(self, error: CaravanError) -> None:
        jobs = self.scheduler.owners()
        for job in jobs:
            self._memory.finish(job, SaveReason.SHUTDOWN)
        self._observer.moved(len(jobs))
        # Packed before anybody is told: whoever goes on finds the blocks saved, or on their way.
        self._memory.save_all()
        for job in jobs:
            self._release(job, keep=True)
            self._mailbox.post(job.inflight.outbox.fail, error)

    def _run(self, step: Step[Job]) -> None:
        started = self._clock.monotonic()
        if step.prefill_tokens:
            self._mark_prefill(step, started)
        try:
            self._backend.decode(step.batch)
        except DecodeError as error:
            self._decode_failed(step, error)
            return
        self.scheduler.computed(step)
        generated = self._sample(step)
        seconds = self._clock.monotonic() - started
        self.generated += generated
        self._observer.stepped(seconds, step.prefill_tokens, generated)

    def _mark_prefill(self, step: Step[Job], now: float) -> None:
        for sequence, _count in step.spans:
            job = sequence.owner
            if job.prefill_at is None:
                job.started(now)
                job.inflight.phase = RequestPhase.PREFILLING
                self.last_hit = (job.cache_hit, job.cached_tokens)
                self._observer.admitted(job, now - job.inflight.arrived)
                self._mailbox.post(job.inflight.outbox.start, job.cached_tokens, job.cache_hit)

    def _decode_failed(self, step: Step[Job], error: DecodeError) -> None:
        failure = refusals.decode_failed(error, "llama.cpp could not decode the batch.")
        _LOG.error("decode failed with code %d: %s", error.code, error)
        if error.code == _NO_CELLS:
            # Nothing was computed. The youngest goes, so that the others fit.
            youngest = max((sequence.owner for sequence, _ in step.spans), key=_arrival)
            self._fail(youngest, failure)
            return
        self._fail_step(step, failure)

    def _fail_step(self, step: Step[Job], error: CaravanError) -> None:
        for sequence, _count in step.spans:
            self._fail(sequence.owner, error)

    def _sample(self, step: Step[Job]) -> int:
        """Chooses a token for each sequence that is due one; returns how many were chosen."""
        if not step.sampled:
            return 0
        chosen = 0
        logits = self._backend.logits()
        # One argmax for all rows: a greedy token costs no candidate array. Rows with a sampler ignore theirs.
        greedy = any(sequence.owner.sampler is None for sequence in step.sampled)
        likeliest: list[int] = logits.argmax(axis=1).tolist() if greedy else []
        for output, sequence in enumerate(step.sampled):
            job = sequence.owner
            if job.work.max_tokens == 0:
                self._finish(job, LENGTH)
                continue
            if job.sampler is None:
                token = likeliest[output]
            else:
                try:
                    token = job.sampler.choose(output, len(sequence.tokens))
                except DecodeError as error:
                    self._fail(job, refusals.decode_failed(error, str(error)))
                    continue
            scores = None
            if job.work.top_logprobs is not None:
                scores = logprobs(logits[output], token, job.work.top_logprobs)
            if job.first_token_at is None:
                job.first_token_at = self._clock.monotonic()
                job.inflight.phase = RequestPhase.GENERATING
                self._memory.offer(job)
            elif sequence.computed % BLOCK_TOKENS == 0:
                self._memory.offer(job)
            chosen += 1
            sequence.tokens.append(token)
            self._accept(job, token, scores)
        return chosen

    def _accept(self, job: Job, token: int, scores: object) -> None:
        text, calls = job.answer.take(token)
        job.inflight.completion_tokens = job.answer.tokens
        self._mailbox.post(job.inflight.outbox.add, token, text, calls, scores)
        if job.answer.reason is not None:
            self._finish(job, job.answer.reason)

    def _finish(self, job: Job, reason: int, save_reason: SaveReason = SaveReason.FINISH) -> None:
        self._memory.finish(job, save_reason)
        ending = job.ending(reason, self._clock.monotonic())
        self._mailbox.post(job.inflight.outbox.end, ending)
        self._release(job, keep=True)

    def _fail(self, job: Job, error: CaravanError) -> None:
        if not job.ended:
            self._memory.forget(job)
            self._release(job, keep=False)
            self._mailbox.post(job.inflight.outbox.fail, error)

    def _release(self, job: Job, *, keep: bool) -> None:
        job.ended = True
        self.scheduler.end(job.sequence, self._clock.monotonic(), keep=keep)
        if job.sampler is not None:
            job.sampler.close()
            job.sampler = None


def _arrival(job: Job) -> float:
    return job.inflight.arrived
