"""Revisions and differences of deployments, and cycles of fallbacks."""

from __future__ import annotations

from dataclasses import replace

from caravan.engine.v1 import remote_options_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.deployment import (
    Budget,
    Deployment,
    EngineOptions,
    Fallback,
    OnExceeded,
    Runtime,
    Serving,
)
from services.coordinator.deployment_changes import Change, ChangeKind, diff, revision
from services.coordinator.deployment_messages import from_messages, to_message
from services.coordinator.deployment_rules import DEPLOYMENTS_MAX, find_mistakes
from services.coordinator.remote import Remote

CHAT = Deployment("chat", "/models/chat.gguf")


def test_a_revision_is_what_engines_are_started_with() -> None:
    """Rules change without restarting engines; model, runtime and engine options do not. The digits never change."""
    assert revision(CHAT) == "cc726d6414816fb2"
    same = replace(CHAT, name="other", replicas=3, serving=Serving(5), idempotent=False)
    assert revision(same) == revision(CHAT)
    others = [
        replace(CHAT, model="/models/chat2.gguf"),
        replace(CHAT, runtime=Runtime.SCRIPTED),
        replace(CHAT, engine=EngineOptions(context_tokens=1)),
        replace(CHAT, engine=EngineOptions(max_sequences=1)),
        replace(CHAT, engine=EngineOptions(threads=1)),
        replace(CHAT, remote=Remote()),
        replace(CHAT, remote=Remote.of(pb.RemoteOptions(workers=1))),
        replace(CHAT, remote=Remote.of(pb.RemoteOptions(limits=pb.RateLimits(strict=True)))),
    ]
    assert len({revision(other) for other in [CHAT, *others]}) == 9
    assert revision(replace(CHAT, budget=Budget(1.0))) == revision(CHAT)
    assert revision(others[-2]) == "a627833530af7399"


def test_a_difference_names_its_fields() -> None:
    """Added, changed with fields, unchanged, removed: by name."""
    current = {name: Deployment(name, "/m.gguf") for name in ("a", "b", "c", "d")}
    wanted = [
        replace(current["b"], replicas=2, serving=Serving(max_queued=3, max_wait_s=2.0)),
        replace(current["c"], engine=EngineOptions(threads=4), fallback=(Fallback("a"),)),
        current["a"],
        Deployment("e", "/m.gguf"),
    ]
    changes = (
        Change("a", ChangeKind.UNCHANGED),
        Change("b", ChangeKind.CHANGED, ("replicas", "serving.max_queued", "serving.max_wait")),
        Change("c", ChangeKind.CHANGED, ("engine.threads", "fallback"), restarts_engines=True),
        Change("e", ChangeKind.ADDED),
    )
    assert diff(current, wanted, remove_others=False) == changes
    removing = diff(current, wanted, remove_others=True)
    assert removing == (*changes[:3], Change("d", ChangeKind.REMOVED), changes[3])


def test_a_difference_of_remote_options_names_their_fields() -> None:
    """Only the fields that differ, also where one is newly set, set to nothing, or a part of it says something by being there."""
    before = pb.RemoteOptions(
        base_url="https://a",
        retry=pb.RetryPolicy(max_retries=2, budget=0.5),
        limits=pb.RateLimits(requests_per_minute=5),
    )
    after = pb.RemoteOptions(
        base_url="https://a",
        retry=pb.RetryPolicy(max_retries=2, budget=0.0),
        limits=pb.RateLimits(requests_per_minute=6),
        price=pb.Price(),
        workers=3,
    )
    after.timeouts.first_byte.FromMilliseconds(500)
    chat = Deployment("chat", "gpt-4o", Runtime.OPENAI, remote=Remote.of(before))
    wanted = replace(chat, remote=Remote.of(after), budget=Budget(usd_per_day=3.0))
    (change,) = diff({"chat": chat}, [wanted], remove_others=False)
    assert change == Change(
        "chat",
        ChangeKind.CHANGED,
        (
            "remote.limits.requests_per_minute",
            "remote.price",
            "remote.retry.budget",
            "remote.timeouts.first_byte",
            "remote.workers",
            "budget.usd_per_day",
        ),
        restarts_engines=True,
    )
    cheaper = replace(chat, budget=Budget(usd_per_day=3.0))
    (change,) = diff({"chat": chat}, [cheaper], remove_others=False)
    assert (change.fields, change.restarts_engines) == (("budget.usd_per_day",), False)
    (change,) = diff({"chat": chat}, [replace(chat, remote=None)], remove_others=False)
    assert change.fields == ("remote",)


