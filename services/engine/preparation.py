"""From a GenerateRequest to work for the decode thread: validation, grammar, template, tokens, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

import numpy as np
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2

from services.engine.answer import Answer
from services.engine.backend import Backend, CacheSupport
from services.engine.grammar import json_grammar, tool_grammar
from services.engine.job import CacheUse, Work
from services.engine.key_chain import KeyChain
from services.engine.kv.keys import KEY_BYTES, Namespace
from services.engine.prompt import PromptTokenizer, tool_parameters
from services.engine.sampling import TOP_LOGPROBS_MAX, SamplingSpec, parse_sampling
from services.engine.text import StopMatcher
from services.engine.tool_calls import ToolCallParser, call_ids
from services.runtime.errors import CaravanError

STOPS_MAX: Final = 16
STOP_BYTES_MAX: Final = 256
REQUEST_ID_BYTES_MAX: Final = 128
SESSION_ID_BYTES_MAX: Final = 128
SALT_BYTES_MAX: Final = 256
_REQUIRING: Final = frozenset({chat_pb2.ToolChoice.MODE_REQUIRED, chat_pb2.ToolChoice.MODE_NAMED})


def check_request_id(request_id: str) -> None:
    """Raises INVALID_VALUE."""
    if not 1 <= len(request_id.encode()) <= REQUEST_ID_BYTES_MAX:
        raise _invalid("request_id", f"The request id must have 1 to {REQUEST_ID_BYTES_MAX} bytes.")


def check_session_id(session_id: str, param: str) -> None:
    """Raises INVALID_VALUE."""
    if len(session_id.encode()) > SESSION_ID_BYTES_MAX:
        raise _invalid(param, f"The session id has at most {SESSION_ID_BYTES_MAX} bytes.")


def check_salt(salt: str, param: str) -> None:
    """Raises INVALID_VALUE."""
    if len(salt.encode()) > SALT_BYTES_MAX:
        raise _invalid(param, f"The salt has at most {SALT_BYTES_MAX} bytes.")


class Preparation:
    """Prepares requests for one loaded model. `prepare` runs on worker threads: it takes milliseconds."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: PromptTokenizer,
        new_seed: Callable[[], int],
        kv_min_tokens: int,
    ) -> None:
        self.namespace: Namespace | None = None
        """The namespace of the model, while there is a store for its blocks."""
        self._kv_min_tokens = kv_min_tokens
        self._facts = backend.facts
        self._vocabulary = backend.vocabulary
        self._check_sampler = backend.check
        self._tokenizer = tokenizer
        self._new_seed = new_seed

    def prepare(self, request: engine_service_pb2.GenerateRequest) -> Work:
        """The work that the request asks for. Raises CaravanError of the caller's kind."""
        _check_cache(request.cache)
        sampling = parse_sampling(
            request.sampling,
            vocabulary_tokens=self._facts.vocabulary_tokens,
            fresh_seed=self._new_seed(),
        )
        stops = _stops(request.stop)
        top_logprobs = _top_logprobs(request)
        tools = self._check_tools(request)
        sampling = self._with_grammar(request, sampling)
        self._check_sampler(sampling)
        prompt = self._prompt(request)
        max_tokens = self._max_tokens(request, len(prompt))
        resumed = self._resumed(request, sampling)
        tokens = prompt + resumed
        token_array = np.array(tokens, np.int32)
        calls = None
        if tools:
            of_prompt = token_array[: len(prompt)].tobytes()
            calls = ToolCallParser(call_ids(request.request_id, of_prompt))
        answer = Answer(
            self._vocabulary.token_bytes,
            frozenset() if request.stop.ignore_eos else self._vocabulary.eog_tokens,
            max_tokens,
            StopMatcher(stops) if stops else None,
            calls,
        )
        answer.replay(resumed)
        return Work(
            tokens=tokens,
            token_array=token_array,
            prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            sampling=sampling,
            answer=answer,
            top_logprobs=top_logprobs,
            cache=self._cache_use(request.cache, tokens, len(prompt)),
        )

    def prepare_prefill(self, request: engine_service_pb2.GenerateRequest) -> Work:
        """The work of computing the prompt of a request and no answer. Raises CaravanError of the caller's kind."""
        return replace(self.prepare(request), max_tokens=0)

    def _cache_use(
        self, options: generation_pb2.CacheOptions, tokens: list[int], prompt_tokens: int
    ) -> CacheUse:
        sharable = (
            not options.bypass
            and prompt_tokens >= self._kv_min_tokens
            and self._facts.cache_support is not CacheSupport.OFF
        )
        salt, chain = options.salt.encode(), None
        if sharable and self.namespace is not None:
            chain = KeyChain(self.namespace.salted(salt), tokens)
        return CacheUse(sharable, salt, options.session_id, options.parent_key, chain)

    def _check_tools(self, request: engine_service_pb2.GenerateRequest) -> bool:
        """Whether tool calls are looked for in the answer."""
        if request.WhichOneof("prompt") != "chat":
            return False
        chat = request.chat
        mode = chat.tool_choice.mode
        if mode in _REQUIRING and not chat.tools:
            raise _invalid("tool_choice", "The tool choice asks for a tool, and there are none.")
        if mode == chat_pb2.ToolChoice.MODE_NAMED:
            if chat.tool_choice.name not in {tool.name for tool in chat.tools}:
                raise _invalid("tool_choice", f"There is no tool {chat.tool_choice.name!r}.")
        elif chat.tool_choice.name:
            raise _invalid("tool_choice", "Only a named tool choice has a name.")
        if not chat.tools or mode == chat_pb2.ToolChoice.MODE_NONE:
            return False
        if not self._tokenizer.knows_tools:
            raise CaravanError(
                "UNSUPPORTED_FIELD",
                "The chat template of the model does not show tools.",
                param="tools",
            )
        return True

    def _with_grammar(
        self, request: engine_service_pb2.GenerateRequest, sampling: SamplingSpec
    ) -> SamplingSpec:
        asked = request.sampling.grammar.WhichOneof("kind")
        chat = request.chat
        mode = chat.tool_choice.mode
        if request.WhichOneof("prompt") == "chat" and mode in _REQUIRING:
            if asked:
                raise _invalid(
                    "sampling.grammar", "A grammar and a required tool call exclude each other."
                )
            named = mode == chat_pb2.ToolChoice.MODE_NAMED
            callable_tools = [
                (tool.name, tool_parameters(tool, index))
                for index, tool in enumerate(chat.tools)
                if not named or tool.name == chat.tool_choice.name
            ]
            return replace(sampling, grammar=tool_grammar(callable_tools))
        if asked:
            return replace(sampling, grammar=json_grammar(request.sampling.grammar.json_schema))
        if request.sampling.HasField("grammar"):
            raise _invalid("sampling.grammar", "The grammar has no kind.")
        return sampling

    def _prompt(self, request: engine_service_pb2.GenerateRequest) -> list[int]:
        kind = request.WhichOneof("prompt")
        if kind == "chat":
            if not request.chat.messages:
                raise _invalid("messages", "A chat has at least one message.")
            prompt = self._tokenizer.chat(request.chat)
        elif kind == "text":
            prompt = self._tokenizer.text(request.text)
        else:
            prompt = self._known_tokens(request.tokens.ids, "prompt")
        if not prompt:
            raise _invalid(_prompt_param(request), "The prompt is empty.")
        return prompt

    def _resumed(
        self, request: engine_service_pb2.GenerateRequest, sampling: SamplingSpec
    ) -> list[int]:
        """What another engine has produced of the answer."""
        if not request.HasField("resume"):
            return []
        if not request.resume.token_ids:
            raise _invalid("resume.token_ids", "An answer that goes on has at least one token.")
        if sampling.drawn and not request.sampling.HasField("seed"):
            # A seed of this engine's would give the rest of another answer.
            raise _invalid("sampling.seed", "An answer that goes on needs the seed it began with.")
        return self._known_tokens(request.resume.token_ids, "resume.token_ids")

    def _known_tokens(self, given: Iterable[int], param: str) -> list[int]:
        tokens = list(given)
        size = self._facts.vocabulary_tokens
        for index, token in enumerate(tokens):
            if token >= size:
                raise _invalid(
                    f"{param}[{index}]", f"The vocabulary of {size} tokens has no {token}."
                )
        return tokens

    def _max_tokens(self, request: engine_service_pb2.GenerateRequest, prompt_tokens: int) -> int:
        context = self._facts.context_tokens
        if prompt_tokens >= context:
            raise CaravanError(
                "CONTEXT_LENGTH_EXCEEDED",
                f"The prompt has {prompt_tokens} tokens; the context of the model holds {context}, "
                "the answer included.",
                param=_prompt_param(request),
                prompt_tokens=str(prompt_tokens),
                context_tokens=str(context),
            )
        room = context - prompt_tokens
        if not request.stop.HasField("max_tokens"):
            return room
        if not 1 <= request.stop.max_tokens < 1 << 31:
            raise _invalid("stop.max_tokens", "max_tokens must be at least 1 and below 2^31.")
        return min(room, request.stop.max_tokens)


