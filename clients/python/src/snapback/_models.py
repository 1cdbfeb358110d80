"""What the daemon tells, as dataclasses. Fields that are not known are ignored: a newer daemon may
tell more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ._errors import SnapbackError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why a pool can't arm guests."""

    code: str
    message: str


@dataclasses.dataclass(frozen=True)
class Cache:
    """Decompressed pieces of an image, which all guests of it share."""

    #: Bytes that are kept, and the most that are.
    bytes: int
    limit: int
    #: Pieces that were found in it, and those that had to be read from the image.
    hits: int
    misses: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the guests of a pool may take of memory, in bytes."""

    #: The most that they may be counted with together, and what they are counted with now.
    limit: int
    counted: int
    #: What a guest in use is counted with; None before the image has been opened.
    guest: int | None = None


@dataclasses.dataclass(frozen=True)
class Setup:
    """How what is done for a guest as soon as it runs has come on."""

    #: `pending`, `done` or `failed`.
    state: str
    #: What has failed.
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Pool:
    """Guests of one image, of which some are armed: ready to run at once."""

    name: str
    image: str
    #: `ready`, `filling` or `degraded`.
    state: str
    #: How many armed guests there are to be, and how many there are.
    armed: int
    ready: int
    #: How many guests may be in use at once, and how many are.
    max: int
    running: int
    #: Requests that wait for a guest.
    waiting: int = 0
    #: Guests that were taken so far.
    takes: int = 0
    preload: str = "working_set"
    resettable: bool = True
    share: bool = False
    problem: Problem | None = None
    #: None where memory is not limited.
    memory: Memory | None = None
    #: Memory that its QEMUs had of their own when the daemon was asked.
    used_bytes: int | None = None
    cache: Cache | None = None

    @classmethod
    def of(cls, answer: Any) -> Pool:
        told = mapping(answer, "a pool")
        problem, cache, memory = told.get("problem"), told.get("cache"), told.get("memory")
        return build(
            cls,
            told,
            problem=None if problem is None else build(Problem, problem),
            memory=None if memory is None else build(Memory, memory),
            cache=None if cache is None else build(Cache, cache),
        )


@dataclasses.dataclass(frozen=True)
class Reset:
    """How a guest was taken back to its image."""

    #: `in_place`, or `new_process` where its QEMU had to be replaced.
    how: str
    ms: float
    #: Pages of memory that were written back; None where QEMU was replaced.
    pages: int | None = None
    #: Why QEMU was replaced.
    why: str | None = None

    @classmethod
    def of(cls, answer: Any) -> Reset:
        return build(cls, mapping(answer, "a reset"))


@dataclasses.dataclass(frozen=True)
class Info:
    """The daemon itself."""

    version: str
    pid: int
    uptime_s: float

    @classmethod
    def of(cls, answer: Any) -> Info:
        return build(cls, mapping(answer, "the daemon's information"))


def mapping(answer: Any, what: str) -> Mapping[str, Any]:
    """The JSON object that was expected."""
    if isinstance(answer, Mapping):
        return answer
    raise invalid(f"{what} was expected, and not {shortened(answer)}")


def array(answer: Any, what: str) -> list[Any]:
    """The JSON array that was expected."""
    if isinstance(answer, list):
        return answer
    raise invalid(f"{what} were expected, and not {shortened(answer)}")


def build(cls: type[T], answer: Any, **instead: Any) -> T:
    """A dataclass of those fields that it knows."""
    told = mapping(answer, f"a {cls.__name__.lower()}")
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {name: value for name, value in told.items() if name in known}
    values.update(instead)
    try:
        return cls(**values)
    except TypeError as error:
        raise invalid(f"fields of a {cls.__name__.lower()} are missing: {error}") from None


def invalid(problem: str) -> SnapbackError:
    """The error for an answer that makes no sense."""
    return SnapbackError(
        "answer_invalid",
        f"the daemon's answer can't be understood: {problem}; "
        "is this a snapback daemon, and is this client too old for it?",
    )


def shortened(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"
