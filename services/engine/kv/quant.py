"""The byte of a key that names how the weights are quantised (S2.3). Pure."""

from __future__ import annotations

from typing import Final

_NAMES: Final = (
    *("f32", "f16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k_m", "q4_k_s", "q5_k_m"),
    *("q5_k_s", "q6_k", "q8_k", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "iq2_xxs", "iq2_xs", "iq2_s"),
    *("iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq1_s", "iq1_m", "iq4_nl", "iq4_xs", "bf16"),
)
_BYTES: Final = {name: byte for byte, name in enumerate(_NAMES)}
UNKNOWN: Final = 255
"""The byte of every name that is not in the table. The fingerprint tells such models apart."""
KNOWN_BYTES: Final = frozenset({*range(len(_NAMES)), UNKNOWN})
"""Every byte that a file may hold (W41: the unknown one too)."""


def quant_byte(name: str) -> int:
    """The byte of a name such as `q4_k_m`, in any case; UNKNOWN where the table does not have it."""
    return _BYTES.get(name.lower(), UNKNOWN)
