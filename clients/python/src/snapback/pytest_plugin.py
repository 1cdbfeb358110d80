"""A running guest for each test, by the fixture `snapback_vm` and the marker `snapback`.

pytest loads this by itself where the package is installed; docs/python.md is its reference.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Generator, Iterator
from typing import Any, NoReturn

import pytest

from ._client import Client
from ._errors import DaemonUnreachable, SnapbackError
from ._guest import Guest

SCOPES = ("function", "class", "module", "session")
RESETS = ("before", "after", "never", "on_failure")
MARKER = (
    'snapback(pool=..., scope="function", reset="before"): the guest that `snapback_vm` is; '
    f"scope: {', '.join(SCOPES)}; reset: {', '.join(RESETS)}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("snapback_pool", "the pool of tests that are not marked with another")
    parser.addini("snapback_socket", "the socket of the snapback daemon; wins over SNAPBACK_SOCKET")
    parser.addini("snapback_timeout", "seconds in which there has to be a guest", default="30")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a test's markers ask for."""

    pool: str
    scope: str
    reset: str


def wish(item: pytest.Item) -> Wish:
    """What the markers of a test, its class and its module ask for: the nearest word counts."""
    asked: dict[str, Any] = {}
    for marker in item.iter_markers("snapback"):
        words = dict(marker.kwargs)
        if len(marker.args) > 1:
            refuse("the marker `snapback` takes one argument without a name: the pool")
        if marker.args:
            words.setdefault("pool", marker.args[0])
        for name, value in words.items():
            asked.setdefault(name, value)
    pool = asked.pop("pool", None) or item.config.getini("snapback_pool")
    scope, reset = asked.pop("scope", "function"), asked.pop("reset", "before")
    if asked:
        refuse(f"the marker `snapback` knows no {', '.join(asked)}; it is: {MARKER}")
    if scope not in SCOPES or reset not in RESETS:
        refuse(f"scope={scope!r}, reset={reset!r}: the marker `snapback` is: {MARKER}")
    if not pool:
        refuse(
            'which pool is meant is not known: mark the test, `@pytest.mark.snapback(pool="…")`, '
            "or set the ini option snapback_pool"
        )
    return Wish(str(pool), scope, reset)


def refuse(why: str) -> NoReturn:
    """Fails the test that asks for a guest, without a trace of this file and of what was caught."""
    raise pytest.fail.Exception(why, pytrace=False) from None


@dataclasses.dataclass
class Held:
    """A guest that several tests use, one behind the other."""

    guest: Guest
    #: Whether a test has had it since it was taken or reset, and whether one has failed with it.
    used: bool = False
    failed: bool = False


class Keeper:
    """The guests of scopes wider than a test."""

    def __init__(self, client: Client, timeout: float) -> None:
        self.client = client
        self.timeout = timeout
        self._held: dict[tuple[str, str, str], Held] = {}

    def take(self, pool: str) -> Guest:
        try:
            return self.client.take(pool, timeout=self.timeout)
        except SnapbackError as error:
            refuse(f"there is no guest of the pool `{pool}`: {error}")

    def hold(self, wish: Wish, node: pytest.Item | pytest.Collector) -> Held:
        """The guest of a scope, in the state that the next test is to find."""
        key = (wish.pool, wish.scope, node.nodeid)
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = Held(self.take(wish.pool))
            node.addfinalizer(lambda: self._drop(key))
        elif (wish.reset == "before" and held.used) or (wish.reset != "never" and held.failed):
            self.reset(held)
        return held

    def reset(self, held: Held) -> None:
        """Takes a guest back; one of which that can't be had is replaced."""
        try:
            held.guest.reset()
        except DaemonUnreachable as error:
            refuse(str(error))
        except SnapbackError as error:
            warnings.warn(
                f"guest {held.guest.id} could not be reset, and another is taken: {error}",
                stacklevel=2,
            )
            self._release(held.guest)
            held.guest = self.take(held.guest.pool)
        held.used = held.failed = False

    def _drop(self, key: tuple[str, str, str]) -> None:
        self._held.pop(key).guest.release()

    @staticmethod
    def _release(guest: Guest) -> None:
        try:
            guest.release()
        except SnapbackError as error:
            warnings.warn(f"guest {guest.id} was not released: {error}", stacklevel=2)


@pytest.fixture(scope="session")
def snapback_client(pytestconfig: pytest.Config) -> Iterator[Client]:
    """The daemon, as `snapback.Client`: for fixtures of your own."""
    socket = pytestconfig.getini("snapback_socket")
    with Client(os.path.expanduser(socket) if socket else None) as client:
        yield client


@pytest.fixture(scope="session")
def snapback_keeper(snapback_client: Client, pytestconfig: pytest.Config) -> Keeper:
    """Not for tests: what holds the guests of wider scopes."""
    timeout = pytestconfig.getini("snapback_timeout")
    try:
        return Keeper(snapback_client, float(timeout))
    except ValueError:
        refuse(f"snapback_timeout is a number of seconds, and not {timeout!r}")


@pytest.fixture
def snapback_vm(
    request: pytest.FixtureRequest, snapback_keeper: Keeper
) -> Generator[Guest, None, None]:
    """A running guest, as the marker `snapback` asks for it."""
    item = request.node
    asked = wish(item)
    node = scope_node(item, asked.scope)
    if node is item:
        with snapback_keeper.take(asked.pool) as guest:
            item.stash[GUEST] = describe(guest)
            yield guest
        return
    held = snapback_keeper.hold(asked, node)
    item.stash[GUEST] = describe(held.guest)
    yield held.guest
    held.used = True
    held.failed = held.failed or item.stash.get(FAILED, False)
    if asked.reset == "after":
        snapback_keeper.reset(held)


def scope_node(item: pytest.Item, scope: str) -> pytest.Item | pytest.Collector:
    """Whose end ends the guest. A test outside of any class is a class of its own."""
    kinds: dict[str, Any] = {
        "class": pytest.Class,
        "module": pytest.Module,
        "session": pytest.Session,
    }
    kind = kinds.get(scope)
    node: pytest.Collector | None = item.getparent(kind) if kind else None
    return node or item


def describe(guest: Guest) -> str:
    """Where to look for the guest of a test that has failed."""
    return (
        f"{guest.name} (id {guest.id}, pool {guest.pool}), QEMU's process {guest.pid}\n"
        f"directory {guest.directory}\nports {dict(guest.ports)}"
    )


#: Of a test: its guest in words, and whether it has failed.
GUEST = pytest.StashKey[str]()
FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    report = (yield).get_result()
    if report.failed:
        item.stash[FAILED] = True
        if GUEST in item.stash:
            report.sections.append(("snapback guest", item.stash[GUEST]))
