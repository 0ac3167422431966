"""One answer, made by one engine after another: what the client has of it, and what it gets of the next. Pure."""

from __future__ import annotations

from array import array

from caravan.engine.v1 import engine_service_pb2 as engine_pb


def pieces_of(delta: engine_pb.Delta) -> int:
    """How many tokens came with a delta, or pieces, where nobody knows the tokens; 0: it holds nothing of the answer."""
    tokens = len(delta.token_ids)
    if tokens:
        return tokens
    return delta.pieces or int(bool(delta.text or delta.tool_calls or delta.refusal))


class Answer:
    """What the engines of a request have sent so far."""

    def __init__(self) -> None:
        self._started: engine_pb.Started | None = None
        """The first start of the deployment that answers."""
        self._started_again = False
        self._start_shown = False
        self._late_start: engine_pb.GenerateResponse | None = None
        self.tokens: array[int] = array("I")
        """Ids of the tokens that the client has been given, from the first."""
        self.resumable = True
        """Whether another engine can go on with it: all that the client has of it is known by its tokens."""
        self.finish_key = b""
        """Key of the KV state that the request left; empty until it has finished, or where none is kept."""

    @property
    def any_events(self) -> bool:
        """Whether the client has been given anything."""
        return self._start_shown or self.any_output

    @property
    def any_output(self) -> bool:
        """Whether the client has been given a part of the answer itself."""
        return bool(self.tokens) or not self.resumable

    def take(self, event: engine_pb.GenerateResponse, kind: str | None) -> bool:
        """Takes the next event of the engine in charge; whether it is for the client. `kind` is the field that it sets.

        The client sees one start. One that knows nothing of the prompt, because a provider counts at the end, comes late: until
        there is something of the answer, another deployment may make it. The end tells of the cache what the first start told: what
        later engines reused of the prompt is no gain of the client's, who has waited for it before.
        """
        if kind == "delta":
            tokens = event.delta.token_ids
            if tokens:
                self.tokens.extend(tokens)
            elif pieces_of(event.delta):
                self.resumable = False
            return True
        if kind == "started":
            return self._start(event)
        if kind == "finished":
            self._finish(event.finished)
            return True
        # Progress, and events of newer engines.
        return False

    def _start(self, event: engine_pb.GenerateResponse) -> bool:
        if not event.started.prompt_tokens:
            self._late_start = None if self._start_shown else event
            return False
        self._started_again = self._started is not None
        if self._started is None:
            # A copy: the message may hold much of the answer.
            self._started = engine_pb.Started()
            self._started.CopyFrom(event.started)
        is_first, self._start_shown = not self._start_shown, True
        return is_first

    def late_start(self) -> engine_pb.GenerateResponse | None:
        """The start that the client must see before the event that was taken last; None: it has seen one, or there is none."""
        event = self._late_start
        if event is not None:
            self._late_start, self._start_shown = None, True
        return event

    def resume(self, generate: engine_pb.GenerateRequest) -> None:
        """Makes a request go on behind the tokens that the client has."""
        if self.tokens:
            del generate.resume.token_ids[:]
            generate.resume.token_ids.extend(self.tokens)

    def fall_back(self) -> None:
        """Another deployment answers, from the beginning: what the start of the former one told of the prompt is not true of it."""
        self._started = self._late_start = None

    def _finish(self, finished: engine_pb.Finished) -> None:
        self.finish_key = finished.finish_key
        if self._started is not None and self._started_again:
            finished.usage.cached_tokens = self._started.cached_tokens
            finished.cache_hit = self._started.cache_hit
