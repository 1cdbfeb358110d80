"""Daemons that are not there, and connections that break."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from pathlib import Path

import pytest

import snapback
from fake import GUEST, POOL, Fake, answer, error
from snapback._transport import default_socket


def test_no_socket(tmp_path: Path) -> None:
    with pytest.raises(snapback.DaemonUnreachable) as raised:
        snapback.Client(tmp_path / "none").pools()
    assert raised.value.code == "daemon_unreachable"
    assert "snapback daemon" in str(raised.value) and "SNAPBACK_SOCKET" in str(raised.value)


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    with pytest.raises(snapback.DaemonUnreachable, match="start it again"):
        snapback.Client(tmp_path / "dead").take("booted")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every socket")
def test_a_forbidden_socket(tmp_path: Path) -> None:
    with Fake(tmp_path / "s") as fake:
        fake.path.chmod(0)
        with pytest.raises(snapback.DaemonUnreachable, match="access"):
            snapback.Client(fake.path).pools()


def test_a_port_that_nobody_has() -> None:
    with socket.socket() as taken:
        # Bound, and not listened at: nobody else gets it meanwhile.
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(snapback.DaemonUnreachable, match="127.0.0.1"):
            snapback.Client(url=url, token="secret").pools()


def test_where_the_daemon_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPBACK_SOCKET", "/named")
    assert default_socket() == "/named"
    assert "/named" in repr(snapback.default_client())
    monkeypatch.delenv("SNAPBACK_SOCKET")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_socket() == "/run/snapback/daemon.sock"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_socket() == "/run/user/1000/snapback/daemon.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_socket() == f"{tempfile.gettempdir()}/snapback-1000/daemon.sock"


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://x", "http://"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        snapback.Client(url=url)


def test_one_connection_serves_many_requests(tmp_path: Path) -> None:
    with Fake(tmp_path / "s", [answer([]), answer([]), answer(GUEST)]) as fake:
        with snapback.Client(fake.path) as client:
            client.pools(), client.guests(), client.take("booted")
    assert len(fake.requests) == 3


def test_a_restarted_daemon_is_found_before_anything_is_sent(tmp_path: Path) -> None:
    # Even a take is sent: it can't have been carried out before.
    with Fake(tmp_path / "s", [answer([])], [answer(GUEST)]) as fake:
        with snapback.Client(fake.path) as client:
            client.pools()
            [kept] = client._transport._idle
            # The end of the first connection has come.
            assert kept.sock.recv(1, socket.MSG_PEEK) == b""
            assert client.take("booted").id == "g7"
    assert len(fake.requests) == 2


def test_what_may_be_asked_twice_is_repeated(tmp_path: Path) -> None:
    with Fake(tmp_path / "s", [None], [answer([POOL])]) as fake:
        assert len(snapback.Client(fake.path).pools()) == 1
    assert fake.requests == ["(unread)", "GET /v1/pools HTTP/1.1"]


def test_a_take_is_not_repeated(tmp_path: Path) -> None:
    with Fake(tmp_path / "s", [None], [answer(GUEST)]) as fake:
        with pytest.raises(snapback.ConnectionLost, match="may have been carried out") as raised:
            snapback.Client(fake.path).take("booted")
    assert fake.requests == ["(unread)"]
    assert raised.value.code == "connection_lost"


def test_a_repeated_release_that_finds_nothing_was_done_before(tmp_path: Path) -> None:
    gone = error("no_such_guest", "there is no guest g7", 404)
    with Fake(tmp_path / "s", [None], [gone, gone]) as fake:
        with snapback.Client(fake.path) as client:
            client.release("g7")
            # Of one that was not repeated, it is an error.
            with pytest.raises(snapback.SnapbackError) as raised:
                client.release("g7")
    assert raised.value.code == "no_such_guest"


CUT = answer([POOL])[:-5]


def test_a_truncated_answer_is_asked_for_again(tmp_path: Path) -> None:
    with Fake(tmp_path / "s", [CUT], [answer([POOL])]) as fake:
        assert len(snapback.Client(fake.path).pools()) == 1


@pytest.mark.parametrize("reply", [CUT, b"", b"HTTP/1.1 200 OK\r\n", b"SSH-2.0-x\r\n"])
def test_answers_that_stay_truncated(reply: bytes, tmp_path: Path) -> None:
    with Fake(tmp_path / "s", [reply], [reply]) as fake:
        with pytest.raises(snapback.ConnectionLost):
            snapback.Client(fake.path).pools()
    assert len(fake.requests) == 2


def test_a_daemon_that_is_silent(tmp_path: Path) -> None:
    with Fake(tmp_path / "s", [b"", b""]) as fake:
        with pytest.raises(snapback.DaemonTimeout, match="GET /v1/pools") as raised:
            snapback.Client(fake.path, timeout=0.01).pools()
    assert raised.value.code == "daemon_timeout"


def test_threads_don_t_wait_for_each_other(tmp_path: Path) -> None:
    """A take that waits for a guest keeps nobody else from asking."""
    started, let_go = threading.Event(), threading.Event()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    def serve() -> None:
        first, _ = listener.accept()
        first.recv(1 << 16)
        started.set()
        second, _ = listener.accept()
        second.recv(1 << 16)
        second.sendall(answer([]))
        let_go.wait(60)
        first.sendall(answer(GUEST))
        first.close()
        second.close()

    server = threading.Thread(target=serve)
    server.start()
    client = snapback.Client(tmp_path / "s", timeout=60)
    taken: list[snapback.Guest] = []
    taker = threading.Thread(target=lambda: taken.append(client.take("booted")))
    taker.start()
    assert started.wait(60)
    assert client.pools() == []
    let_go.set()
    taker.join(60)
    server.join(60)
    listener.close()
    assert [vm.id for vm in taken] == ["g7"]


def test_a_block_ends_whatever_becomes_of_the_guest(tmp_path: Path) -> None:
    gone = error("no_such_guest", "there is no guest g7", 404)
    script = [answer(GUEST), gone, answer(GUEST), error("internal", "a bug", 500)]
    with Fake(tmp_path / "s", script) as fake, snapback.Client(fake.path) as client:
        with client.take("booted"):
            pass
        # An error in the block is told, and not the one behind it.
        with pytest.warns(UserWarning, match="not released"), pytest.raises(KeyError):
            with client.take("booted"):
                raise KeyError
    assert fake.requests[1::2] == ["DELETE /v1/guests/g7 HTTP/1.1"] * 2
