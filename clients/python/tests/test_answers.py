"""What the daemon's answers become."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import snapback
from fake import GUEST, POOL, Fake, answer, error
from snapback._client import given
from snapback._transport import checked


def client_of(fake: Fake) -> snapback.Client:
    return snapback.Client(fake.path, timeout=60)


def test_pools(tmp_path: Path) -> None:
    problem = {"code": "not_found", "message": "no such file", "more": 1}
    degraded = {**POOL, "state": "degraded", "problem": problem}
    with Fake(tmp_path / "s", [answer([POOL, degraded])]) as fake, client_of(fake) as client:
        whole, broken = client.pools()
    assert (whole.name, whole.armed, whole.ready, whole.max) == ("booted", 2, 1, 16)
    assert whole.problem is None and whole.cache == snapback.Cache(1, 2, 3, 4)
    assert broken.problem == snapback.Problem("not_found", "no such file")


def test_a_guest_and_its_names(tmp_path: Path) -> None:
    script = [
        answer(GUEST),
        answer({"how": "new_process", "ms": 9.5, "guest": GUEST | {"qemu_pid": 4712}}),
    ]
    with Fake(tmp_path / "s", script) as fake, client_of(fake) as client:
        vm = client.take("booted", name="mine", timeout=5)
        assert (vm.id, vm.name, vm.pool, vm.pid) == ("g7", "booted-7", "booted", 4711)
        assert vm.ports == {2222: 40731}
        assert vm.directory == Path("/run/snapback/booted-7")
        assert vm.qmp_path == vm.directory / "qmp.sock"
        reset = vm.reset()
    assert reset == snapback.Reset("new_process", 9.5, None)
    assert vm.pid == 4712, "a reset by a new process is told"
    assert fake.requests == [
        "POST /v1/pools/booted/take HTTP/1.1",
        "POST /v1/guests/g7/reset HTTP/1.1",
    ]
    assert fake.bodies[0] == {"name": "mine", "timeout_s": 5}


def test_a_guest_of_which_little_is_known(tmp_path: Path) -> None:
    little = {name: GUEST[name] for name in ("id", "pool", "name", "qemu_pid", "dir")}
    with Fake(tmp_path / "s", [answer([little])]) as fake, client_of(fake) as client:
        [vm] = client.guests()
    assert (vm.ports, vm.ms, vm.present) == ({}, None, None)
    with pytest.raises(snapback.QmpError, match="no control socket") as raised:
        vm.qmp("query-status")
    assert raised.value.code == "qemu_unreachable"


def test_info(tmp_path: Path) -> None:
    told = {"version": "0.1.0", "pid": 3, "uptime_s": 1.5, "came_later": {}}
    with Fake(tmp_path / "s", [answer(told)]) as fake, client_of(fake) as client:
        assert client.info() == snapback.Info("0.1.0", 3, 1.5)


def test_what_a_pool_is_asked_for(tmp_path: Path) -> None:
    with Fake(tmp_path / "s", [answer(POOL, 201)]) as fake, client_of(fake) as client:
        client.create_pool("a b/c", "vm.snap", armed=2, ports={2222: 0}, arguments=["-S"])
    assert fake.bodies == [
        {
            "name": "a b/c",
            "image": str(Path("vm.snap").absolute()),
            "armed": 2,
            "ports": {"2222": 0},
            "arguments": ["-S"],
        }
    ]


def test_names_are_quoted(tmp_path: Path) -> None:
    with Fake(tmp_path / "s", [answer(POOL), answer(None, 204)]) as fake, client_of(fake) as client:
        client.set_pool("a b/c", max=3)
        client.release("?x")
    assert fake.requests == [
        "PATCH /v1/pools/a%20b%2Fc HTTP/1.1",
        "DELETE /v1/guests/%3Fx HTTP/1.1",
    ]


def test_an_error_has_its_code(tmp_path: Path) -> None:
    script = [error("pool_exhausted", "all 16 guests are in use", 503)]
    with Fake(tmp_path / "s", script) as fake, client_of(fake) as client:
        with pytest.raises(snapback.SnapbackError) as raised:
            client.take("booted")
    failure = raised.value
    assert (failure.code, failure.status, failure.retryable) == ("pool_exhausted", 503, True)
    assert str(failure) == "all 16 guests are in use [pool_exhausted]"


@pytest.mark.parametrize(
    "status, told",
    [
        (200, b"<html>"),
        (404, b"not found"),
        (500, b"[]"),
        (502, b'{"message": "no code"}'),
    ],
)
def test_other_servers_are_told_from_a_daemon(status: int, told: bytes) -> None:
    with pytest.raises(snapback.SnapbackError) as raised:
        checked(status, told)
    assert raised.value.code == "answer_invalid"


@pytest.mark.parametrize("missing", ["id", "name", "qemu_pid", "dir", "pool"])
def test_a_guest_without_what_it_needs(missing: str, tmp_path: Path) -> None:
    incomplete = {name: value for name, value in GUEST.items() if name != missing}
    with Fake(tmp_path / "s", [answer([incomplete])]) as fake, client_of(fake) as client:
        with pytest.raises(snapback.SnapbackError, match=missing) as raised:
            client.guests()
    assert raised.value.code == "answer_invalid"


@pytest.mark.parametrize("answered", [[], "x", 3, {"name": "only"}])
def test_what_is_no_pool(answered: Any, tmp_path: Path) -> None:
    with Fake(tmp_path / "s", [answer(answered)]) as fake, client_of(fake) as client:
        with pytest.raises(snapback.SnapbackError) as raised:
            client.pool("booted")
    assert raised.value.code == "answer_invalid"


def test_nothing_is_sent_for_what_is_not_given() -> None:
    assert given({"a": None, "b": 0, "c": False, "d": []}) == {"b": 0, "c": False, "d": []}


@pytest.mark.parametrize(
    "failure",
    [
        snapback.SnapbackError("io", "broken", 500),
        snapback.DaemonUnreachable("gone"),
        snapback.DaemonTimeout("late"),
        snapback.ConnectionLost("cut"),
        snapback.QmpError("qemu_refused", "no", "GenericError"),
    ],
)
def test_errors_pass_between_processes(failure: snapback.SnapbackError) -> None:
    again = pickle.loads(pickle.dumps(failure))
    assert type(again) is type(failure)
    assert vars(again) == vars(failure) and str(again) == str(failure)


def stream(*events: Any) -> bytes:
    """The beginning of a stream of events, in pieces as servers like to send them."""
    text = ": hello\n\n"
    for event in events:
        text += f"event: x\nid: 3\ndata: {json.dumps(event)}\n\n: still here\n\n"
    body = text.encode()
    pieces = [body[at : at + 7] for at in range(0, len(body), 7)]
    chunks = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces)
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    return head + chunks


def test_events(tmp_path: Path) -> None:
    taken = {"event": "taken", "unix_ms": 5, **GUEST}
    later = {"event": "came_later", "unix_ms": 6}
    with Fake(tmp_path / "s", [stream(taken, later)]) as fake:
        with client_of(fake).events(timeout=60) as events:
            first, second = next(events), next(events)
            # A daemon that ends is no silent end.
            with pytest.raises(snapback.ConnectionLost):
                next(events)
    assert (first.name, first.unix_ms, first["id"]) == ("taken", 5, "g7")
    assert (second.name, second.get("id")) == ("came_later", None)
    assert fake.requests == ["GET /v1/events HTTP/1.1"]


def test_no_event_in_time(tmp_path: Path) -> None:
    # The second reply is for a request that never comes: the connection stays open.
    with Fake(tmp_path / "s", [stream(), b""]) as fake:
        with client_of(fake).events(timeout=0.01) as events:
            with pytest.raises(snapback.DaemonTimeout):
                next(events)
            assert list(events) == [], "the stream is closed"


def test_events_are_refused(tmp_path: Path) -> None:
    with Fake(tmp_path / "s", [error("unauthorized", "a token is needed", 401)]) as fake:
        with pytest.raises(snapback.SnapbackError) as raised:
            client_of(fake).events()
    assert (raised.value.code, raised.value.status) == ("unauthorized", 401)
