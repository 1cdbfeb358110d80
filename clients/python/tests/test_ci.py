"""The scripts of examples/ci, called as GitLab's and GitHub's runners call them.

They take guests from the daemon of `test_daemon.py`, and are skipped where that is. The test guest
has no SSH server: a stand-in for ssh notes how it was called, and runs the command here.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import snapback
from daemon import POOL, leaving_nothing, needs_daemon, until

CI = Path(__file__).parents[3] / "examples" / "ci"

pytestmark = needs_daemon

BUILD_FAILURE, SYSTEM_FAILURE = 11, 12
SSH = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$(dirname "$0")/arguments"
exec "${@: -2}"
"""


class Runner:
    """A runner with a job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ssh = folder / "ssh"
        ssh.write_text(SSH)
        ssh.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "BUILD_FAILURE_EXIT_CODE": str(BUILD_FAILURE),
            "SYSTEM_FAILURE_EXIT_CODE": str(SYSTEM_FAILURE),
            "CUSTOM_ENV_CI_JOB_ID": str(os.getpid()),
            "RUNNER_NAME": f"runner {os.getpid()}",
            "GITHUB_ENV": str(folder / "env"),
            "SNAPBACK_WAIT": "120",
        }

    def run(self, script: str, *args: str, code: int = 0, **more: str) -> str:
        """What a script has said."""
        ended = subprocess.run(
            [CI / script, *args],
            env={**self.environment, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert ended.returncode == code, ended.stdout
        return ended.stdout


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


@pytest.fixture(autouse=True)
def client() -> Iterator[snapback.Client]:
    """Nothing is left of a job."""
    with leaving_nothing() as client:
        yield client


def guests(client: snapback.Client, name: str) -> list[snapback.Guest]:
    return [guest for guest in client.guests() if guest.name == name]


def test_a_gitlab_job(runner: Runner, client: snapback.Client, tmp_path: Path) -> None:
    told: Any = json.loads(runner.run("gitlab-config.sh", CUSTOM_ENV_SNAPBACK_POOL=POOL))
    assert told["driver"]["name"] == "snapback"
    runner.environment.update(told["job_env"])
    assert f"pool {POOL} runs" in runner.run("gitlab-prepare.sh")
    name = f"gitlab-{os.getpid()}"
    [first] = guests(client, name)
    # A stage that is tried again gets a new guest, and leaves none behind.
    runner.run("gitlab-prepare.sh")
    [second] = guests(client, name)
    assert second.id != first.id
    script = tmp_path / "script"
    script.write_text("echo from the guest; exit 3\n")
    run = ["gitlab-run.sh", str(script), "build_script"]
    if second.ports:
        recorded, now = next(iter(second.ports.items()))
        runner.environment["SNAPBACK_SSH_PORT"] = str(recorded)
        code_file = tmp_path / "code"
        said = runner.run(*run, code=BUILD_FAILURE, BUILD_EXIT_CODE_FILE=str(code_file))
        assert "from the guest" in said and code_file.read_text() == "3\n"
        arguments = (tmp_path / "arguments").read_text().split("\n")
        assert arguments[arguments.index("-p") + 1] == str(now)
        script.write_text("exit 255\n")
    # What ssh itself tells by 255; and so it is without the port.
    runner.run(*run, code=SYSTEM_FAILURE)
    runner.run("gitlab-cleanup.sh")
    until("the guest to go", lambda: not guests(client, name))
    assert "has ended" in runner.run(*run, code=SYSTEM_FAILURE)
    # What is gone already may be cleaned up.
    runner.run("gitlab-cleanup.sh")


def test_a_gitlab_job_without_a_guest(runner: Runner, tmp_path: Path) -> None:
    runner.run("gitlab-config.sh", code=BUILD_FAILURE)
    allowed = {"CUSTOM_ENV_SNAPBACK_POOL": POOL, "SNAPBACK_ALLOWED_POOLS": "a b"}
    assert "a b" in runner.run("gitlab-config.sh", code=BUILD_FAILURE, **allowed)
    said = runner.run("gitlab-prepare.sh", code=SYSTEM_FAILURE, SNAPBACK_POOL="none")
    assert "[no_such_pool]" in said
    elsewhere = {"SNAPBACK_POOL": "../guests/1/reset?"}
    assert "no name" in runner.run("gitlab-prepare.sh", code=SYSTEM_FAILURE, **elsewhere)
    nowhere = {"SNAPBACK_POOL": POOL, "SNAPBACK_SOCKET": str(tmp_path / "none")}
    said = runner.run("gitlab-prepare.sh", code=SYSTEM_FAILURE, **nowhere)
    assert "does not answer" in said


def test_a_github_job(runner: Runner, client: snapback.Client, tmp_path: Path) -> None:
    runner.environment["SNAPBACK_POOL"] = POOL
    runner.run("github-job-started.sh")
    name = f"github-runner-{os.getpid()}"
    [guest] = guests(client, name)
    lines = (tmp_path / "env").read_text().splitlines()
    told = dict(line.split("=", 1) for line in lines)
    assert told["SNAPBACK_GUEST"] == guest.id
    assert told["SNAPBACK_QMP"] == str(guest.qmp_path)
    assert told["SNAPBACK_DIR"] == str(guest.directory)
    assert told["SNAPBACK_SOCKET"] == os.environ["SNAPBACK_SOCKET"]
    assert {int(old): new for old, new in json.loads(told["SNAPBACK_PORTS"]).items()} == guest.ports
    # The end of a job that was never told.
    runner.run("github-job-started.sh")
    [second] = guests(client, name)
    assert second.id != guest.id
    runner.run("github-job-completed.sh")
    until("the guest to go", lambda: not guests(client, name))
