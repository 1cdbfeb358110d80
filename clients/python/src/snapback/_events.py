"""The daemon's events, as they happen (server-sent events)."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ._errors import ConnectionLost, DaemonTimeout
from ._models import invalid, mapping, shortened
from ._transport import Transport


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened in the daemon."""

    #: `pool`, `removed`, `taken`, `reset`, `agent`, `hook`, `released` or `degraded`; a newer
    #: daemon may tell more.
    name: str
    unix_ms: int
    #: All of it, as told.
    data: Mapping[str, Any]

    def __getitem__(self, field: str) -> Any:
        return self.data[field]

    def get(self, field: str, default: Any = None) -> Any:
        return self.data.get(field, default)


class EventStream(Iterator[Event]):
    """Events from the moment on at which this was made. Ends by `close`, or by an error."""

    def __init__(self, transport: Transport, connect_timeout: float, timeout: float | None):
        self._response, self._socket = transport.open("/v1/events", connect_timeout)
        self._timeout = timeout
        self._closed = False

    def __next__(self) -> Event:
        """The next event; `daemon_timeout` where none comes within the stream's timeout."""
        event = self.next(self._timeout)
        if event is None:
            raise StopIteration
        return event

    def next(self, timeout: float | None = None) -> Event | None:
        """The next event, none if the stream was closed. `timeout` in seconds; None waits for ever.

        The stream is closed by a timeout.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        data: list[str] = []
        while not self._closed:
            line = self._line(deadline, timeout)
            if line is None:
                break
            # An empty line ends an event; lines of other fields, and comments, say nothing here.
            if line.startswith("data:"):
                data.append(line[5:].lstrip(" "))
            elif not line and data:
                return event("\n".join(data))
        return None

    def _line(self, deadline: float | None, timeout: float | None) -> str | None:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.001)
        try:
            self._socket.settimeout(left)
            line = self._response.readline()
        except socket.timeout:
            self.close()
            raise DaemonTimeout(f"no event has come in {timeout:g} s") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            if self._closed:
                return None
            self.close()
            raise ConnectionLost(f"the daemon's events have ended: {error}") from error
        if line.endswith(b"\n"):
            return line.rstrip(b"\r\n").decode("utf-8", "replace")
        if self._closed:
            return None
        self.close()
        raise ConnectionLost("the daemon's events have ended: it closed the connection")

    def close(self) -> None:
        """Ends the stream; a thread that waits for an event gets none."""
        self._closed = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The daemon has closed it before.
            pass

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._response.close()


def event(text: str) -> Event:
    """An event as it was sent."""
    try:
        data = mapping(json.loads(text), "an event")
        return Event(str(data["event"]), int(data.get("unix_ms", 0)), data)
    except (KeyError, TypeError, ValueError):
        raise invalid(f"an event of {shortened(text)}") from None
