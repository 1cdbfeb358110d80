"""A guest that was taken from a pool."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ._errors import QmpError, SnapbackError
from ._models import Reset, Setup, build, invalid, mapping, shortened
from ._qmp import Monitor


class Daemon(Protocol):
    """What a guest asks of the daemon that has handed it out."""

    def guest(self, id: str) -> Guest: ...
    def reset_guest(self, id: str) -> tuple[Reset, Guest | None]: ...
    def release(self, id: str) -> None: ...


@dataclasses.dataclass(eq=False)
class Guest:
    """A running guest. As a context manager it is released at the end of the block."""

    id: str
    pool: str
    name: str
    #: QEMU's process.
    pid: int
    #: The directory of its own: the sockets and files of the recorded command line are there.
    directory: Path
    #: The port of this host for each recorded one, such as `{2222: 40731}`.
    ports: Mapping[int, int]
    #: When the daemon was asked last: seconds since it was taken, and its resets since.
    age_s: float = 0.0
    resets: int = 0
    #: Whether it could be reset in its process then: its memory was in place and is tracked.
    resettable: bool = False
    #: Milliseconds that the take took; None of a guest that an earlier daemon has handed out.
    ms: float | None = None
    #: The share of its memory that is in place, 0 to 1, while the guest runs; None where nobody
    #: knows.
    present: float | None = None
    #: How what is done for it as soon as it runs had come on then; None where nothing is.
    setup: Setup | None = None
    #: Seconds that QEMU is given for each command of `qmp`.
    qmp_timeout: float = dataclasses.field(default=60.0, repr=False)
    _qmp_path: Path | None = dataclasses.field(default=None, repr=False)
    _client: Daemon | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def of(cls, answer: Any, client: Daemon) -> Guest:
        told = mapping(answer, "a guest")
        try:
            ports = {int(old): int(new) for old, new in (told.get("ports") or {}).items()}
            places: dict[str, Any] = {"pid": told["qemu_pid"], "directory": Path(told["dir"])}
            qmp = None if told.get("qmp") is None else Path(told["qmp"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise invalid(f"{error!r} in the guest {shortened(dict(told))}") from None
        setup = told.get("setup")
        places["setup"] = None if setup is None else build(Setup, setup)
        return build(cls, told, ports=ports, _qmp_path=qmp, _client=client, **places)

    @property
    def qmp_path(self) -> Path:
        """QEMU's control socket. Raises `qemu_unreachable` where QEMU has none with a path."""
        if self._qmp_path is None:
            raise QmpError(
                "qemu_unreachable",
                f"guest {self.id} has no control socket with a path: nor had the one that was "
                "saved, and the pool's `arguments` name none",
            )
        return self._qmp_path

    def qmp(self, command: str, more: Mapping[str, Any] | None = None, /, **arguments: Any) -> Any:
        """Has QEMU execute a QMP command, and returns what it returns.

        Arguments with hyphens in their names go into a mapping:
        `vm.qmp("human-monitor-command", {"command-line": "info status"})`.
        Each call connects anew, so that nobody is kept from the monitor between two.
        """
        with self.monitor() as monitor:
            return monitor.execute(command, {**(more or {}), **arguments})

    def monitor(self, timeout: float | None = None) -> Monitor:
        """A connection to QEMU, for several commands and for events.

        A reset in place leaves it as it is; one by a new process ends it.
        """
        return Monitor(self.qmp_path, self.qmp_timeout if timeout is None else timeout)

    def reset(self) -> Reset:
        """Takes the guest back to its image: what it has written since is gone."""
        client = self._daemon()
        reset, guest = client.reset_guest(self.id)
        if guest is not None:
            self._update(guest)
        return reset

    def release(self) -> None:
        """Ends the guest and removes its directory. One that has gone already is no error."""
        try:
            self._daemon().release(self.id)
        except SnapbackError as error:
            if error.code != "no_such_guest":
                raise

    def refresh(self) -> None:
        """Asks the daemon anew."""
        self._update(self._daemon().guest(self.id))

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.release()
        except SnapbackError as failure:
            # What went wrong in the block is what its reader wants to know.
            if kind is None:
                raise
            warnings.warn(f"guest {self.id} was not released: {failure}", stacklevel=2)

    def _update(self, now: Guest) -> None:
        for field in dataclasses.fields(self):
            if field.name not in ("qmp_timeout", "_client"):
                setattr(self, field.name, getattr(now, field.name))

    def _daemon(self) -> Daemon:
        if self._client is None:
            raise ValueError("this guest was not taken by a client")
        return self._client
