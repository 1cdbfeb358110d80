"""QMP, as odd servers speak it. `test_daemon.py` asks a real QEMU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import snapback
from fake import Fake


def lines(*messages: Any) -> bytes:
    return b"".join(json.dumps(message).encode() + b"\r\n" for message in messages)


GREETING = lines({"QMP": {"version": {}, "capabilities": []}})
READY = lines({"return": {}, "id": 1})
EVENT = {"event": "STOP", "timestamp": {}}


def raised_by(
    script: list[bytes | None], tmp_path: Path, command: str = "stop"
) -> snapback.QmpError:
    with Fake(tmp_path / "s", script, lines=True) as fake:
        with pytest.raises(snapback.QmpError) as raised:
            with snapback.Monitor(fake.path, timeout=60) as monitor:
                monitor.execute(command)
    return raised.value


def test_events_and_late_answers_are_passed_over(tmp_path: Path) -> None:
    late = {"return": "late", "id": 1}
    answered = lines(EVENT, late, {"event": "RESUME"}, {"return": {"status": "running"}, "id": 2})
    with Fake(tmp_path / "s", [GREETING, READY, answered], lines=True) as fake:
        with snapback.Monitor(fake.path) as monitor:
            assert monitor.execute("query-status") == {"status": "running"}
            assert [event["event"] for event in monitor.events] == ["STOP", "RESUME"]
            assert monitor.wait_event("RESUME", "SHUTDOWN")["event"] == "RESUME"
            assert monitor.events == [EVENT]
    assert json.loads(fake.requests[1]) == {"execute": "query-status", "id": 2}


def test_an_event_is_awaited(tmp_path: Path) -> None:
    script = [GREETING, READY + lines({"event": "RESUME"}, EVENT)]
    with Fake(tmp_path / "s", script, lines=True) as fake:
        with snapback.Monitor(fake.path) as monitor:
            assert monitor.wait_event("STOP") == EVENT


def test_qemu_refuses(tmp_path: Path) -> None:
    told = {"error": {"class": "CommandNotFound", "desc": "no such command"}, "id": 2}
    error = raised_by([GREETING, READY, lines(told)], tmp_path, "fly")
    assert (error.code, error.error_class) == ("qemu_refused", "CommandNotFound")
    assert error.message == "fly: no such command"


def test_no_greeting(tmp_path: Path) -> None:
    with Fake(tmp_path / "s", [b"", b""], lines=True) as fake:
        with pytest.raises(snapback.QmpError, match="one client at a time") as raised:
            snapback.Monitor(fake.path, timeout=0.01)
    assert raised.value.code == "qemu_timeout"


def test_another_greeting(tmp_path: Path) -> None:
    assert raised_by([lines({"hello": 1})], tmp_path).code == "qemu_protocol"


@pytest.mark.parametrize("said", [b"what?\n", b"[]\n", lines({"id": 2})])
def test_what_is_no_qmp(said: bytes, tmp_path: Path) -> None:
    assert raised_by([GREETING, READY, said], tmp_path).code == "qemu_protocol"


def test_qemu_ends(tmp_path: Path) -> None:
    assert raised_by([GREETING, READY, b'{"ret'], tmp_path).code == "qemu_ended"


def test_no_qemu(tmp_path: Path) -> None:
    with pytest.raises(snapback.QmpError) as raised:
        snapback.Monitor(tmp_path / "none")
    assert raised.value.code == "qemu_unreachable"


def test_no_answer(tmp_path: Path) -> None:
    with Fake(tmp_path / "s", [GREETING, READY, b"", b""], lines=True) as fake:
        with snapback.Monitor(fake.path) as monitor:
            with pytest.raises(snapback.QmpError, match="stop") as raised:
                monitor.execute("stop", timeout=0.01)
    assert raised.value.code == "qemu_timeout"