def test_remote_options_are_a_value() -> None:
    """Equal however they came about; the message that is handed out is a copy; what is not judged yet is not shown."""
    options = pb.RemoteOptions(workers=3, credential=pb.Credential(inline="sk-canary"))
    remote = Remote.of(options)
    assert remote == Remote.of(pb.RemoteOptions.FromString(options.SerializeToString()))
    options.workers = 4
    remote.to_message().workers = 5
    assert remote.to_message().workers == 3
    assert "canary" not in repr(Deployment("chat", "gpt-4o", remote=remote))


def test_a_cycle_over_what_is_kept_is_found() -> None:
    """The mistake is in what is given, also where the rest of the cycle was applied earlier; it is told once."""
    kept = {"b": Deployment("b", "/m.gguf", fallback=(Fallback("c"),))}
    given_now = [
        Deployment("a", "/m.gguf", fallback=(Fallback("b"),)),
        Deployment("c", "/m.gguf", fallback=(Fallback("a"),)),
    ]
    (mistake,) = find_mistakes(given_now, kept)
    assert mistake.field == "deployments[0].fallback[0].deployment"
    assert mistake.message == "closes a cycle: a -> b -> c -> a"


def test_there_is_a_most() -> None:
    """No more than 256 are kept, those from before included; a longer list is not looked through."""
    kept = {f"k{i}": Deployment(f"k{i}", "/m.gguf") for i in range(DEPLOYMENTS_MAX)}
    (mistake,) = find_mistakes([CHAT], kept)
    assert mistake.field == "deployments"
    assert find_mistakes([kept["k0"]], kept) == []
    read, _ = from_messages([to_message(CHAT)] * 1000)
    assert len(read) == DEPLOYMENTS_MAX + 1


names = st.sampled_from("abcdef")


@given(st.dictionaries(names, st.lists(names, max_size=3, unique=True), max_size=6))
def test_what_is_accepted_has_no_cycle(graph: dict[str, list[str]]) -> None:
    """Fallbacks without a mistake end somewhere; and what ends somewhere has no mistake."""
    deployments = [
        Deployment(name, "/m.gguf", fallback=tuple(Fallback(target) for target in targets))
        for name, targets in graph.items()
    ]
    left = dict(graph)
    while ends := [n for n, to in left.items() if not set(to) & left.keys()]:
        for name in ends:
            del left[name]
    known = all(target in graph for targets in graph.values() for target in targets)
    assert (not find_mistakes(deployments, {})) == (not left and known)


@given(
    st.builds(
        Deployment,
        name=names,
        model=st.just("/m.gguf"),
        replicas=st.integers(0, 64),
        serving=st.builds(
            Serving,
            max_queued=st.none() | st.integers(0, 9),
            max_wait_s=st.none() | st.sampled_from([0.0, 0.25, 30.0]),
        ),
        fallback=st.lists(st.builds(Fallback, names), max_size=2).map(tuple),
        idempotent=st.booleans(),
        remote=st.none()
        | st.builds(
            Remote.of, st.builds(pb.RemoteOptions, base_url=names, workers=st.integers(0, 9))
        ),
        budget=st.builds(
            Budget,
            st.floats(0, 9),
            tenant_usd_per_day=st.floats(0, 9),
            on_exceeded=st.sampled_from(OnExceeded),
        ),
    )
)
def test_messages_say_everything(deployment: Deployment) -> None:
    """There and back a deployment is the same."""
    assert from_messages([to_message(deployment)]) == ([deployment], [])
