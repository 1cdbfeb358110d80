"""The daemon's interface, call by call."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Union

from ._events import EventStream
from ._guest import Guest
from ._models import Info, Pool, Reset, array, mapping
from ._transport import Endpoint, Transport, default_socket

Path = Union[str, "os.PathLike[str]"]


class Client:
    """A daemon, by its Unix socket or by a URL with a token. Threads may share it.

    Without arguments it is the daemon of `SNAPBACK_SOCKET`, or of this user. Nothing is connected
    before the first call.
    """

    def __init__(
        self,
        socket: Path | None = None,
        *,
        url: str | None = None,
        token: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        """`timeout`, in seconds, is what the daemon is given to answer; `take` has one of its own
        on top."""
        path = None if socket is None else os.fspath(socket)
        if path is None and url is None:
            path = default_socket()
        self.timeout = timeout
        self._transport = Transport(Endpoint(path, url, token))

    def info(self) -> Info:
        """The daemon itself."""
        return Info.of(self._get("/v1/info"))

    def pools(self) -> list[Pool]:
        """All pools."""
        return [Pool.of(pool) for pool in array(self._get("/v1/pools"), "pools")]

    def pool(self, name: str) -> Pool:
        """One pool. Raises `no_such_pool`."""
        return Pool.of(self._get(pool_path(name)))

    def create_pool(
        self,
        name: str,
        image: Path,
        *,
        armed: int | None = None,
        max: int | None = None,
        memory_mib: int | None = None,
        guest_memory_mib: int | None = None,
        preload: str | None = None,
        resettable: bool | None = None,
        share: bool | None = None,
        dir: str | None = None,
        guest_name: str | None = None,
        ports: Mapping[int, int] | None = None,
        paths: Mapping[str, str] | None = None,
        netdevs: Mapping[str, str] | None = None,
        qemu: Path | None = None,
        arguments: Sequence[str] | None = None,
        new_generation: bool | None = None,
        new_macs: bool | None = None,
        agent_set_time: bool | None = None,
        agent_exec: Sequence[str] | None = None,
        agent: str | None = None,
        hook_running: str | None = None,
        lifetime_s: int | None = None,
        fill_delay_ms: int | None = None,
        fill_rate: int | None = None,
        **more: Any,
    ) -> Pool:
        """Makes a pool of an image's guests. What is left out is the daemon's default.

        `armed` guests are held ready, at most `max` are in use at once; a guest is ended
        `lifetime_s` seconds after it was taken. `ports` maps recorded ports to new ones, where 0 is
        any that is free; `paths` and `netdevs` are what `--path` and `--netdev` are to
        `snapback revert`. What a newer daemon takes beside that is passed on. Raises `pool_exists`,
        among others.
        """
        wanted: dict[str, Any] = {
            "name": name,
            # The daemon has a working directory of its own.
            "image": os.path.abspath(image),
            "armed": armed,
            "max": max,
            "memory_mib": memory_mib,
            "guest_memory_mib": guest_memory_mib,
            "preload": preload,
            "resettable": resettable,
            "share": share,
            "dir": dir,
            "guest_name": guest_name,
            "ports": None if ports is None else {str(old): new for old, new in ports.items()},
            "paths": None if paths is None else dict(paths),
            "netdevs": None if netdevs is None else dict(netdevs),
            "qemu": None if qemu is None else os.path.abspath(qemu),
            "arguments": None if arguments is None else list(arguments),
            "new_generation": new_generation,
            "new_macs": new_macs,
            "agent_set_time": agent_set_time,
            "agent_exec": None if agent_exec is None else list(agent_exec),
            "agent": agent,
            "hook_running": hook_running,
            "lifetime_s": lifetime_s,
            "fill_delay_ms": fill_delay_ms,
            "fill_rate": fill_rate,
            **more,
        }
        return Pool.of(self._ask("POST", "/v1/pools", given(wanted)))

    def set_pool(
        self,
        name: str,
        *,
        armed: int | None = None,
        max: int | None = None,
        memory_mib: int | None = None,
    ) -> Pool:
        """Changes how many guests a pool holds ready, how many may be in use, and how much memory
        they may take together; 0 is no limit.
        """
        wanted = given({"armed": armed, "max": max, "memory_mib": memory_mib})
        return Pool.of(self._ask("PATCH", pool_path(name), wanted, repeatable=True))

    def remove_pool(self, name: str) -> None:
        """Removes a pool; its guests end, the running ones too."""
        self._delete(pool_path(name), "no_such_pool")

    def take(self, pool: str, *, name: str | None = None, timeout: float = 30.0) -> Guest:
        """Takes a running guest from a pool; as a context manager it is released at the end.

        While all `max` guests are in use, waits up to `timeout` seconds for one that is released:
        `pool_exhausted` then.
        """
        wanted = given({"name": name, "timeout_s": timeout})
        path = pool_path(pool) + "/take"
        answer = self._ask("POST", path, wanted, timeout=timeout + self.timeout)
        return Guest.of(answer, self)

    def guests(self) -> list[Guest]:
        """The guests that were taken and run, by whomever."""
        return [Guest.of(guest, self) for guest in array(self._get("/v1/guests"), "guests")]

    def guest(self, id: str) -> Guest:
        """One guest that was taken. Raises `no_such_guest`."""
        return Guest.of(self._get(guest_path(id)), self)

    def reset(self, id: str) -> Reset:
        """Takes a guest back to its image. Raises `no_such_guest`."""
        return self.reset_guest(id)[0]

    def reset_guest(self, id: str) -> tuple[Reset, Guest | None]:
        """`reset`, with the guest as it is now: its process may be another."""
        answer = mapping(self._ask("POST", guest_path(id) + "/reset"), "a reset")
        guest = answer.get("guest")
        return Reset.of(answer), None if guest is None else Guest.of(guest, self)

    def release(self, id: str) -> None:
        """Ends a guest and removes its directory. Raises `no_such_guest`."""
        self._delete(guest_path(id), "no_such_guest")

    def events(self, timeout: float | None = None) -> EventStream:
        """Each pool as it is now, and what happens from now on, to iterate over.

        `timeout`, in seconds, is how long an event is awaited; without it, for ever.
        """
        return EventStream(self._transport, self.timeout, timeout)

    def close(self) -> None:
        """Closes the connections that are kept. The client can be used again."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<snapback.Client of {self._transport.endpoint.name}>"

    def _get(self, path: str) -> Any:
        return self._ask("GET", path, repeatable=True)

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        repeatable: bool = False,
    ) -> Any:
        patience = self.timeout if timeout is None else timeout
        return self._transport.request(method, path, body, timeout=patience, repeatable=repeatable)

    def _delete(self, path: str, gone: str) -> None:
        self._transport.request("DELETE", path, timeout=self.timeout, repeatable=True, gone=gone)


def pool_path(name: str) -> str:
    return "/v1/pools/" + urllib.parse.quote(name, safe="")


def guest_path(id: str) -> str:
    return "/v1/guests/" + urllib.parse.quote(id, safe="")


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}
