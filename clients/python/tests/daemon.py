"""The daemon that tests use, if there is one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import pytest

import snapback

#: A pool of it.
POOL = os.environ.get("SNAPBACK_TEST_POOL", "")

needs_daemon = pytest.mark.skipif(
    not (POOL and os.environ.get("SNAPBACK_SOCKET")),
    reason="SNAPBACK_SOCKET and SNAPBACK_TEST_POOL name no daemon and pool",
)

#: Seconds for anything that should happen at once, on a loaded machine.
PATIENCE = 120


@contextlib.contextmanager
def leaving_nothing() -> Iterator[snapback.Client]:
    """A client of a test that gives back what it takes."""
    with snapback.Client() as client:
        before = {guest.id for guest in client.guests()}
        yield client
        try:
            until("the guests to go", lambda: {guest.id for guest in client.guests()} <= before)
        finally:
            for guest in client.guests():
                if guest.id not in before:
                    guest.release()


def until(what: str, holds: Callable[[], bool]) -> None:
    """Asks a condition again and again until it holds."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)
