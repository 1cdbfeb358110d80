"""Reads a log of os-autoinst's: how long the guest stood still, and how long rollbacks took."""

import json
import re
import sys
from datetime import datetime


def time(line: str) -> float:
    told = re.match(r"\[([^\]]*?)(\.\d+)?Z\]", line)
    assert told, line
    return datetime.fromisoformat(told[1]).timestamp() + float(told[2] or 0)


def main() -> None:
    """Between the two lines os-autoinst's own guest stands still; snapback tells it by itself."""
    saving = loading = None
    for line in sys.stdin:
        if line.startswith('{"v"'):
            event = json.loads(line)
            if event["event"] == "moment":
                print(f"  guest frozen for {event['pause_ms']:.1f} ms")
                saving = None
            elif event["event"] == "error":
                print(f"  {event['message']}")
        elif "Saving snapshot (" in line:
            saving = time(line)
        elif "Snapshot complete" in line and saving:
            print(f"  guest frozen for {(time(line) - saving) * 1e3:.1f} ms")
        elif "Loading snapshot" in line:
            loading = time(line)
        elif "Restored snapshot" in line and loading:
            print(f"  rollback in {(time(line) - loading) * 1e3:.1f} ms")
            loading = None
        elif found := re.search(r"\|\|\| finished (\w+)", line):
            print(f"  finished {found[1]}")


if __name__ == "__main__":
    main()
