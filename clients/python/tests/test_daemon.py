"""A real daemon and real guests.

`SNAPBACK_SOCKET` names the daemon's socket, and `SNAPBACK_TEST_POOL` a pool of an image of the
project's test guest (tests/guest), of which `max` is 4 or more. Without them the tests here are
skipped. `SNAPBACK_TEST_URL` and `SNAPBACK_TEST_TOKEN` name the same daemon by TCP, if it is there.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import snapback
from daemon import PATIENCE, POOL, leaving_nothing, needs_daemon, until

pytest_plugins = ["pytester"]

EXAMPLES = Path(__file__).parents[3] / "examples" / "pytest"

#: What there is to ask for; the last three are not for programs like this.
REQUESTS = [
    "/v1/info",
    "/v1/pools",
    "/v1/pools/{pool}",
    "/v1/pools/{pool}/take",
    "/v1/guests",
    "/v1/guests/{id}",
    "/v1/guests/{id}/reset",
    "/v1/events",
    "/v1/openapi.json",
    "/metrics",
    "/",
]

pytestmark = needs_daemon


@pytest.fixture(autouse=True)
def client() -> Iterator[snapback.Client]:
    """Each test gives back what it took."""
    with leaving_nothing() as client:
        yield client


def ask(vm: snapback.Guest, question: str) -> str:
    """Asks the test guest on its second serial port (tests/guest/README.md)."""
    tag = f"#{os.getpid()}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX) as port:
        port.settimeout(PATIENCE)
        port.connect(str(vm.directory / "serial1.sock"))
        port.sendall(f"{tag} {question}\n".encode())
        with port.makefile("r", encoding="ascii", errors="replace") as lines:
            for line in lines:
                _, found, answer = line.strip().partition(tag + " ")
                if found:
                    return answer
    raise AssertionError(f"no answer to {question}")


def test_the_daemon_tells_of_itself(client: snapback.Client) -> None:
    info = client.info()
    assert info.version and info.uptime_s >= 0
    assert Path(f"/proc/{info.pid}").exists()


def test_all_of_the_interface_is_known(client: snapback.Client) -> None:
    told = client._transport.request("GET", "/v1/openapi.json", timeout=PATIENCE)
    schemas = told["components"]["schemas"]

    def unknown(schema: str, known: type) -> set[str]:
        names = {field.name for field in dataclasses.fields(known)}
        return set(schemas[schema]["properties"]) - names

    assert unknown("PoolView", snapback.Pool) == set()
    assert unknown("CacheView", snapback.Cache) == set()
    assert unknown("Problem", snapback.Problem) == set()
    assert unknown("Info", snapback.Info) == set()
    assert unknown("ResetView", snapback.Reset) == {"guest"}
    # The fields which this client has other names for.
    assert unknown("GuestView", snapback.Guest) == {"qemu_pid", "qmp", "dir"}
    options = set(snapback.Client.create_pool.__annotations__)
    assert set(schemas["PoolConfig"]["properties"]) - options == set()
    for path in told["paths"]:
        assert path in REQUESTS, path


def test_by_tcp() -> None:
    url, token = os.environ.get("SNAPBACK_TEST_URL"), os.environ.get("SNAPBACK_TEST_TOKEN")
    if not url:
        pytest.skip("SNAPBACK_TEST_URL names no daemon")
    with snapback.Client(url=url, token=token) as client:
        with client.take(POOL) as vm:
            assert vm.reset().ms > 0
        with client.events(timeout=PATIENCE) as events:
            with client.take(POOL) as vm:
                assert any(event.get("id") == vm.id for event in events)
        image = snapback.pool(POOL).image
        assert code_of(lambda: client.create_pool("new", image)) == ("forbidden", 403)
    with snapback.Client(url=url, token="wrong") as stranger:
        assert code_of(stranger.pools) == ("unauthorized", 401)
        assert code_of(stranger.events) == ("unauthorized", 401)


def test_the_pool_is_there(client: snapback.Client) -> None:
    pool = client.pool(POOL)
    assert pool.name in [one.name for one in client.pools()]
    assert pool.image.endswith(".snap") and pool.problem is None
    assert pool.state in ("ready", "filling") and 0 <= pool.ready <= pool.max


def test_take_and_release() -> None:
    with snapback.take(POOL) as vm:
        assert vm.pool == POOL and vm.ms is not None
        assert Path(f"/proc/{vm.pid}/cmdline").read_bytes().split(b"\0")[0]
        assert vm.directory.is_dir() and vm.qmp_path.is_socket()
        assert ask(vm, "ping") == "pong"
        assert snapback.guest(vm.id).pid == vm.pid
        assert vm.id in [guest.id for guest in snapback.guests()]
        process = Path(f"/proc/{vm.pid}")
    until("QEMU to end", lambda: not process.exists())
    until("the guest to go", lambda: vm.id not in [guest.id for guest in snapback.guests()])
    assert not vm.directory.exists()
    with pytest.raises(snapback.SnapbackError) as raised:
        snapback.guest(vm.id)
    assert (raised.value.code, raised.value.status) == ("no_such_guest", 404)
    # A guest that has gone is no error for whoever wanted it gone.
    vm.release()


def test_a_name_of_ones_own(client: snapback.Client) -> None:
    with client.take(POOL, name="w7") as vm:
        assert vm.name == "w7"
        assert client.guest(vm.id).name == "w7"


def test_an_exception_releases() -> None:
    with pytest.raises(KeyError):
        with snapback.take(POOL) as vm:
            raise KeyError
    with pytest.raises(snapback.SnapbackError, match="no_such_guest"):
        vm.reset()


def test_a_guest_that_was_released_already() -> None:
    with snapback.take(POOL) as vm:
        snapback.release(vm.id)


def test_a_guest_that_ends_by_itself(client: snapback.Client) -> None:
    with client.take(POOL) as vm:
        process = Path(f"/proc/{vm.pid}")
        try:
            vm.qmp("quit")
        except snapback.QmpError as error:
            # QEMU may be gone ahead of its answer.
            assert error.code == "qemu_ended"
        until("QEMU to end", lambda: not process.exists())
        with pytest.raises(snapback.QmpError) as raised:
            vm.qmp("query-status")
        assert raised.value.code == "qemu_unreachable"


def test_qmp() -> None:
    with snapback.take(POOL) as vm:
        assert vm.qmp("query-status")["status"] == "running"
        # One connection for several commands, with the events that come in between.
        with vm.monitor() as monitor:
            monitor.execute("stop")
            assert monitor.wait_event("STOP")["event"] == "STOP"
            monitor.execute("cont")
            assert monitor.wait_event("RESUME")["event"] == "RESUME"
        told = vm.qmp("human-monitor-command", {"command-line": "info version"})
        assert told.strip()
        assert vm.qmp("qom-get", path="/machine", property="type").endswith("-machine")
        with pytest.raises(snapback.QmpError) as raised:
            vm.qmp("no-such-command")
        assert raised.value.code == "qemu_refused"
        assert raised.value.error_class == "CommandNotFound"
        with pytest.raises(snapback.QmpError, match="device_del"):
            vm.qmp("device_del", id="none")


def test_a_reset_takes_the_guest_back(client: snapback.Client) -> None:
    with client.take(POOL) as vm:
        nonce = ask(vm, "nonce")
        for _ in range(3):
            pid = vm.pid
            # The guest never forgets a page that it has met damaged, unless it goes back.
            assert ask(vm, "damage 3 0") == "ok"
            assert ask(vm, "check").startswith("check bad ")
            vm.qmp("stop")
            reset = vm.reset()
            assert reset.how in ("in_place", "new_process") and reset.ms > 0
            assert (vm.pid == pid) == (reset.how == "in_place")
            assert vm.qmp("query-status")["status"] == "running"
            assert ask(vm, "nonce") == nonce
            assert ask(vm, "check").startswith("check ok ")
        assert client.guest(vm.id).resets == 3
        vm.refresh()
        assert vm.resets == 3 and vm.age_s > 0


def test_a_reset_in_place_keeps_the_process(client: snapback.Client) -> None:
    with client.take(POOL) as vm:
        until("writes to be tracked", lambda: client.guest(vm.id).resettable)
        pid = vm.pid
        with vm.monitor() as monitor:
            version = monitor.execute("query-version")
        ask(vm, "damage 3 0")
        reset = vm.reset()
        assert (reset.how, reset.why, vm.pid) == ("in_place", None, pid)
        assert reset.pages is not None and reset.pages > 0
        assert ask(vm, "check").startswith("check ok ")
        assert vm.qmp("query-version") == version


def test_two_guests_side_by_side() -> None:
    with snapback.take(POOL) as one, snapback.take(POOL) as two:
        assert one.id != two.id and one.pid != two.pid and one.directory != two.directory
        assert set(one.ports.values()).isdisjoint(two.ports.values())
        # They have gone on from one moment, and nothing of one shows in the other.
        assert ask(one, "nonce") == ask(two, "nonce")
        ask(one, "damage 3 0")
        assert ask(one, "check").startswith("check bad ")
        assert ask(two, "check").startswith("check ok ")
        one.qmp("stop")
        assert two.qmp("query-status")["status"] == "running"


def code_of(call: Callable[[], Any]) -> tuple[str, int | None]:
    with pytest.raises(snapback.SnapbackError) as raised:
        call()
    assert raised.value.message
    return raised.value.code, raised.value.status


def test_errors_have_codes(client: snapback.Client) -> None:
    image = client.pool(POOL).image
    assert code_of(lambda: client.take("none")) == ("no_such_pool", 404)
    assert code_of(lambda: client.pool("none")) == ("no_such_pool", 404)
    assert code_of(lambda: client.set_pool("none", armed=1)) == ("no_such_pool", 404)
    assert code_of(lambda: client.remove_pool("none")) == ("no_such_pool", 404)
    assert code_of(lambda: client.guest("none")) == ("no_such_guest", 404)
    assert code_of(lambda: client.reset("none")) == ("no_such_guest", 404)
    assert code_of(lambda: client.release("none")) == ("no_such_guest", 404)
    assert code_of(lambda: client.create_pool(POOL, image)) == ("pool_exists", 409)
    assert code_of(lambda: client.create_pool("a/b", image))[0] == "request_invalid"
    assert code_of(lambda: client.create_pool("new", image, preload="some"))[0] == "request_invalid"
    assert "new" not in [pool.name for pool in client.pools()]


def test_a_pool_that_can_t_start_guests(client: snapback.Client, tmp_path: Path) -> None:
    with client.events(timeout=PATIENCE) as events:
        client.create_pool("broken", tmp_path / "none.snap")
        try:
            event = next(event for event in events if event.name == "degraded")
            assert (event["pool"], event["code"]) == ("broken", "not_found")
            pool = client.pool("broken")
            assert pool.state == "degraded" and pool.problem is not None
            assert pool.problem.code == "not_found" and "none.snap" in pool.problem.message
            assert code_of(lambda: client.take("broken", timeout=0)) == ("pool_degraded", 503)
        finally:
            client.remove_pool("broken")


def test_a_pool_comes_and_goes(client: snapback.Client) -> None:
    image = client.pool(POOL).image
    pool = client.create_pool("of-its-own", image, armed=1, max=1)
    try:
        assert (pool.name, pool.image, pool.armed, pool.max) == ("of-its-own", image, 1, 1)
        vm = client.take("of-its-own", timeout=PATIENCE)
        # All that may be in use are: the second waits, and gets none.
        assert code_of(lambda: client.take("of-its-own", timeout=0.2)) == ("pool_exhausted", 503)
        assert client.pool("of-its-own").running == 1
        # A guest that is given back goes to who waits for it, as a new one.
        waiting: list[snapback.Guest] = []
        taker = threading.Thread(
            target=lambda: waiting.append(client.take("of-its-own", timeout=PATIENCE))
        )
        taker.start()
        until("the request to wait", lambda: client.pool("of-its-own").waiting == 1)
        vm.release()
        taker.join(PATIENCE)
        assert waiting and waiting[0].id != vm.id
        # Room for more.
        assert client.set_pool("of-its-own", armed=0, max=3).max == 3
        second = client.take("of-its-own", timeout=PATIENCE)
        processes = [Path(f"/proc/{guest.pid}") for guest in (waiting[0], second)]
    finally:
        client.remove_pool("of-its-own")
    until("the pool's guests to end", lambda: not any(one.exists() for one in processes))
    assert code_of(lambda: client.pool("of-its-own")) == ("no_such_pool", 404)


def test_a_request_that_is_given_up_takes_no_guest(client: snapback.Client) -> None:
    image = client.pool(POOL).image
    client.create_pool("given-up", image, armed=0, max=1)
    try:
        vm = client.take("given-up", timeout=PATIENCE)
        program = "import snapback; snapback.take('given-up', timeout=600)"
        waiter = subprocess.Popen([sys.executable, "-c", program])
        until("the request to wait", lambda: client.pool("given-up").waiting == 1)
        waiter.kill()
        waiter.wait()
        until("the request to be gone", lambda: client.pool("given-up").waiting == 0)
        vm.release()
        with client.take("given-up", timeout=PATIENCE) as next_one:
            assert next_one.id != vm.id
    finally:
        client.remove_pool("given-up")


def test_events(client: snapback.Client) -> None:
    with client.events(timeout=PATIENCE) as events:
        with client.take(POOL) as vm:
            pid = vm.pid
            vm.reset()
        seen: dict[str, snapback.Event] = {}
        for event in events:
            if event.get("id") == vm.id:
                seen[event.name] = event
            if event.name == "released" and event["id"] == vm.id:
                break
    assert list(seen) == ["taken", "reset", "released"]
    assert seen["taken"]["qemu_pid"] == pid and seen["taken"]["pool"] == POOL
    assert seen["reset"]["how"] in ("in_place", "new_process") and seen["reset"]["ms"] > 0
    assert seen["released"]["pool"] == POOL and seen["released"]["why"]
    assert all(event.unix_ms > 1_600_000_000_000 for event in seen.values())


def run_suite(pytester: pytest.Pytester, source: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(source)
    return pytester.runpytest_subprocess("-v", f"-osnapback_pool={POOL}", *options)


def test_the_fixture_gives_each_test_a_guest(pytester: pytest.Pytester) -> None:
    source = """
        seen = []
        def test_one(snapback_vm):
            seen.append(snapback_vm.id)
            assert snapback_vm.qmp("query-status")["running"]
        def test_two(snapback_vm, snapback_client):
            assert snapback_vm.id not in seen
            assert seen[0] not in [guest.id for guest in snapback_client.guests()]
        def test_three(snapback_vm):
            assert 0
    """
    result = run_suite(pytester, source)
    result.assert_outcomes(passed=2, failed=1)
    # Of a test that fails it is told which guest it had.
    result.stdout.fnmatch_lines(["*snapback guest*", "*QEMU's process*", "directory *"])


@pytest.mark.parametrize(
    "reset, resets",
    # Before the tests a, b (which fails), c, d.
    [
        ("before", [0, 1, 2, 3]),
        ("after", [0, 1, 2, 3]),
        ("never", [0, 0, 0, 0]),
        ("on_failure", [0, 0, 1, 1]),
    ],
)
def test_the_fixture_resets(reset: str, resets: list[int], pytester: pytest.Pytester) -> None:
    source = f"""
        import pytest
        pytestmark = pytest.mark.snapback(scope="module")
        guests = set()
        @pytest.mark.snapback(reset={reset!r})
        @pytest.mark.parametrize("resets", {resets}, ids="abcd")
        def test_it(resets, snapback_vm, request):
            guests.add(snapback_vm.id)
            assert len(guests) == 1
            snapback_vm.refresh()
            assert snapback_vm.resets == resets
            assert request.node.callspec.id != "b", "planned"
    """
    result = run_suite(pytester, source)
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*test_it?b? FAILED*", "*planned*"])


def test_scopes_of_the_fixture(pytester: pytest.Pytester) -> None:
    source = """
        import pytest
        seen = {}
        def note(key, vm):
            seen.setdefault(key, set()).add(vm.id)

        @pytest.mark.snapback(scope="class", reset="never")
        class TestOne:
            def test_a(self, snapback_vm): note("one", snapback_vm)
            def test_b(self, snapback_vm): note("one", snapback_vm)

        @pytest.mark.snapback(scope="class", reset="never")
        class TestTwo:
            def test_a(self, snapback_vm): note("two", snapback_vm)

        @pytest.mark.snapback(scope="session")
        def test_session(snapback_vm): note("session", snapback_vm)

        @pytest.mark.snapback(scope="session")
        class TestSession:
            def test_again(self, snapback_vm): note("session", snapback_vm)

        def test_all(snapback_client):
            assert all(len(ids) == 1 for ids in seen.values())
            assert len(set.union(*seen.values())) == 3
            # Those of the classes have been released with them.
            running = {guest.id for guest in snapback_client.guests()}
            assert seen["session"] <= running
            assert running.isdisjoint(seen["one"] | seen["two"])
    """
    run_suite(pytester, source).assert_outcomes(passed=6)


def test_a_guest_that_a_test_has_ended_is_replaced(pytester: pytest.Pytester) -> None:
    source = """
        import pytest
        pytestmark = pytest.mark.snapback(scope="module")
        def test_ends_it(snapback_vm, snapback_client):
            snapback_client.release(snapback_vm.id)
        def test_goes_on(snapback_vm):
            assert snapback_vm.qmp("query-status")["running"]
    """
    result = run_suite(pytester, source)
    result.assert_outcomes(passed=2, warnings=1)
    result.stdout.fnmatch_lines(["*another is taken*no_such_guest*"])


def test_an_exhausted_pool_is_told_in_a_line(
    client: snapback.Client, pytester: pytest.Pytester
) -> None:
    client.create_pool("small", client.pool(POOL).image, armed=0, max=1)
    try:
        with client.take("small", timeout=PATIENCE):
            source = """
                import pytest
                @pytest.mark.snapback("small")
                def test_it(snapback_vm): pass
            """
            result = run_suite(pytester, source, "-osnapback_timeout=0.2")
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines(["there is no guest of the pool `small`: *pool_exhausted*"])
    finally:
        client.remove_pool("small")


@pytest.mark.parametrize(
    "options", [[], ["-n", "2", "--dist", "loadscope"]], ids=["alone", "xdist"]
)
def test_the_example_suite(options: list[str], pytester: pytest.Pytester) -> None:
    if options:
        pytest.importorskip("xdist")
    pool = f"-osnapback_pool={POOL}"
    result = pytester.runpytest_subprocess(pool, "-p", "no:cacheprovider", *options, str(EXAMPLES))
    result.assert_outcomes(passed=9)
