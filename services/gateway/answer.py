"""One answer, made by one engine after another: what the client has of it, and what it gets of the next. Pure."""

from __future__ import annotations

from array import array

from caravan.engine.v1 import engine_service_pb2 as engine_pb


class Answer:
    """What the engines of a request have sent so far."""

    def __init__(self) -> None:
        self._started: engine_pb.Started | None = None
        self._started_again = False
        self.tokens: array[int] = array("I")
        """Ids of the tokens that the client has been given, from the first."""
        self.finish_key = b""
        """Key of the KV state that the request left; empty until it has finished, or where none is kept."""

    @property
    def any_events(self) -> bool:
        """Whether the client has been given anything."""
        return self._started is not None or bool(self.tokens)

    def take(self, event: engine_pb.GenerateResponse, kind: str | None) -> bool:
        """Takes the next event of the engine in charge; whether it is for the client. `kind` is the field that it sets.

        The client sees one start. The end tells of the cache what the first start told: what later engines reused of the
        prompt is no gain of the client's, who has waited for it before.
        """
        if kind == "delta":
            self.tokens.extend(event.delta.token_ids)
            return True
        if kind == "started":
            self._started_again = self._started is not None
            if not self._started_again:
                self._started = event.started
            return not self._started_again
        if kind == "finished":
            self._finish(event.finished)
            return True
        # Progress, and events of newer engines.
        return False

    def resume(self, generate: engine_pb.GenerateRequest) -> None:
        """Makes a request go on behind the tokens that the client has."""
        if self.tokens:
            del generate.resume.token_ids[:]
            generate.resume.token_ids.extend(self.tokens)

    def _finish(self, finished: engine_pb.Finished) -> None:
        self.finish_key = finished.finish_key
        if self._started is not None and self._started_again:
            finished.usage.cached_tokens = self._started.cached_tokens
            finished.cache_hit = self._started.cache_hit
