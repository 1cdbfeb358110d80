"""What the tests here ask their guest.

The guest is the one of snapback's own tests (tests/guest): it answers questions on its second
serial port, one line each. A guest of yours has something else, SSH most likely: `vm.ports` tells
where.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterator

import pytest

import snapback

#: Asks the guest a question, and returns its answer.
Ask = Callable[[str], str]

#: Far more than any answer takes.
PATIENCE = 60


class Questions:
    """The second serial port of a guest, as the socket that its command line names."""

    def __init__(self, vm: snapback.Guest) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(str(vm.directory / "serial1.sock"))
        self._lines = self._socket.makefile("r", encoding="ascii", errors="replace")
        self._numbers = itertools.count()

    def ask(self, question: str) -> str:
        # A tag, which comes back, tells this answer from one to an earlier question: the port is
        # part of the guest, and a reset takes it back as well.
        tag = f"#{os.getpid()}-{id(self)}-{next(self._numbers)}"
        self._socket.sendall(f"{tag} {question}\n".encode())
        for line in self._lines:
            _, found, answer = line.strip().partition(tag + " ")
            if found:
                assert not answer.startswith("error "), f"{question}: {answer}"
                return answer
        raise EOFError(f"the guest hung up on `{question}`")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@pytest.fixture
def ask(snapback_vm: snapback.Guest) -> Iterator[Ask]:
    """Asks the test's guest."""
    questions = Questions(snapback_vm)
    yield questions.ask
    questions.close()