def _check_cache(options: generation_pb2.CacheOptions) -> None:
    if len(options.parent_key) not in {0, KEY_BYTES}:
        raise _invalid("cache.parent_key", f"A key has {KEY_BYTES} bytes.")
    check_session_id(options.session_id, "cache.session_id")
    check_salt(options.salt, "cache.salt")


def _prompt_param(request: engine_service_pb2.GenerateRequest) -> str:
    return "messages" if request.WhichOneof("prompt") == "chat" else "prompt"


def _stops(conditions: generation_pb2.StopConditions) -> tuple[str, ...]:
    stops = tuple(conditions.stop)
    if len(stops) > STOPS_MAX:
        raise _invalid("stop", f"There are {len(stops)} stop texts; the most is {STOPS_MAX}.")
    for index, stop in enumerate(stops):
        if not 1 <= len(stop.encode()) <= STOP_BYTES_MAX:
            raise _invalid(f"stop[{index}]", f"A stop text has 1 to {STOP_BYTES_MAX} bytes.")
    return stops


def _top_logprobs(request: engine_service_pb2.GenerateRequest) -> int | None:
    if not request.HasField("top_logprobs"):
        return None
    if request.top_logprobs > TOP_LOGPROBS_MAX:
        raise _invalid("top_logprobs", f"top_logprobs must be at most {TOP_LOGPROBS_MAX}.")
    return request.top_logprobs


def _invalid(param: str, message: str) -> CaravanError:
    return CaravanError("INVALID_VALUE", message, param=param)
