"""What can go wrong, each with a stable code.

The daemon's codes are those of docs/events.md. The client adds `daemon_unreachable`,
`daemon_timeout`, `connection_lost` and `answer_invalid`.
"""

from __future__ import annotations


class SnapbackError(Exception):
    """Something was refused or failed. Act on `code`; `message` is for people."""

    def __init__(
        self, code: str, message: str, status: int | None = None, retryable: bool = False
    ) -> None:
        # All arguments go to the base: an exception is pickled by what it was made of.
        super().__init__(code, message, status, retryable)
        self.code = code
        self.message = message
        #: The HTTP status, where the daemon has answered.
        self.status = status
        #: Whether the daemon says that the same may succeed later with nothing changed by hand.
        self.retryable = retryable

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"


class DaemonUnreachable(SnapbackError):
    """Nothing answers at the daemon's socket; nothing was asked of it."""

    def __init__(self, message: str) -> None:
        super().__init__("daemon_unreachable", message)

    def __reduce__(self) -> tuple[type[DaemonUnreachable], tuple[str]]:
        return type(self), (self.message,)


class DaemonTimeout(SnapbackError):
    """The daemon did not answer in time; it may still carry out what it was asked for."""

    def __init__(self, message: str) -> None:
        super().__init__("daemon_timeout", message)

    def __reduce__(self) -> tuple[type[DaemonTimeout], tuple[str]]:
        return type(self), (self.message,)


class ConnectionLost(SnapbackError):
    """The connection broke before the whole answer came: the request may have been carried out."""

    def __init__(self, message: str) -> None:
        super().__init__("connection_lost", message)

    def __reduce__(self) -> tuple[type[ConnectionLost], tuple[str]]:
        return type(self), (self.message,)


class QmpError(SnapbackError):
    """A guest's QEMU can't be asked, or refuses.

    Codes: `qemu_unreachable`, `permission_denied`, `qemu_timeout`, `qemu_ended`, `qemu_protocol`
    and, where QEMU refuses, `qemu_refused`; QEMU's own class of the error is in `error_class` then.
    """

    def __init__(self, code: str, message: str, error_class: str | None = None) -> None:
        super().__init__(code, message)
        self.error_class = error_class

    def __reduce__(self) -> tuple[type[QmpError], tuple[str, str, str | None]]:
        return type(self), (self.code, self.message, self.error_class)
