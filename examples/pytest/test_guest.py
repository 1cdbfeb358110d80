"""Tests that drive a guest, each from the same moment on.

    $ pytest -o snapback_pool=booted examples/pytest

`snapback daemon` has to run, with a pool `booted` of an image of the project's test guest
(tests/guest/README.md). All three ways to have a guest are shown: a new one for each test, one that
is reset between the tests of a class, and one that goes from test to test as it is.

Tried with pytest 7.2 and 9.2, alone and with pytest-xdist (`-n 2 --dist loadscope`, which keeps the
steps of the last class together), on QEMU 7.2 and 10.0.
"""

from __future__ import annotations

import pytest

import snapback
from conftest import Ask


def test_the_guest_runs(snapback_vm: snapback.Guest, ask: Ask) -> None:
    """A guest of its own, released at the end of the test: the default."""
    assert snapback_vm.qmp("query-status")["status"] == "running"
    assert ask("ping") == "pong"
    # Each page of its memory is what it was when the image was made, or was rewritten since.
    assert ask("check").startswith("check ok ")


def test_it_can_be_broken(snapback_vm: snapback.Guest, ask: Ask) -> None:
    """Nobody else gets a guest that was damaged here."""
    ask("damage 3 0")
    assert ask("check").startswith("check bad ")


@pytest.mark.snapback(scope="class", reset="before")
class TestWithResets:
    """One guest, taken back to its image ahead of each test but the first."""

    @pytest.mark.parametrize("page", range(4))
    def test_damage(self, page: int, ask: Ask) -> None:
        # No trace of what the test before has done.
        assert ask("check").startswith("check ok ")
        ask(f"damage {page} 0")
        assert ask("check").startswith("check bad ")

    def test_what_the_vm_holds(self, snapback_vm: snapback.Guest) -> None:
        """The machine goes back with its memory: it was stopped here, and runs again."""
        snapback_vm.qmp("stop")
        assert snapback_vm.qmp("query-status")["status"] == "paused"
        snapback_vm.reset()
        assert snapback_vm.qmp("query-status")["status"] == "running"


@pytest.mark.snapback(scope="class", reset="on_failure")
class TestStepByStep:
    """One guest for steps that follow each other. Only a step that fails has it taken back."""

    def test_first(self, ask: Ask) -> None:
        ask("idle")

    def test_second(self, ask: Ask) -> None:
        # The guest has stood still since.
        assert ask("sum") == ask("sum")
