"""The KV cache with real processes and the real model: asked again is warm, wherever the first answer went."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.inference.v1 import inference_service_pb2 as pb
from caravan.inference.v1 import inference_service_pb2_grpc as stubs

from tests.support.stack import CHAT, DEMO, Stack, command, running
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not DEMO.exists(), reason="models/caravan-demo.gguf is absent"),
]
MODELS = {"demo": str(DEMO)}


@pytest.fixture(scope="module")
def kv(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The demo model on one engine, whose processes may be killed."""
    with running(tmp_path_factory.mktemp("kv") / "state", MODELS) as stack:
        yield stack


def body(subject: str, **caravan: Any) -> dict[str, Any]:
    """A chat with a long system message of its own; the answer is the likeliest one."""
    facts = " ".join(f"The {subject} number {n} is in box {n * 7 % 13}." for n in range(64))
    return {
        "model": "demo",
        "messages": [
            {"role": "system", "content": facts},
            {"role": "user", "content": "Hello, who are you?"},
        ],
        "temperature": 0,
        "max_tokens": 24,
        "caravan": caravan,
    }


class Answer:
    """What a client sees of one answer."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.text = document["choices"][0]["message"]["content"]
        self.prompt = document["usage"]["prompt_tokens"]
        self.cached = document["usage"]["prompt_tokens_details"]["cached_tokens"]
        self.hit = document["caravan"]["cache_hit"]
        self.key = document["caravan"]["finish_key"]
        self.engine = document["caravan"]["engine_id"]


def ask(stack: Stack, subject: str, **caravan: Any) -> Answer:
    """One answer, which must come."""
    response = httpx.post(stack.url + CHAT, json=body(subject, **caravan), timeout=60)
    assert response.status_code == 200, response.text
    return Answer(response.json())


def ask_until_answered(stack: Stack, subject: str) -> Answer:
    """Asks again while engines are away, which is 503."""

    def attempt() -> Answer | None:
        response = httpx.post(stack.url + CHAT, json=body(subject), timeout=60)
        assert response.status_code in {200, 503}, response.text
        return Answer(response.json()) if response.status_code == 200 else None

    answer = wait_for(attempt, "an answer", 60)
    assert answer is not None
    return answer


def ask_cold(stack: Stack, subject: str) -> Answer:
    """A first answer, of which nothing was known; returns when it is on disk."""
    answer = ask(stack, subject)
    assert (answer.hit, answer.cached) == ("cold", 0)
    assert answer.prompt > 512, "three blocks at least"
    wait_for(lambda: answer.key in stack.saved_keys(), "the answer is saved")
    return answer


def check_warm(warm: Answer, cold: Answer, *hits: str) -> None:
    """The same answer, of which nothing but the last token of the prompt was computed again."""
    assert warm.hit in hits
    assert warm.cached == warm.prompt - 1 == cold.prompt - 1
    assert warm.text == cold.text


def kill(stack: Stack, name: str) -> None:
    """kill -9, and `caravan up` knows."""
    before = stack.pids()[name]
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: stack.pids().get(name) != before, f"the death of {name} is known")


def joined(stack: Stack, engines: int = 1) -> bool:
    """Whether the cache service runs and knows the engines."""
    if "cache" not in stack.pids():
        return False
    return f"sessions  {engines} engines" in shell(stack, "stats", check=False)


def shell(stack: Stack, *arguments: str, check: bool = True) -> str:
    """What `caravan cache` prints."""
    done = subprocess.run(
        command("cache", *arguments, "--state-dir", str(stack.state_dir)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_second_time_is_warm(kv: Stack) -> None:
    """The same prompt again is computed but for its last token, says the same, and is counted."""
    cold = ask_cold(kv, "apple")
    warm = ask(kv, "apple")
    check_warm(warm, cold, "resident")
    bypassed = ask(kv, "apple", cache=False)
    assert (bypassed.hit, bypassed.cached, bypassed.key) == ("cold", 0, None)
    assert bypassed.text == cold.text
    line = 'caravan_gateway_cached_prompt_tokens_total{hit="resident",model="demo"}'
    (value,) = [row for row in kv.metrics("gateway").splitlines() if row.startswith(line)]
    assert float(value.split()[-1]) >= warm.cached


def test_a_salt_isolates(kv: Stack) -> None:
    """Another salt shares nothing, neither in cells nor in blocks; the same salt does."""
    cold = ask_cold(kv, "pear")
    salted = ask(kv, "pear", cache_salt="tenant-a")
    assert (salted.hit, salted.cached) == ("cold", 0)
    assert salted.text == cold.text
    assert salted.key != cold.key
    check_warm(ask(kv, "pear", cache_salt="tenant-a"), cold, "resident", "exact", "partial")


def test_a_conversation_goes_on(kv: Stack) -> None:
    """The next turn, which names the answer before, computes the new words only; streamed, by the official client."""
    session = {"session_id": "conversation-1"}
    first = ask(kv, "plum", **session)
    request = body("plum", parent_key=first.key, **session)
    messages = [
        *request["messages"],
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And what can you do?"},
    ]
    with openai.OpenAI(base_url=f"{kv.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="demo",
            messages=messages,
            temperature=0,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"caravan": request["caravan"]},
        )
        chunks = list(stream)
    assert chunks[-2].choices[0].finish_reason
    assert (chunks[-2].model_extra or {})["caravan"]["cache_hit"] in {"resident", "partial"}
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= first.prompt


def test_a_prompt_can_be_computed_ahead(kv: Stack) -> None:
    """PrefillOnly through Envoy, then the same prompt; then the conversation is let go."""
    request = body("peach")
    prompt = chat_pb2.ChatPrompt(
        messages=[
            chat_pb2.ChatMessage(
                role=chat_pb2.Role.Value(f"ROLE_{message['role'].upper()}"),
                content=message["content"],
            )
            for message in request["messages"]
        ]
    )
    options = generation_pb2.CacheOptions(session_id="conversation-2")
    with grpc.insecure_channel(f"127.0.0.1:{kv.port}") as channel:
        stub = stubs.InferenceServiceStub(channel)
        ahead = stub.PrefillOnly(
            pb.PrefillOnlyRequest(model="demo", chat=prompt, cache=options), timeout=60
        )
        assert (ahead.cached_tokens, ahead.cache_hit) == (0, generation_pb2.CACHE_HIT_COLD)
        assert ahead.engine_id == "engine-0"
        assert len(ahead.finish_key) == 32
        warm = ask(kv, "peach", session_id="conversation-2")
        assert warm.prompt == ahead.prompt_tokens
        assert warm.cached == warm.prompt - 1
        end = pb.EndSessionRequest(model="demo", session_id="conversation-2")
        assert stub.EndSession(end, timeout=10).found
        assert not stub.EndSession(end, timeout=10).found
    kv.wait_until_free()


def test_an_engine_that_was_killed_is_warm_again(kv: Stack) -> None:
    """kill -9 of the engine: the next one reads what it had saved."""
    cold = ask_cold(kv, "cherry")
    kill(kv, "engine-0")
    check_warm(ask_until_answered(kv, "cherry"), cold, "exact", "partial")


def test_without_the_cache_service_requests_go_on(kv: Stack) -> None:
    """kill -9 of the cache service: no request notices (I7); when it is back it knows what is on disk, and saves go on."""
    cold = ask_cold(kv, "lemon")
    before = kv.saved_keys()
    kill(kv, "cache")
    check_warm(ask(kv, "lemon"), cold, "resident", "exact")
    during = ask(kv, "quince")
    assert during.hit == "cold"
    wait_for(lambda: joined(kv), "the engine has joined again", 60)
    wait_for(lambda: before <= kv.saved_keys(), "what is on disk is known again")
    ask_cold(kv, "fig")


def test_a_cache_service_that_hangs_delays_little(kv: Stack) -> None:
    """A service that is there and does not answer costs each request a bounded time, not its answer (I7)."""
    pid = kv.pids()["cache"]
    os.kill(pid, signal.SIGSTOP)
    try:
        with httpx.Client(base_url=kv.url, timeout=10) as client:
            for subject in ("date", "kiwi"):
                answer = Answer(client.post(CHAT, json=body(subject)).json())
                assert answer.hit == "cold"
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: joined(kv), "the engine has joined", 60)
    ask_cold(kv, "lime")


def test_the_command_shows_checks_and_drops(kv: Stack) -> None:
    """`caravan cache` beside a running stack."""
    cold = ask_cold(kv, "melon")
    wait_for(lambda: joined(kv), "the engine has joined", 60)
    assert " disk " in f" {shell(kv, 'stats').replace(os.linesep, ' ')} "
    rows = [json.loads(line) for line in shell(kv, "ls", "--json").splitlines()]
    assert cold.key in {row["key"] for row in rows}
    (_, row) = shell(kv, "ls", "--prefix", cold.key).splitlines()
    assert row.split()[0] == cold.key[:12]
    assert shell(kv, "verify").endswith(" 0 bad\n")
    assert "copies dropped" in shell(kv, "evict", "--all")
    wait_for(lambda: not kv.saved_keys(), "everything was dropped")
    wait_for(lambda: not list(kv.state_dir.glob("kv/*.kvc")), "the files are gone")
    ask_cold(kv, "grape")


def test_everything_may_be_restarted(tmp_path: Path) -> None:
    """The same state directory: asked again after a restart is warm from disk; a file that went bad is not believed."""
    with running(tmp_path, MODELS) as stack:
        cold = ask_cold(stack, "apple")
        other = ask_cold(stack, "pear")
        pids = list(stack.pids().values())
    with running(tmp_path, MODELS) as stack:
        assert not set(pids) & set(stack.pids().values())
        wait_for(lambda: {cold.key, other.key} <= stack.saved_keys(), "the disk was looked through")
        check_warm(ask(stack, "apple"), cold, "exact", "partial")
        _damage(tmp_path / "kv" / f"{other.key}.kvc")
        again = ask(stack, "pear")
        assert again.text == other.text
        assert 0 < again.cached < again.prompt - 1, "what came before the bad file was used"


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_engines_share_what_they_saved(tmp_path: Path) -> None:
    """When the engine that answered is gone, the other one starts from its blocks."""
    with running(tmp_path, MODELS, "--engines", "2", "--threads", "1") as stack:
        wait_for(lambda: joined(stack, 2), "both engines have joined", 60)
        cold = ask_cold(stack, "apple")
        kill(stack, cold.engine)
        warm = ask_until_answered(stack, "apple")
        assert warm.engine != cold.engine
        check_warm(warm, cold, "exact", "partial")


def test_the_cache_is_a_choice(tmp_path: Path) -> None:
    """--no-cache: no process, no folder; an engine still reuses what is in its own cells."""
    with running(tmp_path, MODELS, "--no-cache") as stack:
        assert "cache" not in stack.pids()
        cold = ask(stack, "apple")
        assert cold.hit == "cold"
        check_warm(ask(stack, "apple"), cold, "resident")
    assert not (tmp_path / "kv").exists()
