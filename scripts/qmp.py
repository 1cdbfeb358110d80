"""Sends commands to QEMU's control socket: `qmp.py SOCKET COMMAND...`. Prints each answer."""

from __future__ import annotations

import json
import socket
import sys


def main() -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        lines = connection.makefile("rw")
        json.loads(lines.readline())
        for command in ["qmp_capabilities", *sys.argv[2:]]:
            lines.write(json.dumps({"execute": command}) + "\n")
            lines.flush()
            while True:
                answer = json.loads(lines.readline())
                if "event" not in answer:
                    break
            if command != "qmp_capabilities":
                print(json.dumps(answer))


main()
