"""Settings of the engine, and the environment that llama.cpp's threads must find before the library loads."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.engine.kv.config import RootConfig, parse_roots
from services.engine.member_settings import MemberSettings, NamedModel, named_model, optional_peer
from services.runtime.settings import byte_size, choice, integer, number, setting

SEQUENCES_MAX: Final = 256
"""llama.cpp's own limit (LLAMA_MAX_SEQ)."""


@dataclass(frozen=True)
class EngineSettings(MemberSettings):
    """All that an engine can be told."""

    model: NamedModel = setting(  # noqa: RUF009 - a field, as all others are
        "CARAVAN_ENGINE_MODEL",
        "demo=models/caravan-demo.gguf",
        "NAME=PATH of a GGUF file, or NAME=scripted:?key=value&...",
        named_model,
    )
    max_sequences: int = setting(
        "CARAVAN_ENGINE_MAX_SEQUENCES",
        "32",
        "Most sequences at a time",
        integer(1, SEQUENCES_MAX - 1),
    )
    max_waiting: int = setting(
        "CARAVAN_ENGINE_MAX_WAITING",
        "64",
        "Most requests that wait for a sequence",
        integer(0, 100_000),
    )
    context_tokens: int = setting(
        "CARAVAN_ENGINE_CONTEXT_TOKENS",
        "0",
        "Most tokens of one sequence; 0: what the model was trained for, at most 8192",
        integer(0, 1 << 24),
    )
    cells: int = setting(
        "CARAVAN_ENGINE_CELLS",
        "0",
        "KV cells of all sequences together; 0: a whole context for each sequence, within 1 GiB",
        integer(0, 1 << 26),
    )
    batch_tokens: int = setting(
        "CARAVAN_ENGINE_BATCH_TOKENS", "512", "Most tokens of one batch", integer(256, 8192)
    )
    chunk_tokens: int = setting(
        "CARAVAN_ENGINE_CHUNK_TOKENS",
        "64",
        "Most tokens of one prompt in a batch in which others generate",
        integer(1, 256),
    )
    threads: int = setting(
        "CARAVAN_ENGINE_THREADS",
        "0",
        "Threads of llama.cpp; 0: one for a model below 64 MiB, else a thread per core that nobody else uses",
        integer(0, 512),
    )
    spin_count: int = setting(
        "CARAVAN_ENGINE_SPIN_COUNT",
        "5000",
        "Turns that llama.cpp's threads spin at a barrier before they sleep; GOMP_SPINCOUNT, if set, wins",
        integer(0, 1 << 40),
    )
    wait_policy: str = setting(
        "CARAVAN_ENGINE_WAIT_POLICY",
        "spin",
        "spin (as many turns as the spin count says) or passive (sleep at once)",
        choice("spin", "passive"),
    )
    template_seconds: float = setting(
        "CARAVAN_ENGINE_TEMPLATE_SECONDS",
        "1",
        "Seconds that a chat template may take",
        number(0.01, 60),
    )
    residents: int = setting(
        "CARAVAN_ENGINE_RESIDENTS",
        "16",
        "Most finished sequences that stay in their cells for reuse",
        integer(0, SEQUENCES_MAX - 2),
    )
    resident_cells: int = setting(
        "CARAVAN_ENGINE_RESIDENT_CELLS",
        "0",
        "Most cells that only finished sequences hold; 0: a sixteenth of all, at least a context",
        integer(0, 1 << 26),
    )
    session_seconds: float = setting(
        "CARAVAN_ENGINE_SESSION_SECONDS",
        "600",
        "Seconds after its last use for which the cells of a session are kept in preference to others",
        number(0, 86_400),
    )
    swap_bytes: int = setting(
        "CARAVAN_ENGINE_SWAP_BYTES",
        "256MiB",
        "Most bytes of sequences that are swapped out; beyond it their state is computed again",
        byte_size,
    )
    kv_min_tokens: int = setting(
        "CARAVAN_ENGINE_KV_MIN_TOKENS",
        "64",
        "Shorter prompts neither use nor feed the KV cache",
        integer(1, 1 << 20),
    )
    cache: str = setting(
        "CARAVAN_ENGINE_CACHE",
        "",
        "Address of the cache service, host:port; empty: blocks stay in this engine's RAM",
        optional_peer,
    )
    kv_ram_bytes: int = setting(
        "CARAVAN_ENGINE_KV_RAM_BYTES",
        "512MiB",
        "Most bytes of saved blocks in RAM; 0: none",
        byte_size,
    )
    kv_roots: tuple[RootConfig, ...] = setting(
        "CARAVAN_ENGINE_KV_ROOTS",
        "",
        "Folders for saved blocks, TIER:PATH:SIZE separated by commas; the tier is disk or ram_file",
        parse_roots,
    )
    kv_queue_bytes: int = setting(
        "CARAVAN_ENGINE_KV_QUEUE_BYTES",
        "256MiB",
        "Most bytes of blocks that wait to be written; beyond it blocks are not saved",
        byte_size,
    )

    @property
    def slots(self) -> int:
        """Sequences that llama.cpp holds: those that run and those that stay, within its limit."""
        return min(self.max_sequences + self.residents, SEQUENCES_MAX - 1)


def prepare_threads(settings: EngineSettings, environ: MutableMapping[str, str]) -> None:
    """Puts the OpenMP settings where libgomp reads them; it does so once, when the library loads.

    KMP_BLOCKTIME is of no use to libgomp, but ggml (ggml-cpu.c) sets it where it is missing, in the thread that loads the model;
    and in C no thread may read the environment meanwhile, as gRPC does: engines died of it at their start.
    """
    environ.setdefault("KMP_BLOCKTIME", "200")
    if settings.wait_policy == "passive":
        environ.setdefault("OMP_WAIT_POLICY", "passive")
    else:
        environ.setdefault("GOMP_SPINCOUNT", str(settings.spin_count))


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once."""
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
