"""OpenAI bodies to requests. Pure: bytes in, an InferenceRequest or a CaravanError out."""

from __future__ import annotations

from typing import Final

from caravan.core.v1 import generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.gateway import cache_options, openai_messages, rules, scheduling
from services.gateway.openai_fields import CHAT_FIELDS, COMPLETION_FIELDS, unsupported
from services.gateway.openai_json import parse
from services.gateway.openai_schema import ChatCompletion, Completion
from services.gateway.requests import Api, InferenceRequest
from services.gateway.rules import Range, check_range, invalid
from services.runtime.errors import CaravanError

_COMPLETION_LOGPROBS: Final = Range(0, 5)
_Common = ChatCompletion | Completion


def parse_chat(body: bytes) -> InferenceRequest:
    """The request of POST /v1/chat/completions."""
    given = parse(body, ChatCompletion, CHAT_FIELDS)
    rules.check_model_name(given.model)
    generate = _generate(given, _max_tokens(given))
    openai_messages.add_chat(given, generate)
    if given.top_logprobs is not None:
        check_range("top_logprobs", given.top_logprobs, "top_logprobs")
        if not given.logprobs:
            raise invalid("top_logprobs", "it is only allowed when 'logprobs' is true.")
    if given.logprobs:
        generate.top_logprobs = given.top_logprobs or 0
    return _request(Api.CHAT, given, generate)


def parse_completion(body: bytes) -> InferenceRequest:
    """The request of POST /v1/completions."""
    given = parse(body, Completion, COMPLETION_FIELDS)
    rules.check_model_name(given.model)
    generate = _generate(given, ("max_tokens", given.max_tokens))
    _add_prompt(given.prompt, generate)
    if given.logprobs is not None:
        check_range("top_logprobs", given.logprobs, "logprobs", _COMPLETION_LOGPROBS)
        generate.top_logprobs = given.logprobs
    return _request(Api.COMPLETION, given, generate)


def _generate(given: _Common, max_tokens: tuple[str, int | None]) -> engine_pb.GenerateRequest:
    """Everything but the prompt."""
    return engine_pb.GenerateRequest(
        sampling=_sampling(given),
        stop=_stop(given, max_tokens),
        cache=cache_options.from_openai(given),
        whole=not given.stream,
    )


def _request(api: Api, given: _Common, generate: engine_pb.GenerateRequest) -> InferenceRequest:
    return InferenceRequest(
        api,
        given.model,
        generate,
        stream=bool(given.stream),
        include_usage=_include_usage(given),
        show_cache=given.caravan is not None,
        scheduling=scheduling.from_openai(given),
    )


def _max_tokens(given: ChatCompletion) -> tuple[str, int | None]:
    """The newer name wins; two different numbers contradict each other."""
    if given.max_completion_tokens is None:
        return "max_tokens", given.max_tokens
    if given.max_tokens not in {None, given.max_completion_tokens}:
        raise invalid("max_completion_tokens", "'max_tokens' says something else.")
    return "max_completion_tokens", given.max_completion_tokens


def _sampling(given: _Common) -> generation_pb2.Sampling:
    sampling = generation_pb2.Sampling()
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"):
        _set_number(sampling, name, getattr(given, name), name)
    if given.top_k is not None:
        check_range("top_k", given.top_k, "top_k")
        sampling.top_k = given.top_k
    _set_number(sampling, "repeat_penalty", *_repeat_penalty(given))
    if given.seed is not None:
        if not -(2**63) <= given.seed < 2**63:
            raise invalid("seed", "it is not a signed 64-bit integer.")
        sampling.seed = given.seed % 2**64
    _add_biases(given.logit_bias or {}, sampling)
    return sampling


def _set_number(
    sampling: generation_pb2.Sampling, name: str, value: float | None, param: str
) -> None:
    if value is None:
        return
    check_range(name, value, param)
    setattr(sampling, name, value)
    # The wire carries 32 bits: a tiny positive number may have become 0, which is outside where 0 is excluded.
    check_range(name, getattr(sampling, name), param)


def _repeat_penalty(given: _Common) -> tuple[float | None, str]:
    if given.repetition_penalty is None:
        return given.repeat_penalty, "repeat_penalty"
    if given.repeat_penalty not in {None, given.repetition_penalty}:
        raise invalid("repetition_penalty", "'repeat_penalty' says something else.")
    return given.repetition_penalty, "repetition_penalty"


def _add_biases(biases: dict[str, float], sampling: generation_pb2.Sampling) -> None:
    if len(biases) > rules.LOGIT_BIASES_MAX:
        raise invalid("logit_bias", f"at most {rules.LOGIT_BIASES_MAX} biases are allowed.")
    seen: set[int] = set()
    for key, bias in biases.items():
        # Ten digits hold every id, and int() of a longer text may take long.
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid("logit_bias", 'its keys are token ids, such as "42".')
        token = int(key)
        if token > rules.TOKEN_ID_MAX or token in seen:
            raise invalid("logit_bias", f"the token id {key} is too large or stands twice.")
        seen.add(token)
        check_range("logit_bias", bias, f"logit_bias.{key}")
        sampling.logit_bias.add(token_id=token, bias=bias)


def _stop(given: _Common, max_tokens: tuple[str, int | None]) -> generation_pb2.StopConditions:
    stop = generation_pb2.StopConditions(ignore_eos=bool(given.ignore_eos))
    param, tokens = max_tokens
    if tokens is not None:
        check_range("max_tokens", tokens, param)
        stop.max_tokens = tokens
    if isinstance(given.stop, str):
        if not 1 <= len(given.stop.encode()) <= rules.STOP_TEXT_BYTES_MAX:
            raise invalid("stop", f"a stop text has 1 to {rules.STOP_TEXT_BYTES_MAX} bytes.")
        stop.stop.append(given.stop)
    elif given.stop is not None:
        rules.check_stop(given.stop, "stop")
        stop.stop.extend(given.stop)
    return stop


def _include_usage(given: _Common) -> bool:
    options = given.stream_options
    if options is None:
        return False
    if not given.stream:
        raise invalid("stream_options", "it is only allowed when 'stream' is true.")
    if options.include_obfuscation:
        raise unsupported("stream_options.include_obfuscation", "Chunks are not padded.")
    return bool(options.include_usage)


def _add_prompt(
    prompt: str | list[str | int | list[int]], generate: engine_pb.GenerateRequest
) -> None:
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0] if isinstance(prompt[0], str) else list(prompt[0])
    if isinstance(prompt, str):
        if not prompt:
            raise invalid("prompt", "it is empty.")
        generate.text = prompt
        return
    if not prompt:
        raise invalid("prompt", "it is empty.")
    for index, token in enumerate(prompt):
        if not isinstance(token, int):
            _refuse_element(prompt, index)
        elif not 0 <= token <= rules.TOKEN_ID_MAX:
            raise invalid(f"prompt[{index}]", "it is no token id.")
        else:
            generate.tokens.ids.append(token)


def _refuse_element(prompt: list[str | int | list[int]], index: int) -> None:
    if all(not isinstance(element, int) for element in prompt):
        raise unsupported("prompt", "One prompt is answered per request.")
    raise CaravanError(
        "WRONG_TYPE",
        f"Invalid type for 'prompt[{index}]': it stands beside token ids and is none.",
        param=f"prompt[{index}]",
    )
