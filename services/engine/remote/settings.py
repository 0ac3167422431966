"""Settings of an engine in front of a provider."""

from __future__ import annotations

from dataclasses import dataclass

from caravan.engine.v1 import remote_options_pb2 as pb
from google.protobuf import json_format

from services.engine.member_settings import MemberSettings, NamedModel, named_model
from services.runtime.remote_options import PROVIDERS
from services.runtime.settings import choice, setting


def remote_options(value: str) -> pb.RemoteOptions:
    """JSON of caravan.engine.v1.RemoteOptions. What is wrong is not repeated: it may hold a secret."""
    try:
        return json_format.Parse(value, pb.RemoteOptions())
    except json_format.ParseError:
        raise ValueError("is not the JSON of caravan.engine.v1.RemoteOptions") from None


@dataclass(frozen=True)
class RemoteSettings(MemberSettings):
    """All that an engine in front of a provider can be told."""

    model: NamedModel = setting(  # noqa: RUF009 - a field, as all others are
        "CARAVAN_ENGINE_MODEL",
        "gpt-4o-mini=gpt-4o-mini",
        "NAME=MODEL, as the provider calls it",
        named_model,
    )
    provider: str = setting(
        "CARAVAN_REMOTE_PROVIDER",
        "openai",
        "openai, anthropic, gemini, litellm or openai_compatible",
        choice(*PROVIDERS),
    )
    options: pb.RemoteOptions = setting(  # noqa: RUF009 - a field, as all others are
        "CARAVAN_REMOTE_OPTIONS",
        "{}",
        "How to talk to the provider: caravan.engine.v1.RemoteOptions as JSON; never logged",
        remote_options,
        secret=True,
    )
