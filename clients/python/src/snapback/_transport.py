"""HTTP to the daemon, over its Unix socket or TCP, by connections that are kept and reused."""

from __future__ import annotations

import http
import http.client
import json
import os
import select
import socket
import ssl
import tempfile
import threading
import urllib.parse
from typing import Any

from ._errors import ConnectionLost, DaemonTimeout, DaemonUnreachable, SnapbackError
from ._models import invalid, shortened


def default_socket() -> str:
    """Where the daemon of this user listens."""
    named = os.environ.get("SNAPBACK_SOCKET")
    if named:
        return named
    user = os.geteuid()
    if user == 0:
        return "/run/snapback/daemon.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return os.path.join(runtime, "snapback", "daemon.sock")
    return os.path.join(tempfile.gettempdir(), f"snapback-{user}", "daemon.sock")


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Endpoint:
    """Where the daemon is: a socket's path or a URL."""

    def __init__(
        self, path: str | None = None, url: str | None = None, token: str | None = None
    ) -> None:
        if path is not None and url is not None:
            raise ValueError("give socket= or url=, not both")
        self.headers = {"Accept": "application/json"}
        if token is not None:
            self.headers["Authorization"] = f"Bearer {token}"
        self.path = path
        self.prefix = ""
        self._scheme = ""
        self._host: str | None = None
        self._port: int | None = None
        if url is not None:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r} is no URL such as http://127.0.0.1:8080")
            self._scheme, self._host, self._port = parts.scheme, parts.hostname, parts.port
            self.prefix = parts.path.rstrip("/")
        self.name = url or path or ""

    def connect(self, timeout: float) -> http.client.HTTPConnection:
        """A new connection."""
        connection: http.client.HTTPConnection
        if self.path is not None:
            connection = UnixConnection(self.path, timeout)
        elif self._scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(
                self._host or "", self._port, timeout=timeout, context=context
            )
        else:
            connection = http.client.HTTPConnection(self._host or "", self._port, timeout=timeout)
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise DaemonUnreachable(self._why(error)) from error
        return connection

    def _why(self, error: OSError) -> str:
        """What is wrong, and what to do about it."""
        at = f"at {self.name}"
        if isinstance(error, PermissionError):
            return (
                f"this user may not use the daemon {at}: have its owner give access to the socket"
            )
        if isinstance(error, FileNotFoundError):
            return (
                f"there is no socket {at}: start the daemon (`snapback daemon`), "
                "or name its socket by SNAPBACK_SOCKET"
            )
        if isinstance(error, ConnectionRefusedError):
            return f"no daemon listens {at}: it has ended; start it again (`snapback daemon`)"
        if isinstance(error, socket.timeout):
            return f"the daemon {at} takes no connection: look whether it hangs"
        return f"the daemon {at} can't be reached: {error}"


class Transport:
    """Requests to one daemon, from any number of threads.

    A connection that is not in use is kept for the next request. Whether the daemon has closed it
    meanwhile, since it was restarted, is looked at before anything is sent by it. A request whose
    connection breaks later may have been carried out: it is repeated only if it may be made twice.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._owner = os.getpid()

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: float,
        repeatable: bool = False,
        gone: str | None = None,
    ) -> Any:
        """Sends a request and returns the JSON of its answer.

        `timeout` is the time in seconds in which the daemon has to say something. `gone` is the
        error by which a request that was repeated tells that the first was carried out.
        """
        repeated = False
        while True:
            connection = self._take_idle() or self.endpoint.connect(timeout)
            try:
                status, told = self._exchange(connection, method, path, body, timeout)
            except socket.timeout:
                connection.close()
                raise DaemonTimeout(
                    f"the daemon at {self.endpoint.name} has not answered "
                    f"{method} {path} in {timeout:g} s"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if repeatable and not repeated:
                    repeated = True
                    continue
                raise ConnectionLost(
                    f"the connection to the daemon at {self.endpoint.name} broke before "
                    f"{method} {path} was answered ({error or type(error).__name__}); "
                    "it may have been carried out"
                ) from error
            except BaseException:
                # An interrupt: what may still come by this connection is no answer to the next.
                connection.close()
                raise
            try:
                return checked(status, told)
            except SnapbackError as error:
                if repeated and error.code == gone:
                    return None
                raise

    def open(self, path: str, timeout: float) -> tuple[http.client.HTTPResponse, socket.socket]:
        """The beginning of an answer without an end, and its socket."""
        connection = self.endpoint.connect(timeout)
        sock = connection.sock
        headers = {**self.endpoint.headers, "Accept": "text/event-stream"}
        try:
            connection.request("GET", self.endpoint.prefix + path, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                checked(response.status, response.read())
                raise invalid(f"HTTP status {response.status}")
        except socket.timeout:
            connection.close()
            raise DaemonTimeout(f"the daemon at {self.endpoint.name} has not answered") from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ConnectionLost(
                f"the daemon at {self.endpoint.name} closed the connection: {error}"
            ) from error
        except BaseException:
            connection.close()
            raise
        return response, sock

    def close(self) -> None:
        """Closes what is not in use."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        timeout: float,
    ) -> tuple[int, bytes]:
        headers = dict(self.endpoint.headers)
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection.sock.settimeout(timeout)
        connection.request(method, self.endpoint.prefix + path, content, headers)
        response = connection.getresponse()
        told = response.read()
        if not told and response.status != http.HTTPStatus.NO_CONTENT:
            # To `http.client` an answer that was cut off between two headers is whole.
            raise http.client.HTTPException("its answer is empty")
        if response.will_close:
            connection.close()
        else:
            self._keep(connection)
        return response.status, told

    def _take_idle(self) -> http.client.HTTPConnection | None:
        with self._lock:
            if self._owner != os.getpid():
                # After a fork they are the parent's as well: two would read each other's answers.
                self._idle, self._owner = [], os.getpid()
            while self._idle:
                connection = self._idle.pop()
                if not said_something(connection.sock):
                    return connection
                connection.close()
        return None

    def _keep(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if self._owner == os.getpid():
                self._idle.append(connection)


def said_something(sock: socket.socket) -> bool:
    """Whether there is something to read, or the other side has closed."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def checked(status: int, told: bytes) -> Any:
    """The JSON of an answer; its error is raised."""
    try:
        value = json.loads(told) if told else None
    except ValueError:
        raise invalid(f"HTTP status {status} with {shortened(told)}") from None
    if status < 400:
        return value
    if isinstance(value, dict) and isinstance(value.get("code"), str):
        message, retryable = str(value.get("message", "")), bool(value.get("retryable"))
        raise SnapbackError(value["code"], message, status, retryable)
    raise invalid(f"HTTP status {status} with {shortened(value)}")
