"""Which requests share hashes, and which must not."""

from __future__ import annotations

from caravan.core.v1 import chat_pb2, generation_pb2
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.gateway.prefix_hashes import FIRST_MAX, LAST_MAX, prefix_hashes


def chat(*texts: str, tool: str = "", **cache: str | bool) -> engine_pb.GenerateRequest:
    """A chat of these messages."""
    prompt = chat_pb2.ChatPrompt(
        messages=[
            chat_pb2.ChatMessage(role=chat_pb2.ROLE_USER, content=content) for content in texts
        ],
        tools=[chat_pb2.Tool(name=tool)] if tool else [],
    )
    options = generation_pb2.CacheOptions()
    for name, value in cache.items():
        setattr(options, name, value)
    return engine_pb.GenerateRequest(chat=prompt, cache=options)


def test_a_conversation_begins_with_its_turn_before() -> None:
    """One hash for each message; those of the messages that were there before are the same."""
    before = prefix_hashes("demo", chat("system", "hello"))
    after = prefix_hashes("demo", chat("system", "hello", "hi", "more"))
    assert (len(before), len(after)) == (2, 4)
    assert after[:2] == before
    assert len(set(after)) == 4


def test_what_cannot_be_reused_shares_nothing() -> None:
    """Another model, salt or tool, or a message that is cut elsewhere."""
    chains = [
        prefix_hashes("demo", chat("ab", "c")),
        prefix_hashes("other", chat("ab", "c")),
        prefix_hashes("demo", chat("ab", "c", salt="s")),
        prefix_hashes("demo", chat("ab", "c", tool="f")),
        prefix_hashes("demo", chat("a", "bc")),
    ]
    assert len({value for chain in chains for value in chain}) == sum(map(len, chains))


def test_what_decides_nothing_is_not_hashed() -> None:
    """Sampling and the id of the conversation change no prefix; a request that bypasses the cache has none."""
    plain = chat("a", "b")
    other = chat("a", "b", session_id="s")
    other.sampling.temperature = 0.5
    assert prefix_hashes("demo", plain) == prefix_hashes("demo", other)
    assert prefix_hashes("demo", chat("a", bypass=True)) == ()


def test_texts_and_tokens_have_boundaries_of_their_own() -> None:
    """A longer text, and a longer list of tokens, shares the whole steps of the shorter one."""
    short = prefix_hashes("demo", engine_pb.GenerateRequest(text="ä" * 2048))
    long = prefix_hashes("demo", engine_pb.GenerateRequest(text="ä" * 2048 + "more"))
    assert (len(short), long[:2]) == (2, short)
    tokens = engine_pb.TokenPrompt(ids=range(600))
    assert len(prefix_hashes("demo", engine_pb.GenerateRequest(tokens=tokens))) == 3


def test_chains_are_bounded() -> None:
    """Of a very long chat the first boundaries and the last are kept."""
    texts = [str(number) for number in range(200)]
    kept = prefix_hashes("demo", chat(*texts))
    assert len(kept) == FIRST_MAX + LAST_MAX == 64
    assert kept[:FIRST_MAX] == prefix_hashes("demo", chat(*texts[:FIRST_MAX]))
    assert kept[-1] != kept[-2]
    longer = prefix_hashes("demo", chat(*texts, "one more"))
    assert set(kept[-LAST_MAX + 1 :]) <= set(longer)
