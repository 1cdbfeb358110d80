"""QMP, the control protocol of QEMU, on a guest's Unix socket."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from ._errors import QmpError


class Monitor:
    """A connection to a guest's QEMU, past its greeting.

    QEMU serves one client of a monitor at a time: others wait until this one is closed.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float = 60.0) -> None:
        """Connects. `timeout`, in seconds, is what QEMU is given for the greeting and, unless told
        otherwise, for each command."""
        self.path = os.fspath(path)
        self.timeout = timeout
        #: Events that came while answers were awaited, oldest first.
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._number = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def _greet(self) -> None:
        self._socket.settimeout(self.timeout)
        try:
            self._socket.connect(self.path)
        except PermissionError as error:
            raise QmpError(
                "permission_denied",
                f"this user may not use QEMU's control socket {self.path}: whoever may can do all "
                "that the daemon's user can; a guest's ports are for others",
            ) from error
        except OSError as error:
            raise QmpError(
                "qemu_unreachable",
                f"nothing answers at QEMU's control socket {self.path}: {error}; "
                "the guest may have ended",
            ) from error
        try:
            greeting = self._receive(time.monotonic() + self.timeout)
        except QmpError as error:
            if error.code != "qemu_timeout":
                raise
            raise QmpError(
                "qemu_timeout",
                f"{self.path} does not greet within {self.timeout:g} s: QEMU serves one client at "
                "a time, and another may be connected",
            ) from None
        if "QMP" not in greeting:
            raise QmpError("qemu_protocol", f"{self.path} does not greet as QMP does: {greeting}")
        self.execute("qmp_capabilities")

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Executes a command and returns what it returns.

        Raises QmpError: `qemu_refused` where QEMU refuses, with its words.
        """
        self._number += 1
        number = self._number
        request: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            request["arguments"] = dict(arguments)
        allowed = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + allowed
        self._send(json.dumps(request).encode() + b"\n", deadline)
        while True:
            try:
                message = self._receive(deadline)
            except QmpError as error:
                if error.code != "qemu_timeout":
                    raise
                raise QmpError(
                    "qemu_timeout", f"QEMU has not answered {command} in {allowed:g} s"
                ) from None
            if "event" in message:
                self.events.append(message)
            elif message.get("id") != number:
                # A late answer to a command that was given up.
                continue
            elif "return" in message:
                return message["return"]
            else:
                raise refusal(command, message.get("error"))

    def wait_event(self, *names: str, timeout: float | None = None) -> dict[str, Any]:
        """The first event of one of these names, taken out of `events` or awaited."""
        allowed = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + allowed
        seen = 0
        while True:
            for at in range(seen, len(self.events)):
                if self.events[at]["event"] in names:
                    return self.events.pop(at)
            seen = len(self.events)
            try:
                message = self._receive(deadline)
            except QmpError as error:
                if error.code != "qemu_timeout":
                    raise
                wanted = " or ".join(names)
                raise QmpError(
                    "qemu_timeout", f"no event {wanted} has come in {allowed:g} s"
                ) from None
            if "event" in message:
                self.events.append(message)

    def close(self) -> None:
        """Lets another client have the monitor. The guest runs on."""
        self._socket.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, request: bytes, deadline: float) -> None:
        try:
            self._socket.settimeout(left(deadline))
            self._socket.sendall(request)
        except socket.timeout:
            # A part of the request may have been sent, so nothing can follow.
            self.close()
            raise QmpError("qemu_timeout", f"QEMU does not read from {self.path}") from None
        except OSError as error:
            raise self._ended(error) from error

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            try:
                self._socket.settimeout(left(deadline))
                piece = self._socket.recv(1 << 16)
            except socket.timeout:
                raise QmpError("qemu_timeout", f"QEMU is silent at {self.path}") from None
            except OSError as error:
                raise self._ended(error) from error
            if not piece:
                raise self._ended(None)
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise QmpError("qemu_protocol", f"QEMU says what is no QMP message: {line[:200]!r}")
        return message

    def _ended(self, error: OSError | None) -> QmpError:
        why = f": {error}" if error else ""
        return QmpError("qemu_ended", f"QEMU closed its control socket {self.path}{why}")


def left(deadline: float) -> float:
    """Seconds up to a deadline; never zero, which would mean `at once or not at all`."""
    return max(deadline - time.monotonic(), 0.001)


def refusal(command: str, error: Any) -> QmpError:
    """The error of a command that QEMU refuses."""
    if not isinstance(error, dict):
        return QmpError("qemu_protocol", f"{command}: QEMU answers neither `return` nor `error`")
    told = str(error.get("desc", error))
    return QmpError("qemu_refused", f"{command}: {told}", str(error.get("class", "")) or None)
