"""Guests from the pools of a snapback daemon.

    with snapback.take("booted") as vm:     # released at the end of the block
        vm.qmp("query-status")
        vm.reset()

The functions here ask the daemon of `SNAPBACK_SOCKET`, or of this user; `Client` asks any other.
docs/python.md has the details.
"""

from __future__ import annotations

import atexit
import functools
from typing import Any

from ._client import Client, Path
from ._errors import ConnectionLost, DaemonTimeout, DaemonUnreachable, QmpError, SnapbackError
from ._events import Event, EventStream
from ._guest import Guest
from ._models import Cache, Info, Memory, Pool, Problem, Reset, Setup
from ._qmp import Monitor
from ._transport import default_socket

__all__ = [
    "Cache",
    "Client",
    "ConnectionLost",
    "DaemonTimeout",
    "DaemonUnreachable",
    "Event",
    "EventStream",
    "Guest",
    "Info",
    "Memory",
    "Monitor",
    "Pool",
    "Problem",
    "QmpError",
    "Reset",
    "Setup",
    "SnapbackError",
    "create_pool",
    "default_client",
    "events",
    "guest",
    "guests",
    "info",
    "pool",
    "pools",
    "release",
    "remove_pool",
    "reset",
    "set_pool",
    "take",
]


def default_client() -> Client:
    """The client of the functions below."""
    return _client(default_socket())


@functools.cache
def _client(socket: str) -> Client:
    client = Client(socket)
    # Nobody else closes what it keeps.
    atexit.register(client.close)
    return client


def take(pool: str, *, name: str | None = None, timeout: float = 30.0) -> Guest:
    """See `Client.take`."""
    return default_client().take(pool, name=name, timeout=timeout)


def pools() -> list[Pool]:
    """See `Client.pools`."""
    return default_client().pools()


def pool(name: str) -> Pool:
    """See `Client.pool`."""
    return default_client().pool(name)


def create_pool(name: str, image: Path, **options: Any) -> Pool:
    """See `Client.create_pool`, which has the options."""
    return default_client().create_pool(name, image, **options)


def set_pool(
    name: str, *, armed: int | None = None, max: int | None = None, memory_mib: int | None = None
) -> Pool:
    """See `Client.set_pool`."""
    return default_client().set_pool(name, armed=armed, max=max, memory_mib=memory_mib)


def remove_pool(name: str) -> None:
    """See `Client.remove_pool`."""
    default_client().remove_pool(name)


def guests() -> list[Guest]:
    """See `Client.guests`."""
    return default_client().guests()


def guest(id: str) -> Guest:
    """See `Client.guest`."""
    return default_client().guest(id)


def reset(id: str) -> Reset:
    """See `Client.reset`."""
    return default_client().reset(id)


def release(id: str) -> None:
    """See `Client.release`."""
    default_client().release(id)


def events(timeout: float | None = None) -> EventStream:
    """See `Client.events`."""
    return default_client().events(timeout)


def info() -> Info:
    """See `Client.info`."""
    return default_client().info()
