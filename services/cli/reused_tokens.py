"""How many prompt tokens did not have to be computed, from the metrics of the gateway."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S: Final = 2.0
_PROMPT: Final = "caravan_gateway_prompt_tokens_total"
_REUSED: Final = "caravan_gateway_cached_prompt_tokens_total"


@dataclass(frozen=True)
class ReusedTokens:
    """Tokens of the prompts of all finished requests since the gateway started, and those of them that were reused."""

    prompt: int = 0
    reused: int = 0


def read_metrics(text: str) -> ReusedTokens:
    """From the text that the gateway serves; unknown series are passed over. Raises ValueError."""
    sums = {_PROMPT: 0.0, _REUSED: 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in sums:
                sums[sample.name] += sample.value
    return ReusedTokens(int(sums[_PROMPT]), int(sums[_REUSED]))


def fetch(url: str) -> ReusedTokens | None:
    """Asks a gateway; None where it does not answer. Blocks for two seconds at most between bytes."""
    parts = urlsplit(url)
    # http.client, since it knows nothing of proxies.
    connection = http.client.HTTPConnection(parts.netloc, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", parts.path)
        response = connection.getresponse()
        return read_metrics(response.read().decode()) if response.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
