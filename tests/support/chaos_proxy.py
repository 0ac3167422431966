"""A TCP proxy that can stop forwarding without closing anything: what a cut cable or a dropped route looks like."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator

_CHUNK = 1 << 16


class FreezingProxy:
    """Forwards connections from a loopback port to `target` (host:port), until it is frozen."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._wake, self._woken = socket.socketpair()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._frozen = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens, as host:port."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def freeze(self) -> None:
        """No byte passes any more, in either direction; nobody is told."""
        self._frozen.set()
        self._wake.send(b".")

    def thaw(self) -> None:
        """Bytes pass again, also those that have been waiting."""
        self._frozen.clear()
        self._wake.send(b".")

    def close(self) -> None:
        """Closes all connections."""
        self._closing.set()
        self._wake.send(b".")
        self._thread.join(10)
        for connection in [self._listener, self._wake, self._woken, *self._peers]:
            connection.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._closing.is_set():
                for key, _ in selector.select():
                    self._handle(selector, key.fileobj)

    def _handle(self, selector: selectors.BaseSelector, ready: object) -> None:
        assert isinstance(ready, socket.socket)
        if ready is self._woken:
            self._woken.recv(_CHUNK)
            # What is not read stays in the kernel's buffers, so a frozen connection fills up like a real one.
            for connection in [self._listener, *self._peers]:
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                if not self._frozen.is_set():
                    selector.register(connection, selectors.EVENT_READ)
        elif self._frozen.is_set():
            return
        elif ready is self._listener:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._target)
            self._peers |= {client: server, server: client}
            selector.register(client, selectors.EVENT_READ)
            selector.register(server, selectors.EVENT_READ)
        elif ready in self._peers:
            self._forward(selector, ready)

    def _forward(self, selector: selectors.BaseSelector, ready: socket.socket) -> None:
        peer = self._peers[ready]
        try:
            data = ready.recv(_CHUNK)
            if data:
                return peer.sendall(data)
        except OSError:
            pass  # Broken on either side: both are closed.
        for connection in (ready, peer):
            selector.unregister(connection)
            del self._peers[connection]
            connection.close()
        return None


@contextlib.contextmanager
def freezing_proxy(target: str) -> Iterator[FreezingProxy]:
    """A proxy to `target` (host:port) that is closed at the end."""
    proxy = FreezingProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
