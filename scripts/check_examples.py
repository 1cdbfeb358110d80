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
import yaml

SYSTEM = Path("/usr/lib/systemd/system")


def manifests(path: Path) -> None:
    """Kubernetes' own schema holds for each document, and the pools in them are JSON."""
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, "1.30", strict=True)
        for name, text in document.get("data", {}).items():
            pool(f"{path}: {name}", text)


def nomad(path: Path) -> None:
    """It is HCL 2, and the pool in it is JSON."""
    job: Any = hcl2.loads(path.read_text())
    assert job["job"], path
    _, _, rest = path.read_text().partition("<<-JSON\n")
    pool(str(path), rest.partition("JSON\n")[0])


def pool(where: str, text: str) -> None:
    """What `POST /v1/pools` takes; the names that it knows are in clients/python."""
    import snapback

    told = json.loads(text)
    known = set(snapback.Client.create_pool.__annotations__)
    unknown = set(told) - known
    assert not unknown, f"{where}: a pool has no {unknown}"
    assert {"name", "image"} <= set(told), where


def units(folder: Path) -> None:
    """systemd knows every directive, and finds the programs: in a root with nothing else in it."""
    with tempfile.TemporaryDirectory() as root:
        own, system = Path(root, "etc/systemd/system"), Path(root, "usr/lib/systemd/system")
        programs = Path(root, "usr/bin")
        for made in (own, system, programs):
            made.mkdir(parents=True)
        Path(root, "lib").symlink_to("usr/lib")
        for unit in SYSTEM.iterdir():
            if unit.suffix in (".target", ".slice", ".mount", ".socket", ".service"):
                shutil.copy(unit, system, follow_symlinks=False)
        for name in ("snapback", "curl"):
            programs.joinpath(name).write_text("#!/bin/sh\n")
            programs.joinpath(name).chmod(0o755)
        names = []
        for unit in sorted(folder.glob("*.s*")):
            if unit.suffix in (".service", ".socket"):
                shutil.copy(unit, own)
                names.append(unit.name.replace("@.", "@booted."))
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
        pool(str(path), path.read_text())
    units(examples / "systemd")


main()
