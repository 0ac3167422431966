"""What one lookup in the cache service costs, with a million blocks known.

`python -m bench.acquire [--rows 1000000] [--shuffled]`. The service runs as a process of its own, and this process plays one engine over
loopback gRPC. The blocks are chains of 128: a prompt of 32k tokens. The service
learns of them in the order in which they are saved, in which engines also tell of them after a restart, or with `--shuffled` in
none: then the rows of a chain lie apart in memory, and a lookup mostly waits for that. Latency: one Acquire of a whole chain at a time, each
released before the next. Rate: several calls in flight; service and client are pinned to a core each, so the figure is what one
core serves. Beside Acquires, with and without their Releases, stands the Release of a claim that is not held: next to nothing
is done for it, so it shows what gRPC alone costs. Memory: resident bytes before the first and after the last Acquire. Keys: the
time in which an engine computes the 128 keys of such a prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc

from bench import children
from bench.measures import median, percentile
from bench.report import Report, Table, arguments, ceiling, finish, floor, progress
from services.engine.kv.keys import BLOCK_TOKENS, Namespace, block_keys
from services.runtime.channel import open_channel

CHAIN = 128
PART = 2_048
SIZE = 3_000_000
IN_FLIGHT = 8
WARM_UP = 200
P50_MS, RATE, RSS_GB, KEYS_MS = 2.0, 2_000.0, 1.0, 2.0
NOTHING = "Release of nothing"
ROOT_KEY = hashlib.sha256(b"the empty prompt").digest()


def key_of(number: int, at: int) -> bytes:
    """Key of a block of a chain; before the first comes the empty prompt."""
    return hashlib.sha256(f"{number} {at}".encode()).digest() if at >= 0 else ROOT_KEY


def chain_keys(number: int) -> list[bytes]:
    """Keys of one chain."""
    return [key_of(number, at) for at in range(CHAIN)]


def block_of(number: int, at: int) -> pb.Block:
    """A block of a chain."""
    block = pb.Block(
        key=key_of(number, at),
        parent_key=key_of(number, at - 1),
        start=BLOCK_TOKENS * at,
        end=BLOCK_TOKENS * (at + 1),
        size_bytes=SIZE + number,
        save_reason=pb.SAVE_REASON_COLD,
    )
    block.created.FromSeconds(1_790_000_000 + number)
    return block


def inventory(rows: int, *, shuffled: bool) -> Iterator[pb.JoinRequest]:
    """What an engine tells of a root that holds so many blocks, chain by chain or in no order."""
    places: Sequence[int] = range(rows // CHAIN * CHAIN)
    if shuffled:
        places = random.Random(3).sample(places, len(places))
    for first in range(0, len(places), PART):
        blocks = [block_of(*divmod(place, CHAIN)) for place in places[first : first + PART]]
        yield pb.JoinRequest(inventory=pb.Inventory(root_id="disk", blocks=blocks))
    yield pb.JoinRequest(inventory=pb.Inventory(root_id="disk", complete=True))


@dataclass(frozen=True, slots=True)
class Rate:
    """Calls per second, and the share of a core that the service used."""

    per_second: float
    share: float

    @property
    def cpu_s(self) -> float:
        """Processor seconds of 1,000 calls."""
        return 1000 * self.share / self.per_second


@dataclass(slots=True)
class Found:
    """What was measured; times in seconds, memory in bytes."""

    empty_rss: int = 0
    loaded_rss: int = 0
    used_rss: int = 0
    latencies: list[float] = field(default_factory=list)
    rates: dict[str, Rate] = field(default_factory=dict)
    key_times: list[float] = field(default_factory=list)


def resident(pid: int) -> int:
    """Resident bytes of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", text, re.MULTILINE)
    assert found
    return int(found.group(1)) * 1024


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Engine:
    """One engine of the service. Answers are not parsed, so that this side is not what limits the rate."""

    def __init__(self, address: str, rows: int, *, shuffled: bool) -> None:
        self._channel = open_channel(address)
        self._stub = pb_grpc.CacheServiceStub(self._channel)
        self._raw: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(
            "/caravan.cache.v1.CacheService/Acquire"
        )
        self._join = self._stub.Join()
        self._rows = rows
        self._shuffled = shuffled
        self.session_id = ""

    async def join(self) -> None:
        """Joins, and tells what its root holds."""
        register = pb.Registration(
            engine_id="bench",
            address="127.0.0.1:7010",
            roots=[pb.Root(root_id="disk", tier=pb.TIER_DISK, quota_bytes=2**62, writable=True)],
        )
        await self._join.write(pb.JoinRequest(register=register))
        welcome = await self._join.read()
        assert isinstance(welcome, pb.JoinResponse)
        self.session_id = welcome.welcome.session_id
        for part in inventory(self._rows, shuffled=self._shuffled):
            await self._join.write(part)
        expected = self._rows // CHAIN * CHAIN
        while (await self._stub.GetStats(pb.GetStatsRequest())).rows < expected:  # noqa: ASYNC110
            await asyncio.sleep(0.1)

    def request(self, rng: random.Random) -> pb.AcquireRequest:
        """An Acquire of one of the chains."""
        keys = b"".join(chain_keys(rng.randrange(self._rows // CHAIN)))
        return pb.AcquireRequest(session_id=self.session_id, keys=keys, root_key=ROOT_KEY)

    async def acquire(self, request: pb.AcquireRequest) -> float:
        """One Acquire and its Release; returns the seconds of the former."""
        began = time.perf_counter()
        found = await self._stub.Acquire(request)
        seconds = time.perf_counter() - began
        assert len(found.blocks) == CHAIN
        await self.release(found.claim_id)
        return seconds

    async def call_for_nothing(self, _: bytes) -> None:
        """The Release of a claim that is not held."""
        await self.release("claim-none")

    async def acquire_only(self, request: bytes) -> None:
        """One Acquire whose claim is kept."""
        await self._raw(request)

    async def acquire_and_release(self, request: bytes) -> None:
        """One Acquire and its Release."""
        answer = await self._raw(request)
        # Field 1 comes first: its tag, its length, the claim.
        await self.release(answer[2 : 2 + answer[1]].decode())

    async def release(self, claim_id: str) -> None:
        """Gives a claim back."""
        await self._stub.Release(pb.ReleaseRequest(session_id=self.session_id, claim_id=claim_id))

    async def close(self) -> None:
        """Leaves."""
        self._join.cancel()
        await self._channel.close()


async def rate(call: Callable[[bytes], Awaitable[None]], requests: list[bytes], pid: int) -> Rate:
    """What is served with several in flight."""
    left = iter(requests)

    async def worker() -> None:
        for request in left:
            await call(request)

    began, used = time.perf_counter(), processor_seconds(pid)
    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    seconds = time.perf_counter() - began
    return Rate(len(requests) / seconds, (processor_seconds(pid) - used) / seconds)


def measure_keys(found: Found, rounds: int = 50) -> None:
    """The time to compute the keys of a prompt of 32k tokens."""
    rng = random.Random(1)
    namespace = Namespace(bytes(32), 1, bytes(32))
    for _ in range(rounds):
        tokens = [rng.randrange(150_000) for _ in range(CHAIN * BLOCK_TOKENS)]
        began = time.perf_counter()
        assert len(block_keys(namespace, tokens)) == CHAIN
        found.key_times.append(time.perf_counter() - began)


async def measure(address: str, pid: int, rows: int, calls: int, *, shuffled: bool) -> Found:
    """Plays the engine."""
    found = Found(empty_rss=resident(pid))
    engine = Engine(address, rows, shuffled=shuffled)
    progress(f"telling of {rows} blocks")
    await engine.join()
    found.loaded_rss = resident(pid)
    rng = random.Random(2)
    progress("latency")
    for number in range(calls + WARM_UP):
        seconds = await engine.acquire(engine.request(rng))
        if number >= WARM_UP:
            found.latencies.append(seconds)
    for name, call in (
        (NOTHING, engine.call_for_nothing),
        ("Acquire", engine.acquire_only),
        ("Acquire and Release", engine.acquire_and_release),
    ):
        progress(f"rate, {name}")
        requests = [engine.request(rng).SerializeToString() for _ in range(2 * calls)]
        found.rates[name] = await rate(call, requests, pid)
    progress("every block once")
    for number in range(rows // CHAIN):
        keys = b"".join(chain_keys(number))
        request = pb.AcquireRequest(session_id=engine.session_id, keys=keys, root_key=ROOT_KEY)
        await engine.acquire_and_release(request.SerializeToString())
    found.used_rss = resident(pid)
    await engine.close()
    return found


def report(found: Found, rows: int) -> Report:
    """The figures and the claims."""
    result = Report("acquire")
    result.notes.append(f"{rows} blocks in chains of {CHAIN}; service and client on a core each")
    milliseconds = [1000 * seconds for seconds in found.latencies]
    result.tables.append(
        Table(
            f"Acquire of {CHAIN} blocks, one at a time, ms",
            ("", "p50", "p99"),
            (
                (
                    "loopback gRPC",
                    f"{percentile(milliseconds, 0.5):.2f}",
                    f"{percentile(milliseconds, 0.99):.2f}",
                ),
            ),
        )
    )
    rates = tuple(
        (name, f"{one.per_second:.0f}", f"{100 * one.share:.0f}", f"{one.cpu_s:.3f}")
        for name, one in found.rates.items()
    )
    heads = ("calls", "per second", "% of a core", "CPU s of 1,000")
    result.tables.append(Table(f"{IN_FLIGHT} in flight", heads, rates))
    memory = tuple(
        (name, f"{value / 1e6:.0f}", f"{(value - found.empty_rss) / rows:.0f}")
        for name, value in (
            ("no block", found.empty_rss),
            ("all blocks", found.loaded_rss),
            ("all blocks used", found.used_rss),
        )
    )
    result.tables.append(Table("resident memory", ("", "MB", "bytes per block"), memory))
    result.claims += [
        ceiling("Acquire of 32k tokens, p50", percentile(milliseconds, 0.5), P50_MS, "ms"),
        floor(
            "Acquires per second on one core", found.rates["Acquire"].per_second, RATE, "calls/s"
        ),
        ceiling("memory with all blocks", found.used_rss / 1e9, RSS_GB, "GB"),
        ceiling("keys of 32k tokens", 1000 * median(found.key_times), KEYS_MS, "ms"),
    ]
    return result


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = arguments("acquire", __doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shuffled", action="store_true", help="tell of the blocks in no order")
    parser.add_argument("--calls", type=int, default=2_000)
    args = parser.parse_args()
    port, metrics_port = children.free_port(), children.free_port()
    environment = {
        "CARAVAN_CACHE_ADDRESS": f"127.0.0.1:{port}",
        "CARAVAN_CACHE_METRICS_ADDRESS": f"127.0.0.1:{metrics_port}",
        "CARAVAN_CACHE_HEARTBEAT_S": "60",
        "CARAVAN_CACHE_MAX_CLAIMS": "1000000",
    }
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "services.cache"]
    with children.running("cache", command, environment) as process:
        os.sched_setaffinity(process.pid, {cores[0]})
        os.sched_setaffinity(0, set(cores[1:]) or {cores[0]})
        children.wait_until_answers("cache", process, f"http://127.0.0.1:{metrics_port}/metrics")
        address = f"127.0.0.1:{port}"
        found = asyncio.run(
            measure(address, process.pid, args.rows, args.calls, shuffled=args.shuffled)
        )
    measure_keys(found)
    result = report(found, args.rows // CHAIN * CHAIN)
    if args.shuffled:
        result.notes.append("told in no order")
    return finish(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
