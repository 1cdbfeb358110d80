"""A server that misbehaves as it is told: faults that a daemon or QEMU can't be made to show."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class Fake:
    """Listens at a path. Each connection is given the replies of one script, one for each request
    that it has sent, and is then closed.

    A reply that is None closes the connection with the request unread, which resets it. With
    `lines` a request is a line, as in QMP, and the first reply comes without one; else it is one
    of HTTP.
    """

    def __init__(self, path: Path, *scripts: Sequence[bytes | None], lines: bool = False) -> None:
        self.path = path
        #: The first line of each request.
        self.requests: list[str] = []
        self.bodies: list[Any] = []
        self._lines = lines
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, args=[scripts])

    def __enter__(self) -> Fake:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A script that nobody connected for would be waited for in vain.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        self._listener.close()
        assert not self._thread.is_alive()

    def _serve(self, scripts: Sequence[Sequence[bytes | None]]) -> None:
        for script in scripts:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(60)
                try:
                    self._play(connection, script)
                except OSError:
                    # The client has left.
                    continue

    def _play(self, connection: socket.socket, script: Sequence[bytes | None]) -> None:
        with connection.makefile("rb") as read:
            for number, reply in enumerate(script):
                if reply is None:
                    connection.recv(1, socket.MSG_PEEK)
                    self.requests.append("(unread)")
                    return
                if not (self._lines and number == 0) and not self._read(read):
                    return
                connection.sendall(reply)

    def _read(self, read: Any) -> bool:
        first = read.readline()
        if not first:
            return False
        self.requests.append(first.decode().strip())
        if self._lines:
            return True
        length = 0
        for header in iter(read.readline, b"\r\n"):
            name, _, value = header.decode().partition(":")
            if name.lower() == "content-length":
                length = int(value)
        body = read.read(length)
        self.bodies.append(json.loads(body) if body else None)
        return True


def answer(value: Any, status: int = 200) -> bytes:
    """A whole HTTP answer."""
    body = b"" if value is None else json.dumps(value).encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def error(code: str, message: str, status: int) -> bytes:
    """An answer that is an error."""
    return answer({"code": code, "message": message, "retryable": True}, status)


GUEST = {
    "id": "g7",
    "pool": "booted",
    "name": "booted-7",
    "qemu_pid": 4711,
    "qmp": "/run/snapback/booted-7/qmp.sock",
    "dir": "/run/snapback/booted-7",
    "ports": {"2222": 40731},
    "ms": 2.5,
    "age_s": 0,
    "resets": 0,
    "present": 0.25,
    "came_later": "ignored",
}

POOL = {
    "name": "booted",
    "image": "/srv/vm.snap",
    "state": "ready",
    "armed": 2,
    "ready": 1,
    "max": 16,
    "running": 1,
    "waiting": 0,
    "takes": 3,
    "preload": "none",
    "resettable": True,
    "share": False,
    "cache": {"bytes": 1, "limit": 2, "hits": 3, "misses": 4},
    "came_later": "ignored",
}
