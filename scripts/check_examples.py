"""Checks what can be checked of the examples without what they are for: `check_examples.py FOLDER`.

Scripts are checked by shellcheck, in python.sh.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import hcl2
import kubernetes_validate
import tomllib
import yaml

import snapback

SYSTEM = Path("/usr/lib/systemd/system")
DAEMON = {"state", "listen", "group", "http", "token_file", "arming", "pools"}


def manifests(path: Path) -> None:
    """Kubernetes' own schema holds for each document, and the daemon knows its configuration."""
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, "1.30", strict=True)
        for name, text in document.get("data", {}).items():
            config(f"{path}: {name}", text)


def nomad(path: Path) -> None:
    """It is HCL 2, and the daemon knows the configuration in it."""
    job: Any = hcl2.loads(path.read_text())
    assert job["job"], path
    _, _, rest = path.read_text().partition("<<-TOML\n")
    config(str(path), rest.partition("TOML\n")[0])


def config(where: str, text: str) -> None:
    """What `snapback daemon --config` takes."""
    told = tomllib.loads(text)
    assert set(told) <= DAEMON, f"{where}: a daemon is not told {set(told) - DAEMON}"
    for name, settings in told["pools"].items():
        pool(where, {"name": name, **settings})


def pool(where: str, told: dict[str, Any]) -> None:
    """What `POST /v1/pools` takes: the client knows all of it."""
    known = set(snapback.Client.create_pool.__annotations__)
    assert set(told) <= known, f"{where}: a pool has no {set(told) - known}"
    assert {"name", "image"} <= set(told), where


def units(folder: Path) -> None:
    """systemd knows every directive, and finds the programs: in a root with nothing else in it."""
    with tempfile.TemporaryDirectory() as root:
        own, system = Path(root, "etc/systemd/system"), Path(root, "usr/lib/systemd/system")
        programs = Path(root, "usr/bin")
        for made in (own, system, programs):
            made.mkdir(parents=True)
        for name in ("bin", "lib"):
            Path(root, name).symlink_to(f"usr/{name}")
        for unit in SYSTEM.iterdir():
            if unit.suffix in (".target", ".slice", ".mount", ".socket", ".service"):
                shutil.copy(unit, system, follow_symlinks=False)
        for name in ("snapback", "curl", "sh"):
            programs.joinpath(name).write_text("#!/bin/sh\n")
            programs.joinpath(name).chmod(0o755)
        names = []
        for unit in sorted(folder.iterdir()):
            if unit.suffix in (".service", ".socket"):
                shutil.copy(unit, own)
                names.append(unit.name.replace("@.", "@nightly."))
        told = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", f"--root={root}", *names],
            capture_output=True,
            text=True,
            timeout=60,
        )
    # Of the system's units it may complain; a directive that is not known is but a warning.
    complaints = [line for line in told.stderr.splitlines() if "snapback" in line]
    assert told.returncode == 0 and not complaints, "\n".join(complaints) or told.stderr


def main() -> None:
    examples = Path(sys.argv[1])
    for path in examples.glob("*/*.yaml"):
        manifests(path)
    for path in examples.glob("*/*.hcl"):
        nomad(path)
    for path in examples.glob("*/*.json"):
        pool(str(path), json.loads(path.read_text()))
    for path in examples.glob("*/*.toml"):
        config(str(path), path.read_text())
    units(examples / "systemd")


main()
