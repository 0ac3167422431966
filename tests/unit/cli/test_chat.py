"""`caravan chat` against a server that is scripted at the HTTP level."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from services.cli import chat as chat_module
from services.cli.chat_client import ChatClient, ChatError, error_text, pieces

Handler = Callable[[httpx.Request], httpx.Response]


def _event(text: str) -> str:
    return f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"


def _sse(*events: str) -> httpx.Response:
    return httpx.Response(200, text="".join(events), headers={"content-type": "text/event-stream"})


class _Server:
    """Answers with the number of messages it was sent, and keeps what it got."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "demo"}, {"id": "other"}]})
        body = json.loads(request.content)
        self.asked.append(body)
        if body["messages"][-1]["content"] == "fail":
            return httpx.Response(429, json={"error": {"message": "Full.", "code": "x"}})
        return _sse(
            ": keepalive\n\n",
            _event("seen "),
            _event(str(len(body["messages"]))),
            "data: [DONE]\n\n",
        )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs a chat over piped lines; returns exit code and output."""

    def run(server: Handler, lines: str, **options: Any) -> tuple[int, str]:
        def client(url: str) -> ChatClient:
            return ChatClient(url, httpx.MockTransport(server))

        monkeypatch.setattr(chat_module, "ChatClient", client)
        out = io.StringIO()
        asked = chat_module.Asked("http://x/v1/", **options)
        code = chat_module.chat(asked, io.StringIO(lines), out)
        return code, out.getvalue()

    return run


def test_turns_share_a_conversation(run: Callable[..., tuple[int, str]]) -> None:
    """Each turn sends all that was said; /reset forgets all but the system message; /exit ends."""
    server = _Server()
    code, out = run(server, "one\n\ntwo\n/reset\nthree\n/exit\nfour\n", system="Be kind.")
    assert (code, out) == (0, "seen 2\nseen 4\nseen 2\n")
    assert {body["model"] for body in server.asked} == {"demo"}
    assert [m["role"] for m in server.asked[1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


def test_the_model_can_be_chosen(run: Callable[..., tuple[int, str]]) -> None:
    """--model is sent as it is."""
    server = _Server()
    run(server, "hi\n", model="other", temperature=0.0)
    assert (server.asked[0]["model"], server.asked[0]["temperature"]) == ("other", 0)


def test_a_refusal_ends_a_pipe(
    run: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A script learns by the exit code and reads the server's words on stderr."""
    server = _Server()
    code, _ = run(server, "fail\nnever asked\n")
    assert code == 1
    assert "Full." in capsys.readouterr().err
    assert len(server.asked) == 1


def test_no_server_is_told(
    run: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """When nothing listens, the message says what to start."""

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    assert run(refuse, "hi\n")[0] == 1
    assert "caravan up" in capsys.readouterr().err


def test_ctrl_c_ends_the_answer_only() -> None:
    """What was answered before Ctrl-C stays in the conversation, and the request is closed."""
    closed = []

    class _Endless(ChatClient):
        def answer(self, model: str, messages: Any, temperature: Any = None) -> Any:
            try:
                yield "so far"
                raise KeyboardInterrupt
            finally:
                closed.append(True)

    with _Endless("http://x") as client:
        talk = chat_module._Talk(client, "demo", chat_module.Asked("http://x"), io.StringIO())
        assert talk._take_turn("go on")
    assert talk._conversation.messages[-1] == {"role": "assistant", "content": "so far"}
    assert closed


def _lines(*events: str) -> Iterator[str]:
    return iter("".join(events).splitlines())


def test_an_error_event_is_raised() -> None:
    """An error after the first byte is told with the server's words, after the text before it."""
    stream = pieces(_lines(_event("a"), 'data: {"error": {"message": "lost"}}\n\n'))
    assert next(stream) == "a"
    with pytest.raises(ChatError, match="lost"):
        next(stream)


def test_a_model_that_refuses_is_heard() -> None:
    """It says so in a field of its own."""
    refusal = _event("No.").replace('"content"', '"refusal"')
    assert list(pieces(_lines(refusal, "data: [DONE]\n\n"))) == ["No."]


@pytest.mark.parametrize("tail", ["", "data: {", "data: [1]\n\n"])
def test_a_cut_stream_is_no_answer(tail: str) -> None:
    """A stream without [DONE], or with nonsense in it, is not taken for a whole answer."""
    with pytest.raises(ChatError):
        list(pieces(_lines(_event("a"), tail)))


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"error": 5}', b'{"error": {"message": 5}}']
)
def test_odd_error_bodies_show_the_status(body: bytes) -> None:
    """Whatever a proxy answers, the user sees a sentence."""
    assert error_text(502, body) == "the server answered 502"
