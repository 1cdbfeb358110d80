"""Prints a bill of materials, in CycloneDX 1.6, of what the program is built of.

Give it the cargo features, separated by commas. It lists what goes into the program: all crates
that cargo would build for it on this system, without those that only tests use; of each the licence
and the checksum by which Cargo.lock holds it. There is no time and no serial number in it: the same
sources give the same bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import tomllib

TARGET = "x86_64-unknown-linux-gnu"


def component(package: dict[str, Any], checksum: str | None) -> dict[str, Any]:
    name, version = package["name"], package["version"]
    found: dict[str, Any] = {
        "type": "library",
        "bom-ref": f"pkg:cargo/{name}@{version}",
        "name": name,
        "version": version,
        "purl": f"pkg:cargo/{name}@{version}",
    }
    if package.get("license"):
        # What was written before SPDX had a syntax for it.
        found["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    if checksum:
        found["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    return found


def main() -> None:
    features = sys.argv[1] if len(sys.argv) > 1 else ""
    command = ["cargo", "metadata", "--format-version=1", "--locked", f"--filter-platform={TARGET}"]
    metadata = json.loads(subprocess.check_output([*command, "--features", features]))
    with open("Cargo.lock", "rb") as file:
        locked = tomllib.load(file)["package"]
    checksums = {(p["name"], p["version"]): p.get("checksum") for p in locked}
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}

    # All that is built into the program, or for it (build scripts, macros).
    def needed(node: dict[str, Any]) -> list[str]:
        kinds = {dep["pkg"]: [kind["kind"] for kind in dep["dep_kinds"]] for dep in node["deps"]}
        return sorted(pkg for pkg, of in kinds.items() if any(kind != "dev" for kind in of))

    root = metadata["resolve"]["root"]
    seen, waiting = {root}, [root]
    while waiting:
        for pkg in needed(nodes[waiting.pop()]):
            if pkg not in seen:
                seen.add(pkg)
                waiting.append(pkg)

    def of(pkg: str) -> dict[str, Any]:
        package = packages[pkg]
        return component(package, checksums.get((package["name"], package["version"])))

    def by_name(pkg: str) -> tuple[str, str]:
        return packages[pkg]["name"], packages[pkg]["version"]

    ordered = sorted(seen, key=by_name)
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**of(root), "type": "application"}},
        "components": [of(pkg) for pkg in ordered if pkg != root],
        "dependencies": [
            {
                "ref": of(pkg)["bom-ref"],
                "dependsOn": [of(other)["bom-ref"] for other in needed(nodes[pkg])],
            }
            for pkg in ordered
        ],
    }
    json.dump(bill, sys.stdout, indent=1)
    print()


main()
