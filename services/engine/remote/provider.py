"""The kinds of providers: where their APIs are, what they are called, and how they name models. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final


class Provider(Enum):
    """Whose API it is. The value is its name in settings, metrics and errors."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    GEMINI = "gemini"
    LITELLM = "litellm"
    OPENAI_COMPATIBLE = "openai_compatible"

    @property
    def title(self) -> str:
        """Its name in sentences."""
        return _TITLES[self]

    @property
    def default_base_url(self) -> str | None:
        """Where its API is, the version included; None where only a deployment can know."""
        return _BASE_URLS.get(self)


_TITLES: Final[Mapping[Provider, str]] = {
    Provider.OPENAI: "OpenAI",
    Provider.ANTHROPIC: "Anthropic",
    Provider.GEMINI: "Gemini",
    Provider.LITELLM: "LiteLLM",
    Provider.OPENAI_COMPATIBLE: "The provider",
}
_BASE_URLS: Final[Mapping[Provider, str]] = {
    Provider.OPENAI: "https://api.openai.com/v1",
    Provider.ANTHROPIC: "https://api.anthropic.com/v1",
    Provider.GEMINI: "https://generativelanguage.googleapis.com/v1beta",
}
# What routers put in front of a model's name to say whose it is (S1.20); the provider itself does not know it. A compatible
# server may well mean its slashes.
_PREFIXES: Final[Mapping[Provider, tuple[str, ...]]] = {
    Provider.OPENAI: ("openai/",),
    Provider.ANTHROPIC: ("anthropic/",),
    Provider.GEMINI: ("google/", "gemini/", "models/"),
    Provider.LITELLM: ("litellm/",),
    Provider.OPENAI_COMPATIBLE: (),
}


def provider_model(provider: Provider, model: str) -> str:
    """The model's name as the provider knows it: without what routers put in front."""
    for prefix in _PREFIXES[provider]:
        model = model.removeprefix(prefix)
    return model
